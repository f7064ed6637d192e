"""A LoRA file's layers under the transformer's own names, and what each adds to a weight.

Names are converted by diffusers' own code, on small stand-ins for the tensors, so that what is checked is what would be loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora_file import LoraFile


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


def read_layers(file: LoraFile, pipe: Any, model_id: str) -> tuple[dict[str, Layer], list[str]]:
    """({layer of the transformer: Layer}, keys that have no effect). Reads nothing but the header that is in `file`.

    Raises LoraIncompatible, LoraInvalid; the texts name `model_id`.
    """
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
        raise LoraIncompatible(f"it has no lora_A and lora_B keys; it looks trained for {file.looks_trained_for()}")
    with_bias = [layer for layer, parts in halves.items() if "B.bias" in parts]
    if with_bias:
        raise LoraIncompatible(
            f"{len(with_bias)} of its {len(halves)} layers, such as {with_bias[0]}, have a bias; train without"
        )
    return {layer: _lora_layer(layer, parts, file) for layer, parts in halves.items()}, dropped


def _lora_layer(layer: str, parts: dict[str, str], file: LoraFile) -> Layer:
    shapes = {part: file.shapes[key] for part, key in parts.items()}
    if any(len(shapes.get(part, ())) != 2 for part in "AB"):
        raise LoraInvalid(f"layer {layer} lacks one of lora_A and lora_B; the file is incomplete")
    if shapes["A"][0] != shapes["B"][1]:
        raise LoraInvalid(f"layer {layer} has rank {shapes['A'][0]} in lora_A and {shapes['B'][1]} in lora_B")
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
        (out1, in1), (out2, in2) = (_factor_shape(layer, shapes, factor) for factor in ("w1", "w2"))
        layers[name_of[layer]] = Layer("lokr", in1 * in2, out1 * out2, keys)
    used = {key for keys in parts.values() for key in keys.values()}
    return layers, [key for key in file.shapes if key not in used]


def _factor_shape(layer: str, shapes: Mapping[str, tuple[int, ...]], factor: str) -> tuple[int, int]:
    whole = shapes.get(factor, ())
    left, right = shapes.get(f"{factor}_a", ()), shapes.get(f"{factor}_b", ())
    if len(whole) == 2:
        return whole[0], whole[1]
    if len(left) == len(right) == 2 and left[1] == right[0]:
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
            f"it looks trained for {file.looks_trained_for()}"
        ) from error
    names = {name.removeprefix("transformer."): keys[int(tensor)] for name, tensor in converted.items()}
    kept = set(names.values())
    return names, [key for key in keys if key not in kept]


def _strangest(keys: Iterable[str]) -> str:
    """The key that looks least like one of a Wan LoRA, to show to the user."""
    usual = re.compile(r"(diffusion_model\.|transformer\.|lora_unet_)blocks[._]\d+[._].*(\.lo\w+(\.weight)?|\.alpha|\.diff_b)")
    keys = list(keys)
    return next((key for key in keys if not usual.fullmatch(key)), keys[0])


def _unsupported_kind(keys: Iterable[str]) -> str:
    keys = list(keys)
    for mark, kind in ((".hada_", "LoHa"), (".oft_", "OFT"), ("dora_scale", "DoRA")):
        if any(mark in key for key in keys):
            return f"a {kind} file"
    if any(re.search(r"blocks[._]\d{4}", key) for key in keys):  # the conversion counts through all numbers in between
        return "a file with block numbers beyond 999, which no Wan model has"
    if any("transformer_1.blocks." in key for key in keys):
        return "a file that holds the high and the low side together; split it and send each side as its own item"
    return ""
