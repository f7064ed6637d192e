"""Which model a LoRA was trained for, by its header: the one answer for the worker and the tools. No torch in this file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipelines.catalog import MODELS, ModelSpec
from pipelines.lora.file import LoraFile

_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_(?:A|B|down|up)|lokr_\w+)(?:\.\w+)*$")
_BLOCK_LAYER = re.compile(r"blocks[._]\d+[._](.+)$")
_ATTENTION = re.compile(r"self\.attn\.|cross\.attn\.|attn[12]\.")


@dataclass(frozen=True)
class HeaderLayer:
    """One adapted linear layer under the file's own name. A size is 0 where the header does not tell it."""

    name: str
    inputs: int
    outputs: int
    rank: int | None
    """None for a LoKr whose factors are whole."""

    @property
    def width(self) -> int | None:
        """The transformer's width, where this layer tells it."""
        match = _BLOCK_LAYER.search(self.name)
        role = re.sub(r"\W|_", ".", match[1]) if match else ""
        if _ATTENTION.match(role) or role in ("ffn.0", "ffn.net.0.proj"):
            return self.inputs or None
        return (self.outputs or None) if role in ("ffn.2", "ffn.net.2") else None


def header_layers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[HeaderLayer]:
    """The layers that the file's keys name."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if match := _PART.match(key):
            parts.setdefault(match["layer"], {})[match["part"].removeprefix("lora_").removeprefix("lokr_")] = shape
    for name, shape_of in parts.items():
        down = shape_of.get("A", shape_of.get("down"))
        up = shape_of.get("B", shape_of.get("up"))
        if down or up:
            rank = down[0] if down else up[1] if up and len(up) > 1 else None
            yield HeaderLayer(name, down[1] if down and len(down) > 1 else 0, up[0] if up else 0, rank)
        else:
            yield _lokr_layer(name, shape_of)


def _lokr_layer(name: str, shape_of: Mapping[str, tuple[int, ...]]) -> HeaderLayer:
    """A Kronecker product: the sizes of the two factors multiply."""
    inputs = outputs = 1
    rank = None
    for factor in ("w1", "w2"):
        left, right = shape_of.get(f"{factor}_a", ()), shape_of.get(f"{factor}_b", ())
        whole = shape_of.get(factor, ())
        if len(whole) != 2 and len(left) == len(right) == 2:
            whole, rank = (left[0], right[1]), right[0]
        outputs, inputs = (outputs * whole[0], inputs * whole[1]) if len(whole) == 2 else (0, 0)
    return HeaderLayer(name, inputs, outputs, rank)


def widths_of(file: LoraFile) -> list[int]:
    """The widths of transformers that the file's layers tell. One for a LoRA of one model."""
    return sorted({width for layer in header_layers(file.shapes) if (width := layer.width)})


def misfits(file: LoraFile, spec: ModelSpec) -> list[str]:
    """Why the LoRA was not trained on `spec`; empty when nothing speaks against it."""
    widths, why = widths_of(file), []
    if not widths:
        why.append("it has no attention or feed-forward layers of transformer blocks, by which a model is known")
    elif widths != [spec.hidden_size]:
        why.append(f"its layers are {' and '.join(map(str, widths))} wide, those of {spec.id} {spec.hidden_size}")
    if file.num_blocks > spec.num_blocks:
        why.append(f"it has layers up to block {file.num_blocks - 1}, and {spec.id} has the blocks 0 to {spec.num_blocks - 1}")
    return why + _other_signs(file, spec)


def _other_signs(file: LoraFile, spec: ModelSpec) -> list[str]:
    """What speaks against `spec` beside the sizes."""
    why, takes_images = [], "image_encoder" in spec.sources
    if file.has_image_keys and not takes_images:
        why.append(f"it has image keys (k_img, v_img), which only Wan 2.1 I2V has, not {spec.id}")
    if takes_images and file.has_text_keys and not file.has_image_keys:
        why.append(f"it has no image keys (k_img, v_img), which a LoRA trained on {spec.id} has")
    if file.base_version not in ("", spec.lora_base_version):
        why.append(f"its base model version is {file.base_version}, that of {spec.id} is {spec.lora_base_version}")
    return why


def looks_trained_for(file: LoraFile, but_not: str = "") -> str:
    """The ids of the models that the LoRA fits, in words, with the facts that tell. `but_not`: a model that it does not fit."""
    widths = widths_of(file)
    if set(widths) <= {spec.hidden_size for spec in MODELS.values()}:
        fitting = [spec.id for spec in MODELS.values() if not misfits(file, spec)]
    else:  # of a model that the catalog does not have; its base model version may still tell the family
        fitting = [spec.id for spec in MODELS.values() if file.base_version and not _other_signs(file, spec)]
    facts = []
    if widths:
        facts.append(f"hidden size {' and '.join(map(str, widths))}, {file.num_blocks} blocks")
    if file.has_image_keys:
        facts.append("image keys")
    if file.base_version:
        facts.append(f"base model {file.base_version}")
    models = " or ".join(id for id in fitting if id != but_not) or file.base_version or "a model this worker does not know"
    return f"{models} ({', '.join(facts)})" if facts else models
