"""Which model a LoRA was trained for, by its header: the one answer for the worker and the tools. No torch in this file."""

from __future__ import annotations

import re

from pipelines.catalog import MODELS, ModelSpec
from pipelines.errors import LoraError
from pipelines.lora.file import LoraFile
from pipelines.lora.layers import Layer, read

_INPUTS_TELL = re.compile(r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.0\.proj)")
_OUTPUTS_TELL = re.compile(r"blocks\.\d+\.ffn\.net\.2")


def widths_of(file: LoraFile) -> list[int]:
    """The widths of transformers that the file's layers tell: one for a LoRA of one model, none for a file that is no LoRA."""
    try:
        layers = read(file).all_layers
    except LoraError:
        return []
    return sorted({width for layer in layers if (width := _width(layer))})


def _width(layer: Layer) -> int:
    if not layer.changes_weight:
        return 0
    if _INPUTS_TELL.fullmatch(layer.name):
        return layer.inputs
    return layer.outputs if _OUTPUTS_TELL.fullmatch(layer.name) else 0


def other_signs(file: LoraFile, spec: ModelSpec) -> list[str]:
    """What speaks against `spec` beside the shapes: the file's image keys and its base model version."""
    why, takes_images = [], "image_encoder" in spec.sources
    if file.has_image_keys and not takes_images:
        why.append(f"it has image keys (k_img, v_img), which only Wan 2.1 I2V has, not {spec.id}")
    if takes_images and file.has_text_keys and not file.has_image_keys:
        why.append(f"it has no image keys (k_img, v_img), which a LoRA trained on {spec.id} has")
    if file.base_version not in ("", spec.lora_base_version):
        why.append(f"its base model version is {file.base_version}, that of {spec.id} is {spec.lora_base_version}")
    return why


def fitting_models(file: LoraFile) -> list[str]:
    """The ids of the models that the file's width, blocks, image keys and base model version allow."""
    widths = widths_of(file)
    known = set(widths) <= {spec.hidden_size for spec in MODELS.values()}
    if not widths or not (known or file.base_version):
        return []
    # A width that no model has: the base model version may still tell the family.
    fits = [
        spec for spec in MODELS.values() if not known or (widths == [spec.hidden_size] and file.num_blocks <= spec.num_blocks)
    ]
    return [spec.id for spec in fits if not other_signs(file, spec)]


def looks_trained_for(file: LoraFile, but_not: str = "") -> str:
    """The ids of the models that the LoRA fits, in words, with the facts that tell. `but_not`: a model that it does not fit."""
    widths, facts = widths_of(file), []
    if widths:
        facts.append(f"hidden size {' and '.join(map(str, widths))}, {file.num_blocks} blocks")
    if file.has_image_keys:
        facts.append("image keys")
    if file.base_version:
        facts.append(f"base model {file.base_version}")
    models = (
        " or ".join(id for id in fitting_models(file) if id != but_not)
        or file.base_version
        or "a model this worker does not know"
    )
    return f"{models} ({', '.join(facts)})" if facts else models
