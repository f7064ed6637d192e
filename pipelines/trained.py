"""How a training ran, in the trainer's own words, and what follows from it for its samples. No torch in this file.

Source of every rule: jobs of ai-toolkit 0.12.26 that were run and compared frame by frame, see docs/how-matching-works.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pipelines.catalog import ModelSpec
from pipelines.weights import Stored

DEFAULT_QTYPE = "qfloat8"
EXCLUDED_SINCE = (0, 10, 22)
"""The first version that leaves the embedders and the last layer of Wan 2.2 unquantized (2026-07-10)."""

QTYPES = ("qfloat8", "float8", "int8", *(f"uint{bits}" for bits in range(2, 9)))
"""The trainer's formats that are rebuilt here."""

_EXCLUDED = ("condition_embedder", "proj_out")

_TORCH_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "float16"), "float16"),
    **dict.fromkeys(("fp32", "single", "float", "float32"), "float32"),
}
"""The trainer's names of dtypes, and torch's."""

MULTIPLIER_FLAGS = ("m", "network_multiplier")
"""The flags of a sample's prompt that set its network_multiplier."""

GROUP = 64
"""Inputs that share a scale in the uintN formats."""


def bytes_of_codes(format: str, rows: int, columns: int, itemsize: int) -> int:
    """Bytes that a weight [rows, columns] takes in a format, with its scales, which have `itemsize` bytes each."""
    if not format.startswith("uint"):
        return rows * (columns + itemsize)
    bits = int(format.removeprefix("uint"))
    if bits == 8 or columns % GROUP:
        return rows * columns * itemsize
    return rows * columns * bits // 8 + 2 * rows * columns // GROUP * itemsize


@dataclass(frozen=True)
class TrainedWith:
    """The part of a training config that decides how its samples were made. None: not said."""

    quantize: bool | None = None
    quantize_te: bool | None = None
    """None: as `quantize`, which is the trainer's default."""
    qtype: str | None = None
    """`qfloat8`, …; with an accuracy recovery adapter `uint4|ORG/REPO/FILE.safetensors`."""
    low_vram: bool | None = None
    vae_tiling: bool | None = None
    dtype: str | None = None
    """`train.dtype`, such as bf16."""
    save_dtype: str | None = None
    """`save.dtype`; the trainer's default is float16."""
    multipliers: Literal["equal", "mixed"] | None = None
    """Whether all samples of a round have one network_multiplier."""

    @property
    def is_quantized(self) -> bool:
        return bool(self.quantize)

    @property
    def format(self) -> str:
        """The format of the quantized weights, without an adapter."""
        return (self.qtype or DEFAULT_QTYPE).partition("|")[0]

    @property
    def recovery_adapter(self) -> str | None:
        """Path, or ORG/REPO/FILE on the Hugging Face Hub, of the adapter that the quantized transformer carried."""
        return (self.qtype or "").partition("|")[2] or None if self.is_quantized else None

    @property
    def quantizes_text_encoder(self) -> bool:
        return bool(self.quantize if self.quantize_te is None else self.quantize_te)

    @property
    def kinds(self) -> list[str]:
        """What of it changes the samples visibly, by the names of the request."""
        is_so = {"quantize": self.is_quantized, "quantize_te": self.quantizes_text_encoder}
        is_so |= {"low_vram": bool(self.low_vram), "vae_tiling": bool(self.vae_tiling)}
        return [name for name in is_so if is_so[name]]

    @property
    def computes_in(self) -> str | None:
        """The dtype of the samples, as torch names it; None: not said."""
        return _TORCH_DTYPES.get(self.dtype or "")

    @property
    def saves_in(self) -> str | None:
        """The dtype of the LoRA's file, as torch names it; None: not said."""
        return _TORCH_DTYPES.get(self.save_dtype or "")

    @property
    def merges(self) -> bool:
        """Whether the trainer merged the LoRA into the weights for its samples."""
        return not self.is_quantized and self.multipliers != "mixed"

    def decodes_in_tiles(self, spec: ModelSpec) -> bool:
        """The trainer's image-to-video models of 14B never do."""
        return bool(self.low_vram or self.vae_tiling) and spec.family not in ("i2v", "toolkit_i2v")

    def drops_incomplete_frames(self, spec: ModelSpec) -> bool:
        """With low_vram, Wan 2.1 text-to-video runs on another pipeline, which counts frames as Wan 2.2's does."""
        return bool(self.low_vram) and spec.family == "t2v" and not spec.moe

    def draws_noise_in_bf16(self, spec: ModelSpec) -> bool:
        """With low_vram, Wan 2.1 image-to-video runs on another pipeline. The newest trainer stops at the first sample."""
        return bool(self.low_vram) and spec.family == "i2v"

    def quantization(self, spec: ModelSpec, version: tuple[int, ...] | None) -> Quantization | None:
        """What was quantized; `version` is the trainer's, None for the newest."""
        transformer = self.format if self.is_quantized else None
        text_encoder = self.format if self.quantizes_text_encoder else None
        if not transformer and not text_encoder:
            return None
        leaves_out = spec.trainer_leaves_out_embedders and (version is None or version >= EXCLUDED_SINCE)
        return Quantization(transformer, text_encoder, _EXCLUDED if leaves_out else ())

    def as_words(self) -> dict[str, Any]:
        """What is said, by the names of the request. A URL in it loses its query, which may be a signature."""
        said = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in said if value is not None} | (
            {"qtype": self.qtype.partition("?")[0]} if self.qtype else {}
        )


