"""Reads bytes of files into tensors on any device, by several threads: as fast as the disk gives them or the bus takes them.

What waits for a GPU goes through a small pinned buffer of each thread. A mapped file would be copied by one thread, page by
page, and once more by the driver.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a safetensors file calls them."""

_READERS = 4
_BYTES_PER_PIECE = 16 * 2**20
"""Enough for the disk to read ahead, and a power of two, to which pinned memory may be rounded."""


def read_into(wanted: Iterable[tuple[Path, int, torch.Tensor]]) -> None:
    """Fill each tensor, which must be contiguous, with the bytes of a file from a position on.

    Raises OSError, also where a file ends too soon; what the tensors hold is not known then.
    """
    buffers = threading.local()
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        pieces: list[_Piece] = []
        for path, position, tensor in wanted:
            if path not in files:
                files[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
            content = tensor.detach().view(-1).view(torch.uint8)
            pieces += [
                (files[path], position + begin, content[begin : begin + _BYTES_PER_PIECE])
                for begin in range(0, content.numel(), _BYTES_PER_PIECE)
            ]
        if len(pieces) == 1:  # not worth a thread
            _read(pieces[0], buffers)
        elif pieces:
            with ThreadPoolExecutor(min(_READERS, len(pieces)), "weights") as readers:
                for _ in readers.map(lambda piece: _read(piece, buffers), pieces):
                    pass


_Piece = tuple[int, int, torch.Tensor]
"""A file, the position in it, and where its bytes go, as uint8."""


def _read(piece: _Piece, buffers: threading.local) -> None:
    """Read one piece; the bytes are on the device when it returns. `buffers` keeps the buffer of each thread."""
    file, position, target = piece
    if in_main_memory(target):
        _read_exactly(file, position, target)
        return
    if not hasattr(buffers, "own"):
        buffers.own = torch.empty(_BYTES_PER_PIECE, dtype=torch.uint8, pin_memory=target.is_cuda)
    buffer = buffers.own[: target.numel()]
    _read_exactly(file, position, buffer)
    target.copy_(buffer)  # after whatever the device still computes with this memory, since it is on the same stream


def in_main_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _read_exactly(file: int, position: int, target: torch.Tensor) -> None:
    left = memoryview(target.numpy().data)
    while left:
        count = os.preadv(file, [left], position)
        if not count:
            raise OSError("a file of weights ends too soon")
        left, position = left[count:], position + count
