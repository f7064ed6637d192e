"""The code in the documentation: fenced blocks, and spans within a line. Nothing is judged here."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.worker_process import ROOT

_FOLDERS = ("docs", "examples", "client", "playground")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for folder in _FOLDERS for page in ROOT.glob(f"{folder}/**/*.md")),
]

_FENCE = re.compile(
    r"^ *(?P<marks>```+|~~~+)(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^ *(?P=marks) *$", re.MULTILINE | re.DOTALL
)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """One piece of code. `language` is "" where the fence names none, and "`" for a span within a line."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    document = page.read_text()
    for match in _FENCE.finditer(document):
        line = document.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], textwrap.dedent(match["text"]))


def spans_of(page: Path) -> Iterator[Block]:
    document = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())
    for match in _SPAN.finditer(document):
        yield Block(page, document.count("\n", 0, match.start()) + 1, "`", match[1])


def commands_of(shell: str) -> Iterator[list[str]]:
    """The words of each command; of `a | b` and `a && b` both. Redirections and the files they name are left out."""
    lines = shell.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):  # a session, with what the commands print
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    text = re.sub(r"\$\([^()]*\)", "$OUTPUT_OF_ANOTHER", _without_comments("\n".join(lines)))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    names_a_file = False
    for token in [*lexer, "\n"]:
        if set(token) <= set("|&;\n"):
            if words:
                yield words
            words = []
        elif names_a_file or set(token) <= set("<>"):
            names_a_file = not names_a_file
        else:
            words.append(token)


def _without_comments(shell: str) -> str:
    """From a `#` at the start of a word to the end of its line, unless it is quoted."""
    kept, quote, commented = "", "", False
    for before, letter in zip(" " + shell, shell, strict=False):
        if letter == "\n":
            commented = False
        elif not quote and not commented and letter == "#" and before.isspace():
            commented = True
        if commented:
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        kept += letter
    return kept
