"""Download the files of ai-toolkit that the worker uses, at one commit, without the rest of the repo and its history.

    python -m builder.fetch_toolkit --to /opt/ai-toolkit

These are the two modules that pipelines/toolkit.py loads, the modules that they import, the version and the licence; and
`.git/HEAD`, from which the worker reads the commit. git downloads them, and checks every byte against the commit. This needs
neither torch nor pip packages.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builder import REPRODUCIBLE_MTIME
from pipelines.catalog import TOOLKIT_COMMIT

REMOTE = "https://github.com/ostris/ai-toolkit"

MODULES = ("extensions_built_in.diffusion_models.wan22.wan22_pipeline", "toolkit.models.wan21.wan_utils")
"""What pipelines/toolkit.py loads; the packages around them are not run, others' `__init__` files are."""

BESIDE = ("version.py", "LICENSE")

_TRIES = 5
_FIRST_PAUSE = 1.0
_SECONDS_PER_COMMAND = 600
_NO_SUCH_COMMIT = ("not our ref", "couldn't find remote ref", "unadvertised object", "no such remote ref")


class FetchError(Exception):
    """One line for the caller: what failed, where, and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="an empty folder, or one that this has filled")
    parser.add_argument("--commit", default=TOOLKIT_COMMIT, metavar="SHA", help=f"default: {TOOLKIT_COMMIT}, the tested one")
    parser.add_argument("--remote", default=REMOTE, metavar="URL", help=f"default: {REMOTE}")
    arguments = parser.parse_args()
    if len(arguments.commit) != 40 or set(arguments.commit) - set("0123456789abcdef"):
        parser.error("--commit takes the 40 hexadecimal digits of a commit")
    try:
        files = fetch(arguments.remote, arguments.commit, arguments.to)
    except (FetchError, OSError) as error:
        print(f"fetch_toolkit: {error}", file=sys.stderr)
        return 1
    print(f"ai-toolkit at {arguments.commit}: {len(files)} files in {arguments.to}")
    return 0


def fetch(remote: str, commit: str, to: Path) -> list[str]:
    """Write the files of `commit` to `to`; returns their paths. Raises FetchError, and OSError where it cannot write."""
    if (to / ".git").exists() and {path.name for path in (to / ".git").iterdir()} - {"HEAD"}:
        raise FetchError(f"--to: {to} is a checkout with a history of its own; name another folder")
    with tempfile.TemporaryDirectory() as folder:
        repo = Repo(Path(folder))
        repo.fetch(remote, commit)
        files = {path: repo.read(commit, path) for path in needed(repo, commit)}
    files[".git/HEAD"] = f"{commit}\n".encode()
    for path, content in files.items():
        file = to / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o644)
    for written in [*to.rglob("*"), to]:
        os.utime(written, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))
    return sorted(files)


class Repo:
    """A new git repo, into which one commit is fetched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._git("init", "--quiet")

    def fetch(self, remote: str, commit: str) -> None:
        """Raises FetchError: at once when the remote has no such commit, after some tries when it cannot be reached."""
        self._git("remote", "add", "origin", remote)
        remote = _shown(remote)
        for attempt in range(_TRIES):
            # The files themselves come one by one when they are read, where the remote can do that: they are few of many.
            done = self._run("fetch", "--quiet", "--depth=1", "--filter=blob:none", "--no-tags", "origin", commit)
            if done.returncode == 0:
                break
            reason = _reason(done.stderr)
            if any(text in done.stderr for text in _NO_SUCH_COMMIT):
                raise FetchError(f"{remote} has no commit {commit}")
            if attempt + 1 == _TRIES:
                raise FetchError(f"{remote} cannot be fetched from, {_TRIES} times in a row: {reason}")
            pause = _FIRST_PAUSE * 2**attempt
            print(f"{remote}: {reason}; next try in {pause:.1f} s", file=sys.stderr)
            time.sleep(pause)
        if self._git("rev-parse", "FETCH_HEAD^{commit}").decode().strip() != commit:
            raise FetchError(f"{remote} gave something else for commit {commit}; --commit takes a commit, not a tag or a tree")

    def paths(self, commit: str) -> set[str]:
        return set(self._git("ls-tree", "-r", "-z", "--name-only", commit).decode().split("\0"))

    def read(self, commit: str, path: str) -> bytes:
        """Raises FetchError when it does not come, again after some tries."""
        for attempt in range(_TRIES):
            done = self._run("cat-file", "blob", f"{commit}:{path}", text=False)
            if done.returncode == 0:
                return bytes(done.stdout)
            time.sleep(_FIRST_PAUSE * 2**attempt if attempt + 1 < _TRIES else 0)
        raise FetchError(f"{path} of commit {commit} cannot be fetched: {_reason(done.stderr.decode(errors='replace'))}")

    def _git(self, *arguments: str) -> bytes:
        done = self._run(*arguments, text=False)
        if done.returncode:
            raise FetchError(f"git {arguments[0]} failed: {_reason(done.stderr.decode(errors='replace'))}")
        return bytes(done.stdout)

    def _run(self, *arguments: str, text: bool = True) -> subprocess.CompletedProcess[Any]:
        patience = {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "30"}  # bytes per second, seconds
        quiet = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        try:
            return subprocess.run(  # noqa: S603
                ["git", "-C", str(self._folder), *arguments],  # noqa: S607
                capture_output=True,
                text=text,
                check=False,
                timeout=_SECONDS_PER_COMMAND,
                env={**os.environ, **patience, **quiet},
            )
        except FileNotFoundError:
            raise FetchError("git is not installed; install it where this runs") from None
        except subprocess.TimeoutExpired:
            raise FetchError(f"git {arguments[0]} took longer than {_SECONDS_PER_COMMAND} s") from None


def needed(repo: Repo, commit: str) -> list[str]:
    """The paths of the modules that are used, and of everything in the repo that they import, directly or not."""
    there = repo.paths(commit)
    roots = {path.partition("/")[0].removesuffix(".py") for path in there}
    found: set[str] = {path for path in BESIDE if path in there}
    waiting = [_file_of(module) for module in MODULES]
    if missing := [path for path in waiting if path not in there]:
        raise FetchError(f"commit {commit} of ostris/ai-toolkit cannot be used: it lacks {', '.join(missing)}")
    not_run = {parent.as_posix() for module in MODULES for parent in Path(_file_of(module)).parents}
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for module in _imported(repo.read(commit, path), path):
            if module.partition(".")[0] in roots:
                file = _file_of(module)
                packages = [f"{parent}/__init__.py" for parent in Path(file).parents if parent.as_posix() not in not_run]
                waiting += [each for each in (file, f"{file[:-3]}/__init__.py", *packages) if each in there]
    return sorted(found)


def _imported(source: bytes, path: str) -> Iterator[str]:
    """The names of modules that a file may import; `from a import b` gives `a` and `a.b`."""
    if not path.endswith(".py"):
        return
    package = path.rpartition("/")[0].split("/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (module, *(f"{module}.{name.name}" for name in node.names))


def _file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _reason(said: str) -> str:
    """git's reason for its failure, from what it printed."""
    lines = said.strip().splitlines() or ["git said nothing"]
    return _shown(next((line for line in lines if line.startswith("fatal: ")), lines[-1]).removeprefix("fatal: "))


def _shown(text: str) -> str:
    """Without the passwords of URLs."""
    return re.sub(r"//[^/@\s]*@", "//", text)


if __name__ == "__main__":
    sys.exit(main())
