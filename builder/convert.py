"""Convert a safetensors file from float32 to bfloat16, but for what diffusers keeps in float32. No torch in this file.

A load in bf16 gives the same bits from either file: each number is rounded to the nearest, ties to even, as torch does it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipelines.safetensors_header import Header, SafetensorsError, read_header

KEPT_IN_FLOAT32 = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Modules of WanTransformer3DModel that diffusers 0.42.1 loads in float32 whatever the dtype. A test compares."""

_NUMBERS_AT_ONCE = 2**24


def to_bf16(source: Path, target: BinaryIO) -> str | None:
    """Write the converted file to `target` and return its sha256; None, and nothing written, for a file without such numbers.

    Raises ValueError for a file that is not in safetensors format.
    """
    with source.open("rb") as file:
        try:
            header = read_header(file)
        except SafetensorsError as error:
            raise ValueError(str(error)) from error
        names = {
            name for name, dtype in header.dtypes.items() if dtype == "F32" and KEPT_IN_FLOAT32.isdisjoint(name.split("."))
        }
        if not names:
            return None
        sha256 = hashlib.sha256()

        def write(data: bytes) -> None:
            sha256.update(data)
            target.write(data)

        write(_new_header(header, names))
        for name, (begin, end) in sorted(header.places.items(), key=lambda item: item[1]):
            file.seek(header.bytes + begin)
            left = end - begin
            while left:
                data = file.read(min(left, 4 * _NUMBERS_AT_ONCE))
                left -= len(data)
                write(rounded(np.frombuffer(data, "<f4")).tobytes() if name in names else data)
        return sha256.hexdigest()


def rounded(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return float32 numbers as the bits of bfloat16: the nearest, ties to even; NaN stays NaN."""
    bits = numbers.view("<u4")
    nearest: npt.NDArray[np.uint16] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    nearest[np.isnan(numbers)] = 0x7FC0
    return nearest


def _new_header(header: Header, converted: set[str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
    position = 0
    for name, (begin, end) in sorted(header.places.items(), key=lambda item: item[1]):
        size = (end - begin) // 2 if name in converted else end - begin
        dtype = "BF16" if name in converted else header.dtypes[name]
        entries[name] = {"dtype": dtype, "shape": header.shapes[name], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
