"""Which files hold a component's weights, by the names that diffusers and transformers give them. No torch in this file."""

from __future__ import annotations

import json
from pathlib import Path

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
