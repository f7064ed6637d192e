"""Lists that outlive the playground's process."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONG = 10_000
"""Characters. A longer text, such as an image in base64, has a file of its own."""
_IN_A_FILE = re.compile(r"\x01text-[0-9a-f]{64}")
"""What stands in a list for a long text: the name of its file."""


class Store:
    """A folder with lists as JSON files, and a file for each long text, which many entries of the lists may share.

    Only this user can read them. Its methods may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}
        """By the long texts that have a file, what stands in the lists for them."""
        self._used: dict[str, set[str]] = {}
        """By list, the long texts in it."""

    def read(self, name: str) -> Any:
        """What `write` has stored as this list. Raises OSError and ValueError."""
        with self._lock:
            texts = {name: text for text, name in self._names.items()}

            def long(text: str) -> str:
                if not _IN_A_FILE.fullmatch(text):
                    return text
                if text not in texts:
                    texts[text] = self._file(text).read_text() if self._file(text).exists() else ""
                    self._names[texts[text]] = text
                used.add(texts[text])
                return texts[text]

            used: set[str] = set()
            values = _with_texts(json.loads((self._folder / name).read_text()), long)
            self._used[name] = used
            return values

    def write(self, name: str, values: Any) -> None:
        """Replace a list, whole or not at all, and delete the files of texts that no list has any more."""
        with self._lock:
            used: set[str] = set()

            def short(text: str) -> str:
                if len(text) <= _LONG:
                    return text
                if text not in self._names:
                    in_list = f"\x01text-{hashlib.sha256(text.encode()).hexdigest()}"
                    _write_private(self._file(in_list), text)
                    self._names[text] = in_list
                used.add(text)
                return self._names[text]

            _write_private(self._folder / name, json.dumps(_with_texts(values, short)))
            self._used[name] = used
            for text in self._names.keys() - set().union(*self._used.values()):
                self._file(self._names.pop(text)).unlink(missing_ok=True)

    def _file(self, in_list: str) -> Path:
        return self._folder / in_list[1:]


def _with_texts(values: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value in which each text is changed."""
    if isinstance(values, dict):
        return {name: _with_texts(value, change) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_with_texts(value, change) for value in values]
    return change(values) if isinstance(values, str) else values


def _write_private(target: Path, text: str) -> None:
    """Write a file that only this user can read, whole or not at all: the URLs of results are secrets."""
    part = target.with_name(f"{target.name}.part")
    part.touch(mode=0o600)
    part.write_text(text)
    part.replace(target)
