"""Which files hold a component's weights, by the names that diffusers and transformers give them. No torch in this file.

A file can hold the weights of linear layers as the codes of a quantized format: NAME.code_0, NAME.code_1, … in place of
NAME.weight, in the order of `quantized.Codes`. Its metadata says which format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.safetensors_header import SafetensorsError, header_of

STEM_OF = {
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "image_encoder": "model",
}
"""Component to the name its weight files begin with. Files of another name, such as `….fp16.safetensors`, are not read."""


def index_of(folder: Path, component: str) -> dict[str, str]:
    """Key to file name, for weights in shards; empty for a single file."""
    index = folder / f"{STEM_OF[component]}.safetensors.index.json"
    return dict(json.loads(index.read_text())["weight_map"]) if index.is_file() else {}


def file_names(folder: Path, component: str) -> list[str]:
    """The names of all files that hold the component's weights."""
    return sorted(set(index_of(folder, component).values())) or [f"{STEM_OF[component]}.safetensors"]


CODES = "worker-wan-lora.codes"
"""In a file's metadata: `Stored` as JSON, and by what it was made."""

_EMBEDDINGS = ("shared", "embed_tokens", "relative_attention_bias")
"""Modules of the text encoder whose weights are tables, and no linear layers'."""


@dataclass(frozen=True)
class Stored:
    """What the codes in a file are."""

    format: str
    excluded: tuple[str, ...]
    """Modules that were left as they are, by the start of their name."""
    dtype: str = "bfloat16"
    """The dtype of the weights that were encoded, and of the scales."""


def stored_in(folder: Path, component: str) -> Stored | None:
    """What the component's weights are stored as; None for plain weights. Raises ValueError where its files differ, OSError."""
    found: set[Stored | None] = set()
    for name in file_names(folder, component):
        try:
            text = header_of(folder / name).metadata.get(CODES)
            content = json.loads(text) if text else None
            found.add(Stored(content["format"], tuple(content["excluded"]), content["dtype"]) if content else None)
        except (SafetensorsError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{name} is damaged") from error
    if len(found) > 1:
        raise ValueError(f"only some files of the {component} are quantized; run fetch_checkpoints again, to its end")
    return found.pop()


def is_linear(key: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a transformer or text encoder is the weight of a linear layer, by its name in the file."""
    return len(shape) == 2 and key.endswith(".weight") and not any(name in key for name in _EMBEDDINGS)
