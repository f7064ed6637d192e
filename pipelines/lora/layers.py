"""A LoRA file as changes to the layers of a transformer, read from its header alone. No torch in this file.

The worker and the tools read a file here, so that they come to one answer. `arithmetic` computes the changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.file import FILES_KEPT, Adapter, LoraFile
from pipelines.lora.header_config import HeaderConfig
from pipelines.lora.names import Side, is_of_first_transformer, is_of_text_encoder, parse

BIAS_PARTS = ("diff_b", "B.bias")
"""What changes a layer's bias."""
_LORA = {"A", "B", "alpha", "diff", "magnitude", *BIAS_PARTS}
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
"""A LoKr's two factors, each whole or as a product."""
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_PART_OF_A_LORA = re.compile(r"\.(lora|lokr|hada|oft|dora|boft|ia3|glora)_")


@dataclass(frozen=True)
class Layer:
    """The change of one layer: a LoRA or LoKr of its weight, or differences of its weight and its bias."""

    name: str
    """As diffusers names it."""
    kind: Literal["lora", "lokr", "full"]
    keys: Mapping[str, str]
    """Part (see `names.Name`) to the file's key."""
    shapes: Mapping[str, tuple[int, ...]]
    header_scale: float = 1.0
    """alpha / rank as the header's PEFT settings give it."""

    @property
    def outputs(self) -> int:
        if self.kind == "lokr":
            return self._factor("w1")[0] * self._factor("w2")[0]
        return self.shapes["B" if self.kind == "lora" else self.difference][0] if self.changes_weight else 0

    @property
    def inputs(self) -> int:
        """Inputs of a linear layer; for a convolution, times its kernel."""
        if self.kind == "lokr":
            return self._factor("w1")[1] * self._factor("w2")[1]
        return math.prod(self.shapes["A" if self.kind == "lora" else self.difference][1:]) if self.changes_weight else 0

    @property
    def rank(self) -> int | None:
        """None for whole factors and for differences."""
        if self.kind == "lora":
            return self.shapes["A"][0]
        return next((self.shapes[part][0] for part in ("lokr_w2_b", "lokr_w1_b") if part in self.shapes), None)

    @property
    def changes_weight(self) -> bool:
        return self.kind != "full" or self.difference in self.shapes

    @property
    def changes_bias(self) -> bool:
        return any(part in self.shapes for part in BIAS_PARTS)

    @property
    def uses_alpha(self) -> bool:
        """Whether the alpha matters: a LoKr whose factors are both whole has none, and ai-toolkit writes 9999999999."""
        return "alpha" in self.keys and self.rank is not None

    @property
    def difference(self) -> str:
        """The part with the difference of the weight: ai-toolkit's `fullrank` writes it as lora_A."""
        return "A" if "A" in self.shapes else "diff"

    def _factor(self, name: str) -> tuple[int, int]:
        whole = self.shapes.get(f"lokr_{name}")
        if whole:
            return whole[0], whole[1]
        return self.shapes[f"lokr_{name}_a"][0], self.shapes[f"lokr_{name}_b"][1]


Layers = Mapping[str, Layer]


@dataclass(frozen=True)
class Reading:
    """What a file changes."""

    sides: Mapping[Side | None, Layers]
    """By the side that the keys name: None in an ordinary file, `high` and `low` in one that holds both."""
    ignored: tuple[str, ...] = field(default=())
    """Keys that have no effect."""

    def layers(self, side: Side | None) -> Layers:
        """The layers for a side; those of an ordinary file are for whichever side it is sent as."""
        return self.sides.get(side, {}) if self.has_both_sides else self.sides[None]

    @property
    def has_both_sides(self) -> bool:
        return None not in self.sides

    @property
    def all_layers(self) -> list[Layer]:
        return [layer for layers in self.sides.values() for layer in layers.values()]


def reading_of(adapter: Adapter) -> Reading:
    """What is applied of an adapter's file. Raises what `read` raises."""
    return read(adapter.file, adapter.without)


@lru_cache(maxsize=FILES_KEPT)
def read(file: LoraFile, without: tuple[str, ...] = ()) -> Reading:
    """Read the layers of a file. The same file is read once; what is returned must not be changed.

    `without`: parts of the names of layers that are left out. Raises LoraInvalid for a file that contradicts itself,
    LoraIncompatible for a kind of file that cannot be applied.
    """
    parts: dict[Side | None, dict[str, dict[str, str]]] = {}
    ignored = []
    for key in file.shapes:
        name = parse(key)
        if name is None:
            if _PART_OF_A_LORA.search(key) and not is_of_text_encoder(key):
                raise LoraIncompatible(f"`{key}` is a part that no LoRA or LoKr for Wan has; export the LoRA without it")
            ignored.append(key)
            continue
        if any(part in name.layer for part in without):
            ignored.append(key)
            continue
        keys = parts.setdefault(name.side, {}).setdefault(name.layer, {})
        if name.part in keys:
            raise LoraInvalid(f"`{keys[name.part]}` and `{key}` are the same part of layer {name.layer}; export it again")
        keys[name.part] = key
    if not parts:
        raise LoraIncompatible(
            f"it has no lora_A and lora_B keys, only such as `{next(iter(file.shapes))}`; export it as a LoRA"
        )
    if parts.keys() == {None, "low"}:
        unnamed = [key for keys in parts[None].values() for key in keys.values()]
        if all(map(is_of_first_transformer, unnamed)):  # diffusers' names for the two
            parts = {"high": parts[None], "low": parts["low"]}
    if None in parts and len(parts) > 1:
        raise LoraInvalid("some of its keys name a side (as transformer_1, transformer_2) and others do not; export it again")
    config = HeaderConfig(file.metadata)
    sides = {side: {name: _layer(name, keys, file, config) for name, keys in layers.items()} for side, layers in parts.items()}
    return Reading(sides, tuple(ignored))


