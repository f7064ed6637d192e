"""Files that are whole or not there, and temporary ones that go, whatever happens to the process that writes them."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SCRATCH = "worker-wan-lora-"


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the temporary files of this process; it goes when the process ends.

    Those of processes that were killed go now. A folder with this process' own number is of an earlier one that had the same
    number: in a container, that is every earlier one.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        number = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if number.isdigit() and (int(number) == os.getpid() or not Path(f"/proc/{number}").exists()):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-")


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


def below(root: Path, name: str) -> Path | None:
    """The file of that name below `root`, also after links; None where there is none."""
    try:
        root = root.resolve()
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
        return None
