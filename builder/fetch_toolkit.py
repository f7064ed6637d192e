"""Download the files of ai-toolkit that the worker uses: at one commit, without the rest of the repo and its history.

    python -m builder.fetch_toolkit --to /opt/ai-toolkit

These are the two modules that pipelines/toolkit.py loads, the modules that they import, the version and the licence, and
`.git/HEAD` with the commit, where the worker reads it. git downloads them, and checks every byte against the commit. No torch
and no packages from PyPI in this file.
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

from builder import REPRODUCIBLE_MTIME
from builder.retry import FetchError, TryAgain, retry
from pipelines.catalog import TOOLKIT_COMMIT
from worker.files import inside

REMOTE = "https://github.com/ostris/ai-toolkit"

MODULES = ("extensions_built_in.diffusion_models.wan22.wan22_pipeline", "toolkit.models.wan21.wan_utils")
"""The modules that pipelines/toolkit.py loads. It does not run the `__init__` files of their packages, but those of others."""

OTHER_FILES = ("version.py", "LICENSE")

_ATTEMPTS = 5
_SECONDS_PER_COMMAND = 600
_NO_SUCH_COMMIT = ("not our ref", "couldn't find remote ref", "unadvertised object", "no such remote ref")
"""Parts of git's messages."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.fetch_toolkit", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="an empty folder, or one from an earlier run")
    parser.add_argument("--commit", default=TOOLKIT_COMMIT, metavar="SHA", help=f"default: {TOOLKIT_COMMIT}, which was tested")
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
    """Write the files of `commit` to `to`, and return their paths. Raises FetchError, and OSError where it cannot write."""
    if (to / ".git").exists() and {path.name for path in (to / ".git").iterdir()} - {"HEAD"}:
        raise FetchError(f"--to: {to} is a checkout with its own history; name another folder")
    with tempfile.TemporaryDirectory() as folder:
        repo = Repo(Path(folder))
        repo.fetch(remote, commit)
        files = {path: repo.read(commit, path) for path in needed(repo, commit)}
    files[".git/HEAD"] = f"{commit}\n".encode()
    for path, content in files.items():
        file = inside(to, path)
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
        """Raises FetchError: at once when the remote has no such commit, after several attempts when it cannot be reached."""
        self._git("remote", "add", "origin", remote)
        remote = _without_passwords(remote)

        def attempt() -> None:
            # The filter leaves out the files: git downloads each when it is read, and few of many are.
            done = self._run("fetch", "--quiet", "--depth=1", "--filter=blob:none", "--no-tags", "origin", commit)
            if done.returncode == 0:
                return
            if any(text in done.stderr.decode(errors="replace") for text in _NO_SUCH_COMMIT):
                raise FetchError(f"{remote} has no commit {commit}")
            raise TryAgain(_reason(done))

        retry(f"{remote} cannot be fetched from", attempt, _pause, _ATTEMPTS)
        if self._git("rev-parse", "FETCH_HEAD^{commit}").decode().strip() != commit:
            raise FetchError(f"{remote} returned another commit for {commit}; --commit takes a commit, not a tag or a tree")

    def paths(self, commit: str) -> set[str]:
        return set(self._git("ls-tree", "-r", "-z", "--name-only", commit).decode().split("\0"))

    def read(self, commit: str, path: str) -> bytes:
        """Return a file's content. Raises FetchError when it cannot be downloaded in several attempts."""

        def attempt() -> bytes:
            done = self._run("cat-file", "blob", f"{commit}:{path}")
            if done.returncode:
                raise TryAgain(_reason(done))
            return done.stdout

        return retry(f"{path} of commit {commit} cannot be fetched", attempt, _pause, _ATTEMPTS)

    def _git(self, *arguments: str) -> bytes:
        done = self._run(*arguments)
        if done.returncode:
            raise FetchError(f"git {arguments[0]} failed: {_reason(done)}")
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        slow = {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "30"}  # bytes per second, seconds
        quiet = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        command = ["git", "-C", str(self._folder), *arguments]
        env = {**os.environ, **slow, **quiet}
        try:
            return subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS_PER_COMMAND, env=env)  # noqa: S603
        except FileNotFoundError:
            raise FetchError("git is not installed; install it where this runs") from None
        except subprocess.TimeoutExpired:
            raise FetchError(f"git {arguments[0]} took longer than {_SECONDS_PER_COMMAND} s") from None


def needed(repo: Repo, commit: str) -> list[str]:
    """Return the paths of the files that are used: the modules, and what they import of the repo, directly or not."""
    there = repo.paths(commit)
    roots = {path.partition("/")[0].removesuffix(".py") for path in there}
    found: set[str] = {path for path in OTHER_FILES if path in there}
    waiting = [_file_of(module) for module in MODULES]
    if missing := [path for path in waiting if path not in there]:
        raise FetchError(f"commit {commit} is not a usable commit of ostris/ai-toolkit: it lacks {', '.join(missing)}")
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
    """Yield the names of modules that a file may import; for `from a import b`, both `a` and `a.b`."""
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


def _pause(message: str, seconds: float) -> None:
    print(message, file=sys.stderr)
    time.sleep(seconds)


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return the line in which git says why it failed."""
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["git printed no reason"]
    return _without_passwords(next((line for line in lines if line.startswith("fatal: ")), lines[-1]).removeprefix("fatal: "))


def _without_passwords(text: str) -> str:
    """Return the text with the user names and passwords of its URLs removed."""
    return re.sub(r"//[^/@\s]*@", "//", text)


if __name__ == "__main__":
    sys.exit(main())