def _layer(name: str, keys: dict[str, str], file: LoraFile, config: HeaderConfig) -> Layer:
    shapes = {part: file.shapes[key] for part, key in keys.items()}
    for key in keys.values():
        if file.dtypes[key] not in _FLOATS and not key.endswith(".alpha"):
            raise LoraInvalid(f"its weights are stored as {file.dtypes[key]}; export the LoRA as float32, float16 or bfloat16")
    tensors = {part: shape for part, shape in shapes.items() if not part.endswith(".scale")}
    for part, kind in (("hada_", "LoHa"), ("oft_", "OFT")):
        if any(each.startswith(part) for each in tensors):
            raise LoraIncompatible(f"this is a {kind} file, which this worker does not apply; train a LoRA or a LoKr")
    _check_parts(name, tensors, keys)
    _check_scales(name, shapes, keys)
    if any(part.startswith("lokr_") for part in tensors):
        return Layer(name, "lokr", keys, shapes)
    if "B" not in tensors:
        return Layer(name, "full", keys, shapes)
    scale = config.scale_of(name, tensors["A"][0])
    if "alpha" in tensors and config.scales:
        raise LoraInvalid(f"layer {name} has an alpha both as a tensor and in the header; export the LoRA with one of them")
    return Layer(name, "lora", keys, shapes, scale)


def _check_parts(name: str, shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str]) -> None:
    """Raises LoraInvalid, LoraIncompatible when the parts are not those of a layer."""
    parts = set(shapes)
    if math.prod(shapes.get("alpha", ())) != 1:
        raise LoraInvalid(
            f"layer {name} has an alpha of {math.prod(shapes['alpha'])} numbers, where one belongs; export it again"
        )
    if any(part.startswith("lokr_") for part in parts):
        if more := parts - {*LOKR_PARTS, "alpha"}:
            raise LoraIncompatible(f"`{keys[min(more)]}` does not go with the LoKr factors of its layer; export it again")
        for factor in ("w1", "w2"):
            _check_factor(name, factor, shapes)
        return
    if more := parts - _LORA:
        raise LoraIncompatible(f"`{keys[min(more)]}` is a part that no LoRA for Wan has; export the LoRA without it")
    if "diff" in parts and "A" in parts:
        raise LoraInvalid(f"`{keys['diff']}` and `{keys['A']}` both change the weight of one layer; export it with one of them")
    if parts == {"alpha"}:
        raise LoraInvalid(
            f"`{keys['alpha']}` is the alpha of a layer that is not in the file; it is incomplete, export it again"
        )
    if "B" in parts:
        down, up = shapes.get("A", ()), shapes["B"]
        if len(down) < 2 or len(up) < 2:
            raise LoraInvalid(f"layer {name} lacks its lora_A; the file is incomplete, export it again")
        if down[0] != up[1]:
            raise LoraInvalid(f"layer {name} has rank {down[0]} in lora_A and {up[1]} in lora_B; export it again")
        if down[0] == 0:
            raise LoraInvalid(f"layer {name} has rank 0; the file is incomplete, export it again")
        if math.prod(up[2:]) != 1:
            raise LoraIncompatible(f"layer {name} has a lora_B with a kernel, which no LoRA for Wan has; export it again")
    elif "magnitude" in parts or "B.bias" in parts:
        raise LoraInvalid(f"layer {name} lacks lora_A and lora_B; the file is incomplete, export it again")


def _check_scales(name: str, shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str]) -> None:
    """Raises LoraInvalid for a scale of an fp8 tensor that is neither one number nor one for each row."""
    for part, shape in shapes.items():
        rows = shapes.get(part.removesuffix(".scale"), ())[:1]
        if part.endswith(".scale") and math.prod(shape) != 1 and not (math.prod(shape),) == shape[:1] == rows:
            text = f"`{keys[part]}` of layer {name} is neither one number nor one for each row; export the LoRA as bfloat16"
            raise LoraInvalid(text)


def _check_factor(name: str, factor: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    given = {part: shape for part, shape in shapes.items() if part.startswith(f"lokr_{factor}")}
    if given.keys() == {f"lokr_{factor}"} and len(given[f"lokr_{factor}"]) == 2:
        return
    left, right = given.get(f"lokr_{factor}_a", ()), given.get(f"lokr_{factor}_b", ())
    if not (len(given) == len(left) == len(right) == 2 and left[1] == right[0] > 0):
        raise LoraInvalid(
            f"layer {name} lacks its lokr_{factor}; the file is incomplete, or not for linear layers; export it again"
        )
