"""Files that are either complete or absent, and temporary files that are deleted, even if the process is killed."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SCRATCH = "worker-wan-lora-scratch-"


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for the temporary files of this process. It is deleted when the process ends.

    This call also deletes the folders of processes that were killed. A living process holds a lock on its folder. Unlike a
    process id, the lock also works between containers that share the temp folder.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # its process is alive, or it belongs to another user
            lock = _locked(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    while True:
        mine = tempfile.TemporaryDirectory(prefix=_SCRATCH)
        # Another process that starts now may find it before it is locked here, and delete it.
        with suppress(BlockingIOError, FileNotFoundError):
            _locked(Path(mine.name))  # until the process ends
            if Path(mine.name).exists():
                return mine


def _locked(folder: Path) -> int:
    """Open and lock the folder. Returns the descriptor. Raises OSError when a process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Give the block a temporary file beside `target`. It replaces `target` when the block succeeds, and is deleted otherwise.

    If the block deletes the temporary file, `target` stays as it was.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if temporary.exists():
            temporary.chmod(0o644)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def listed(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of a folder, without those that another process deletes meanwhile."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            yield path, path.stat()


def inside(root: Path, name: str) -> Path:
    """Return the path below `root` of a name from an untrusted source: a listing, a note, the key of an object.

    Raises ValueError for a name that leads out of `root`, or that no file should have. Links inside the folder are trusted.
    """
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("the name is not one of a file below the folder")
    return root / name


def below(root: Path, name: str) -> Path | None:
    """Return the file of that name, which must be below `root` after links are resolved; None if there is none."""
    try:
        root = root.resolve()
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
        return None
