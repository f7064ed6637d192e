"""The header of a safetensors file, read within bounds before anything maps the file. Neither torch nor safetensors in here.

The format: eight bytes with the header's length, little endian; the header, a JSON object from each tensor's name to its
`dtype`, `shape` and `data_offsets`, with texts under `__metadata__`; then the tensors' bytes, without a gap, to the file's end.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 8_000_000
"""A Wan LoRA's header has 0.1 to 1 MB, with room for the tags of a large dataset. The library would take 100 MB."""

MAX_TENSORS = 20_000
"""The largest Wan transformer has some 500 linear layers, and a LoKr file at most seven tensors for each."""

MAX_NAME = 300
"""Characters; a Wan LoRA's names have under 80. They come back in errors and warnings."""

_MAX_BRACKETS = 20 * MAX_TENSORS
"""A tensor has three, and metadata can hold JSON; millions of empty lists would take seconds and much memory to parse."""

_MAX_AXES = 8
_MAX_AXIS = 2**31

_BITS_OF = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class SafetensorsError(Exception):
    """The file breaks the format. `is_cut_short`: it ends before the data that its header lists."""

    def __init__(self, text: str, is_cut_short: bool = False) -> None:
        super().__init__(text)
        self.is_cut_short = is_cut_short


@dataclass(frozen=True)
class Header:
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    places: dict[str, tuple[int, int]]
    """Where each tensor's bytes begin and end, behind the header."""
    bytes: int
    """The header's size with its length, before the tensors."""


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file are a header's length, within bounds, and the beginning of a JSON object."""
    return len(head) > 8 and _length(head) <= MAX_HEADER_BYTES and head[8:9] == b"{"


def header_of(path: Path) -> Header:
    """The header of a file of weights, parsed once as long as the file stays the same. Raises SafetensorsError, OSError."""
    status = path.stat()
    return _header_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _header_of(path: Path, _size: int, _changed: int) -> Header:
    with path.open("rb") as file:
        return read_header(file)


def read_header(file: BinaryIO) -> Header:
    """Read `file` from its beginning to its header's end. Raises SafetensorsError when it breaks the format."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(9)
    if len(head) < 9 or head[8:9] != b"{":
        raise SafetensorsError("the file is not in safetensors format")
    length = _length(head)
    if length > MAX_HEADER_BYTES:
        raise _malformed(f"its header would have {length} bytes, and {MAX_HEADER_BYTES} at most are read")
    text = head[8:] + file.read(length - 1)
    if len(text) < length:
        raise _cut_short()
    if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS:
        raise _malformed("its header nests far more than names, shapes and texts")
    entries = _parse(text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed("its __metadata__ is not an object of texts")
    if len(entries) > MAX_TENSORS:
        raise _malformed(f"it holds {len(entries)} tensors, and {MAX_TENSORS} at most are read")
    places = {name: _place(name, entry) for name, entry in entries.items()}
    _check_places(places.values(), size - 8 - length)
    return Header(
        shapes={name: tuple(entry["shape"]) for name, entry in entries.items()},
        dtypes={name: entry["dtype"] for name, entry in entries.items()},
        metadata=metadata,
        places=places,
        bytes=8 + length,
    )


def _length(head: bytes) -> int:
    return int.from_bytes(head[:8], "little")


def _parse(text: bytes) -> dict[str, Any]:
    """JSON without its loose ends: no name twice, no NaN, no lone surrogates."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed("its header is no JSON") from error
    if not isinstance(value, dict):
        raise _malformed("its header is no JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _malformed("a name occurs twice in its header")
    for name, item in pairs:
        name.encode()
        if isinstance(item, str):
            item.encode()
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Where the tensor's bytes begin and end."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise _malformed(f"a tensor's name has {len(name)} characters, or some that cannot be shown")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"`{name}` is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS_OF:
        raise _malformed(f"`{name}` has a dtype that the format does not know")
    if not _are_counts(shape) or len(shape) > _MAX_AXES or any(axis > _MAX_AXIS for axis in shape):
        raise _malformed(f"`{name}` has a shape that no tensor has")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _malformed(f"`{name}` has data_offsets that are not two counts of bytes")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS_OF[dtype]:
        raise _malformed(f"`{name}` has more or fewer bytes than its dtype and shape take")
    return begin, end


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_places(places: Iterable[tuple[int, int]], size: int) -> None:
    position = 0
    for begin, end in sorted(places):
        if begin != position:
            raise _malformed("its tensors overlap or leave gaps between them")
        position = end
    if position > size:
        raise _cut_short()
    if position < size:
        raise _malformed(f"{size - position} bytes follow its last tensor")


def _malformed(what: str) -> SafetensorsError:
    return SafetensorsError(f"the file is not in safetensors format: {what}")


def _cut_short() -> SafetensorsError:
    return SafetensorsError("the file is cut short: it ends before the data that its header promises", is_cut_short=True)
