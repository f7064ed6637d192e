"""A LoRA file's layers under the transformer's own names, and what each adds to a weight.

Names are converted by diffusers' own code, on small stand-ins for the tensors, so that what is checked is what would be loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch

from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.file import LoraFile
from pipelines.lora.origin import looks_trained_for

_STRANGE_BLOCK = re.compile(r".{16}blocks\.(?!\d{1,3}\.)", re.ASCII)
"""Behind the 16 characters of `diffusion_model.`, which the conversion cuts off every key, a number that is not up to 999.

It reads them with `int`, which also takes `-9` and `9_999`, and counts from the lowest to the highest.
"""

MERGE_INSTEAD = "set `match` to preview, or start the worker with LORA_MODE=merge"

_LOKR_PARTS = {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "alpha"}


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer: `weight [outputs, inputs] += scale * delta`."""

    kind: Literal["lora", "lokr"]
    inputs: int
    outputs: int
    keys: Mapping[str, str]
    """Part (`A`, `B`, `alpha`, or `w1`, `w2_a`, …) to the file's key."""

    def delta(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """What the layer adds at scale 1, float32 [outputs, inputs] on `device`.

        The trainer's arithmetic: factors in float32, then times alpha / rank, which is 1 when there is no alpha.
        """
        parts = {part: tensors[key].to(device, torch.float32) for part, key in self.keys.items()}
        if self.kind == "lora":
            product, rank = parts["B"] @ parts["A"], parts["A"].shape[0]
            return product * (parts["alpha"] / rank) if "alpha" in parts else product
        return torch.kron(_factor(parts, "w1"), _factor(parts, "w2")) * _lokr_scale(parts)


Layers = tuple[dict[str, Layer], list[str]]
"""({layer of the transformer: Layer}, keys that have no effect)."""
_KEPT = 64


class LayerReader:
    """Reads LoRA files as layers of one pipeline's transformers. Several threads may use it."""

    def __init__(self, pipe: Any, model_id: str) -> None:
        """`model_id`: the model that errors name."""
        self.pipe = pipe
        self._read = lru_cache(maxsize=_KEPT)(partial(_read_layers, pipe=pipe, model_id=model_id))

    def read(self, file: LoraFile) -> Layers:
        """The layers of `file`, from its header alone. They are shared and must not be changed.

        Raises LoraIncompatible, LoraInvalid.
        """
        return self._read(file)


def _read_layers(file: LoraFile, pipe: Any, model_id: str) -> Layers:
    if strange := _unsupported_kind(file.shapes):
        raise LoraIncompatible(f"this is {strange}; {model_id} takes LoRA files (lora_A and lora_B keys)")
    if any(".lokr_" in key for key in file.shapes):
        return _lokr_layers(file, pipe, model_id)
    converted, dropped = _convert(file.shapes, file, pipe, model_id)
    halves: dict[str, dict[str, str]] = {}
    for name, key in converted.items():
        layer, _, half = name.rpartition(".lora_")
        if layer:
            halves.setdefault(layer, {})[half.removesuffix(".weight")] = key
    if not halves:
        raise LoraIncompatible(f"it has no lora_A and lora_B keys; it looks trained for {looks_trained_for(file)}")
    with_bias = [layer for layer, parts in halves.items() if "B.bias" in parts]
    if with_bias:
        raise LoraIncompatible(
            f"{len(with_bias)} of its {len(halves)} layers, such as {with_bias[0]}, have a bias; train without"
        )
    layers = {layer: _lora_layer(layer, parts, file) for layer, parts in halves.items()}
    used = {key for layer in layers.values() for key in layer.keys.values()}
    if lone := [key for key in file.shapes if key.endswith(".alpha") and key not in used]:
        raise LoraInvalid(f"`{lone[0]}` is the alpha of a layer that is not in the file; it is incomplete")
    return layers, dropped


def _lora_layer(layer: str, parts: dict[str, str], file: LoraFile) -> Layer:
    shapes = {part: file.shapes[key] for part, key in parts.items()}
    if any(len(shapes.get(part, ())) != 2 for part in "AB"):
        raise LoraInvalid(f"layer {layer} lacks one of lora_A and lora_B; the file is incomplete")
    if more := shapes.keys() - set("AB"):
        raise LoraIncompatible(f"layer {layer} has a lora_{min(more)} beside lora_A and lora_B, which no LoRA for Wan has")
    if shapes["A"][0] != shapes["B"][1]:
        raise LoraInvalid(f"layer {layer} has rank {shapes['A'][0]} in lora_A and {shapes['B'][1]} in lora_B")
    if shapes["A"][0] == 0:
        raise LoraInvalid(f"layer {layer} has rank 0; the file is incomplete")
    alpha = re.split(r"\.lora_", parts["A"])[0] + ".alpha"
    if alpha in file.shapes:
        _check_alpha(layer, file.shapes[alpha])
        parts = parts | {"alpha": alpha}
    return Layer("lora", shapes["A"][1], shapes["B"][0], parts)


def _check_alpha(layer: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) != 1:
        raise LoraInvalid(f"layer {layer} has an alpha of {math.prod(shape)} numbers, where one belongs")


def _lokr_layers(file: LoraFile, pipe: Any, model_id: str) -> tuple[dict[str, Layer], list[str]]:
    parts: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        layer, _, part = key.rpartition(".")
        if part == "alpha" or part.startswith("lokr_"):
            parts.setdefault(layer, {})[part.removeprefix("lokr_")] = key
    # diffusers only converts names of LoRA keys, so each layer goes through it as one.
    as_lora = {f"{layer}.lora_{half}.weight": (1, 1) for layer in parts for half in "AB"}
    converted, _ = _convert(as_lora, file, pipe, model_id)
    name_of = {key.removesuffix(".lora_A.weight"): name.removesuffix(".lora_A.weight") for name, key in converted.items()}
    layers = {}
    for layer, keys in parts.items():
        shapes = {part: file.shapes[key] for part, key in keys.items()}
        _check_alpha(layer, shapes.get("alpha", ()))
        if more := shapes.keys() - _LOKR_PARTS:
            raise LoraIncompatible(f"layer {layer} has a lokr_{min(more)}, which no LoKr for Wan has")
        (out1, in1), (out2, in2) = (_factor_shape(layer, shapes, factor) for factor in ("w1", "w2"))
        if layer in name_of:
            layers[name_of[layer]] = Layer("lokr", in1 * in2, out1 * out2, keys)
    used = {key for layer in layers.values() for key in layer.keys.values()}
    return layers, [key for key in file.shapes if key not in used]


def _factor_shape(layer: str, shapes: Mapping[str, tuple[int, ...]], factor: str) -> tuple[int, int]:
    given = {part: shape for part, shape in shapes.items() if part.startswith(factor)}
    if given.keys() == {factor} and len(given[factor]) == 2:
        return given[factor][0], given[factor][1]
    left, right = given.get(f"{factor}_a", ()), given.get(f"{factor}_b", ())
    if len(given) == len(left) == len(right) == 2 and left[1] == right[0] > 0:
        return left[0], right[1]
    raise LoraInvalid(f"layer {layer} lacks its lokr_{factor}; the file is incomplete, or not for linear layers")


def _factor(parts: Mapping[str, torch.Tensor], factor: str) -> torch.Tensor:
    return parts[factor] if factor in parts else parts[f"{factor}_a"] @ parts[f"{factor}_b"]


def _lokr_scale(parts: Mapping[str, torch.Tensor]) -> float:
    """alpha / rank, but 1 where both factors are whole and there is no rank."""
    ranks = [parts[f"{factor}_b"].shape[0] for factor in ("w1", "w2") if f"{factor}_b" in parts]
    return float(parts["alpha"]) / ranks[0] if ranks and "alpha" in parts else 1.0


def _convert(
    shapes: Mapping[str, tuple[int, ...]], file: LoraFile, pipe: Any, model_id: str
) -> tuple[dict[str, str], list[str]]:
    """({name in the transformer: key in the file}, keys that the conversion drops).

    Each tensor goes in as its own number and is known by it when it comes out. Alphas stay behind, since the conversion
    multiplies them into the weights; only the `lora_unet_` format insists on them, and alpha 1 at rank 1 changes nothing.
    """
    keys = [key for key in shapes if not key.endswith(".alpha")]
    numbered = {key: torch.full((1, 1), float(number)) for number, key in enumerate(keys)}
    alphas = {f"{key.partition('.')[0]}.alpha": torch.ones(()) for key in keys if key.startswith("lora_unet_")}
    try:
        converted = pipe.lora_state_dict(numbered | alphas)
    except (ValueError, KeyError, IndexError) as error:
        raise LoraIncompatible(
            f"its keys, such as `{_strangest(file.shapes)}`, are not those of a LoRA for {model_id}; "
            f"it looks trained for {looks_trained_for(file)}"
        ) from error
    names = {name.removeprefix("transformer."): keys[int(tensor)] for name, tensor in converted.items()}
    kept = set(names.values())
    return names, [key for key in keys if key not in kept]


def check_adapter_keys(file: LoraFile, pipe: Any) -> None:
    """Raises LoraIncompatible for keys that can be merged, but that diffusers does not load as an adapter."""
    stand_ins = {key: torch.ones(()) if key.endswith(".alpha") else torch.ones(1, 1) for key in file.shapes}
    try:
        names = list(pipe.lora_state_dict(stand_ins))
    except (ValueError, KeyError, IndexError):
        names = []
    if not names or not all(name.startswith("transformer.") and "lora" in name for name in names):
        raise LoraIncompatible(
            f"its keys, such as `{_strangest(file.shapes)}`, can be merged but not loaded as an adapter; {MERGE_INSTEAD}"
        )


def _strangest(keys: Iterable[str]) -> str:
    """The key that looks least like one of a Wan LoRA, to show to the user."""
    usual = re.compile(r"(diffusion_model\.|transformer\.|lora_unet_)blocks[._]\d+[._].*(\.lo\w+(\.weight)?|\.alpha|\.diff_b)")
    keys = list(keys)
    return next((key for key in keys if not usual.fullmatch(key)), keys[0])


def _unsupported_kind(keys: Iterable[str]) -> str:
    keys = list(keys)
    for mark, kind in ((".hada_", "LoHa"), (".oft_", "OFT"), ("dora_scale", "DoRA"), ("lora_magnitude_vector", "DoRA")):
        if any(mark in key for key in keys):
            return f"a {kind} file"
    if any(_STRANGE_BLOCK.match(key) for key in keys):
        return "a file with block numbers that no Wan model has"
    if any("transformer_1.blocks." in key for key in keys):
        return "a file that holds the high and the low side together; split it and send each side as its own item"
    return ""
