"""A LoRA file's header: keys, shapes, dtypes and metadata. No torch in this file.

`origin` says which model the file was trained for, `fit` whether it fits a loaded transformer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from pipelines.catalog import DistilledLora
from pipelines.errors import LoraInvalid
from pipelines.lora.names import Side
from pipelines.safetensors_header import Header, SafetensorsError, looks_like_safetensors, read_header

_BLOCK = re.compile(r"blocks[._](\d{1,9})[._]")
_TEXT_KEY = re.compile(r"(cross_attn[._]|attn2\.to_)[kv]\.")
_IMAGE_KEY = re.compile(r"k_img|v_img|add_k_proj|add_v_proj")

_MAX_ENTRY = 10_000
"""Characters of a metadata entry that is looked into; ai-toolkit writes some hundred."""

FILES_KEPT = 64
"""How many files are not read again. A header takes MAX_HEADER_BYTES and more of memory."""
_MAX_NAME = 100
_REMEDY = {False: "export the LoRA as safetensors", True: "upload or download it again"}
"""By whether the file is cut short."""
_MAX_STEP = 2**53  # beyond it JSON readers disagree


REPLACED = "the file was replaced while the job waited; send the job again"

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size and mtime of a file."""


def identity_of(stat: os.stat_result) -> FileIdentity:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class LoraFile:
    """A local LoRA file and its header."""

    path: Path
    header: Header = field(compare=False)
    identity: FileIdentity
    """A file that is replaced under the same name is another LoRA."""

    @classmethod
    def read(cls, path: Path) -> LoraFile:
        """Read the header of `path`; the same file is read once.

        Raises LoraInvalid when the file is not safetensors, is cut short, or holds no tensor.
        """
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):  # reading a pipe or a device may never end
                raise LoraInvalid("this is a folder or a device, not a file; name the .safetensors file itself")
            return _read(path, identity_of(stat))
        except OSError as error:
            raise LoraInvalid("the file could not be read; send the job again") from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.header.shapes

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Key to dtype as safetensors writes it (`F32`, `BF16`, …)."""
        return self.header.dtypes

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata

    def check_unchanged(self) -> None:
        """Raises LoraInvalid when the file is no longer the one whose header was read."""
        if LoraFile.read(self.path).identity != self.identity:
            raise LoraInvalid(REPLACED)

    @cached_property
    def sha256(self) -> str:
        """The checksum of the whole file, as hexadecimal digits."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """The JSON object in the metadata under `name`; {} for anything else, and for more than any program writes there."""
        text = self.metadata.get(name, "")
        try:
            value = json.loads(text) if len(text) <= _MAX_ENTRY else None
        except (ValueError, RecursionError):
            value = None
        return value if isinstance(value, dict) else {}

    @property
    def base_version(self) -> str:
        """`ss_base_model_version` as the trainer wrote it (`wan_2.1`, `wan_2.2_14b`, …), or ""."""
        return _name(self.metadata.get("ss_base_model_version", ""))

    @property
    def trainer_version(self) -> str:
        """The version of ai-toolkit that wrote the file, such as `0.12.26`; "" for other programs."""
        software = self.entry("software")
        return _name(software.get("version")) if software.get("name") == "ai-toolkit" else ""

    @property
    def training_step(self) -> int | None:
        """The step at which the file was saved, or None."""
        step = self.entry("training_info").get("step")
        return step if type(step) is int and 0 <= step < _MAX_STEP else None

    @property
    def num_blocks(self) -> int:
        """One more than the highest block number among the keys."""
        return 1 + max((int(match[1]) for key in self.shapes if (match := _BLOCK.search(key))), default=-1)

    @property
    def has_image_keys(self) -> bool:
        """Keys of the image cross-attention, which only Wan 2.1 I2V has."""
        return any(_IMAGE_KEY.search(key) for key in self.shapes)

    @property
    def has_text_keys(self) -> bool:
        """Keys of the text cross-attention, beside which a LoRA of Wan 2.1 I2V has image keys."""
        return any(_TEXT_KEY.search(key) for key in self.shapes)

    @property
    def trigger_word(self) -> str:
        """The trigger word of the training, or "". ai-toolkit writes `{"1_WORD": {"WORD": 1}}`; others write real counts."""
        tags = self.entry("ss_tag_frequency")
        for folder, counts in tags.items():
            if len(tags) == 1 and folder.startswith("1_") and counts == {folder.removeprefix("1_"): 1}:
                return _name(folder.removeprefix("1_"))
        return ""


@dataclass(frozen=True)
class Adapter:
    """A LoRA as a request asks for it: its file, its strength, and on a MoE model its side."""

    file: LoraFile
    scale: float = 1.0
    side: Side | Literal["both"] | None = None
    """`both`: for an extra LoRA alone."""
    source: str = field(default="", compare=False)
    """The name that the user gave the file, such as the end of its URL; "" for the file's own."""
    is_extra: bool = False
    """Whether it lies on top of the LoRAs that the model page knows."""
    distilled: DistilledLora | None = None
    """What it is of a draft."""

    @property
    def name(self) -> str:
        return self.source or self.file.path.name

    @property
    def without(self) -> tuple[str, ...]:
        """Parts of the names of layers that are left out."""
        return self.distilled.without if self.distilled else ()


@lru_cache(maxsize=FILES_KEPT)
def _read(path: Path, identity: FileIdentity) -> LoraFile:
    with path.open("rb") as file:
        if why := why_unreadable(file.read(256)):
            raise LoraInvalid(why)
        file.seek(0)
        try:
            header = read_header(file)
        except SafetensorsError as error:
            raise LoraInvalid(f"{error}; {_REMEDY[error.is_cut_short]}") from error
    if not header.shapes:
        raise LoraInvalid("the file is safetensors but holds no tensor; export the LoRA again")
    return LoraFile(path, header, identity)


def why_unreadable(head: bytes) -> str | None:
    """What a file is instead of a LoRA, from its first bytes (64 will do): a sentence, or None when they do not tell."""
    if looks_like_safetensors(head):  # its length can begin with any byte, also with those looked for below
        return None
    text = head.lstrip()
    if not text:
        return "the file is empty; upload or download it again"
    if re.match(rb"<[!?a-zA-Z]", text):
        return "the file is a web page, not a LoRA; use the file's download link (on the Hub: /resolve/, not /blob/)"
    if text.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer, not the weights; fetch the file itself"
    if text.startswith((b"PK", b"\x80")):
        return "the file is a pickle (.pt, .ckpt, .bin), which is never loaded; export the LoRA as safetensors"
    if len(head) >= 64 and head[8:9] != b"{":
        return "the file is not in safetensors format; export the LoRA as safetensors"
    return None


def _name(value: Any) -> str:
    """A name out of the metadata as it can be shown in a result; "" for what can be none."""
    return value if isinstance(value, str) and len(value) <= _MAX_NAME and value.isprintable() else ""
