"""Files that are whole or not there, and temporary ones that go, whatever happens to the process that writes them."""

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
    """A folder for the temporary files of this process; it goes when the process ends.

    Those of processes that were killed go now. A process holds a lock in its folder for as long as it lives, which also shows
    to containers that share the temp folder and number their processes alike.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # its process lives, or it is another user's
            lock = _locked(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    while True:
        mine = tempfile.TemporaryDirectory(prefix=_SCRATCH)
        with suppress(OSError):  # another process that starts now took it for abandoned
            _locked(Path(mine.name))  # until the process ends
            if Path(mine.name).exists():
                return mine


def _locked(folder: Path) -> int:
    """The folder, open and locked, as a descriptor. Raises OSError when a process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place when the block ends well; gone when it does not.

    A block that removes the temporary file leaves `target` as it was.
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


def inside(root: Path, name: str) -> Path:
    """The path below `root` of a name that comes from elsewhere: a listing, a note, an object's key.

    Raises ValueError for a name that leads elsewhere, or that no file should have. Links in the folder are its owner's.
    """
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("the name is not one of a file below the folder")
    return root / name


def below(root: Path, name: str) -> Path | None:
    """The file of that name below `root`, also after links; None where there is none."""
    try:
        root = root.resolve()
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
        return None