NOT_SAID = TrainedWith()


@dataclass(frozen=True)
class Quantization:
    """The formats of a model's quantized weights; None: as they are."""

    transformer: str | None
    text_encoder: str | None
    excluded: tuple[str, ...] = ()
    """Modules of the transformer that are left as they are, by the start of their name."""

    def format_of(self, part: str, layer: str) -> str | None:
        """The format of a linear layer of a component, by their names; None: it is left as it is."""
        if part == "text_encoder":
            return self.text_encoder
        return self.transformer if part.startswith("transformer") and not layer.startswith(self.excluded) else None

    def stored_as(self, part: str) -> Stored | None:
        """How files keep a component in this quantization; None for one that stays as it is."""
        if part == "text_encoder":
            return Stored(self.text_encoder, ()) if self.text_encoder else None
        return Stored(self.transformer, self.excluded) if self.transformer and part.startswith("transformer") else None

    def __str__(self) -> str:
        parts = {"transformer": self.transformer, "text encoder": self.text_encoder}
        return " and ".join(f"the {part} as {format}" for part, format in parts.items() if format)


def quantization_in(spec: ModelSpec, quantize: str) -> Quantization | None:
    """What a training with the newest trainer quantizes in this format; None for the format `none`."""
    return None if quantize == "none" else TrainedWith(quantize=True, qtype=quantize).quantization(spec, None)


def trained_with(process: Mapping[str, Any]) -> TrainedWith:
    """Read a training config's `process` item."""
    model, train, save, sample = (_section(process, name) for name in ("model", "train", "save", "sample"))
    kwargs = _section(model, "model_kwargs")
    qtype = str(model.get("qtype") or DEFAULT_QTYPE)
    offloads = bool(model.get("layer_offloading", model.get("auto_memory", False)))
    if offloads and qtype == "qfloat8":  # the trainer changes it
        qtype = "float8"
    if (adapter := model.get("accuracy_recovery_adapter")) and "|" not in qtype:
        qtype = f"{qtype}|{adapter}"
    quantize = bool(model.get("quantize", False))
    quantize_te = bool(model.get("quantize_te", quantize))
    mixed = offloads or len(set(_multipliers(sample))) > 1
    return TrainedWith(
        quantize=quantize,
        quantize_te=quantize_te,
        qtype=qtype if quantize or quantize_te else None,
        low_vram=bool(model.get("low_vram", False)),
        vae_tiling=bool(kwargs.get("vae_tiling", False)),
        dtype=_text(train.get("dtype")),
        save_dtype=_text(save.get("dtype")),
        multipliers="mixed" if mixed else "equal",
    )


def other_base_model(model: Mapping[str, Any], spec: ModelSpec) -> str | None:
    """Return the `name_or_path` of a config's `model` section if it does not name the weights that a worker loads."""
    name = str(model.get("name_or_path") or "")
    known = {spec.sources[part].repo.partition("/")[2].removesuffix("-bf16").lower() for part in spec.transformers}
    named = {part.lower().removesuffix("-bf16") for part in re.split(r"[/\\]|--", name)}
    return name if name and not known & named else None


def _multipliers(sample: Mapping[str, Any]) -> Iterator[float | str]:
    """The network_multiplier of each sample: in a flag of its prompt, in its item, or for all of them."""
    for item in sample.get("samples") or [{"prompt": prompt} for prompt in sample.get("prompts") or []]:
        if not isinstance(item, Mapping) or item.get("prompt") is None:
            continue
        flags = [piece.partition(" ") for piece in str(item["prompt"]).split("--")[1:]]
        given = [value for flag, _, value in flags if flag in MULTIPLIER_FLAGS]
        yield _multiplier_of(given[-1] if given else item.get("network_multiplier", sample.get("network_multiplier", 1.0)))


def _multiplier_of(written: Any) -> float | str:
    try:
        return float(written)
    except ValueError:
        return 1.0  # as the trainer does
    except TypeError:
        return str(written)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
