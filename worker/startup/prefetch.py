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
"""Pieces to read at a time: disks and network volumes serve several readers faster than one."""
_BYTES_PER_PIECE = 64 * 1024**2


def read_weights(spec: ModelSpec, checkpoints: Path | Checkpoints) -> None:
    """Read the model's weights into the system's page cache, in the background and in the order in which they are loaded.

    Read only what fits into half of the memory: more would evict what was read before.
    """
    pieces: SimpleQueue[tuple[Path, int]] = SimpleQueue()
    room = available() // 2
    for file, begin, count in _pieces(Checkpoints.of(spec, checkpoints)):
        room -= count
        if room < 0:
            break
        pieces.put((file, begin))
    for _ in range(min(_READERS, pieces.qsize())):
        threading.Thread(target=_read, args=(pieces,), daemon=True).start()


def _pieces(checkpoints: Checkpoints) -> Iterator[tuple[Path, int, int]]:
    """(file, position of the piece, its bytes)."""
    for file in _weights(checkpoints):
        size = file.stat().st_size
        for begin in range(0, size, _BYTES_PER_PIECE):
            yield file, begin, min(_BYTES_PER_PIECE, size - begin)


def _weights(checkpoints: Checkpoints) -> Iterator[Path]:
    for part in checkpoints.spec.sources:
        if part in STEM_OF:
            folder = checkpoints.folder_of(part)
            with suppress(OSError, ValueError, KeyError):  # loading them reports errors better
                yield from (folder / name for name in file_names(folder, part) if (folder / name).is_file())


def _read(pieces: SimpleQueue[tuple[Path, int]]) -> None:
    """Send pieces of files to /dev/null: this reads their pages into memory without a copy."""
    with suppress(Empty, OSError), Path(os.devnull).open("wb") as nowhere:
        while True:
            path, position = pieces.get_nowait()
            end = position + _BYTES_PER_PIECE
            with path.open("rb") as file:
                while position < end and (sent := os.sendfile(nowhere.fileno(), file.fileno(), position, end - position)):
                    position += sent
