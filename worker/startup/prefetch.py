"""Prefetches weights into the page cache while imports run. No torch in this file."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from pipelines.catalog import ModelSpec
from pipelines.checkpoints import Checkpoints
from pipelines.host_memory import available
from pipelines.weights import STEM_OF, file_names

_READERS = 4
"""Files to read at a time: a network volume serves several streams faster than one."""
_BYTES_PER_CALL = 64 * 1024**2


def read_weights(spec: ModelSpec, checkpoints: Path | Checkpoints) -> None:
    """Read the model's weights into the system's page cache, in the background and in the order in which they are loaded.

    Read only what fits into half of the memory: more would evict what was read before.
    """
    files: SimpleQueue[Path] = SimpleQueue()
    room = available() // 2
    for file in _weights(Checkpoints.of(spec, checkpoints)):
        room -= file.stat().st_size
        if room < 0:
            break
        files.put(file)
    for _ in range(min(_READERS, files.qsize())):
        threading.Thread(target=_read, args=(files,), daemon=True).start()


def _weights(checkpoints: Checkpoints) -> Iterator[Path]:
    for part in checkpoints.spec.sources:
        if part in STEM_OF:
            folder = checkpoints.folder_of(part)
            with suppress(OSError, ValueError, KeyError):  # loading them reports errors better
                yield from (folder / name for name in file_names(folder, part) if (folder / name).is_file())


def _read(files: SimpleQueue[Path]) -> None:
    """Send files to /dev/null: this reads their pages into memory without a copy."""
    with suppress(Empty, OSError), Path(os.devnull).open("wb") as nowhere:
        while True:
            with files.get_nowait().open("rb") as file:
                position = 0
                while sent := os.sendfile(nowhere.fileno(), file.fileno(), position, _BYTES_PER_CALL):
                    position += sent
