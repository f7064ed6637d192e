"""Compare a LoRA file with a transformer, before a weight is changed. No torch in this file.

The worker compares with the loaded transformer, the tools with the shapes of the catalog's models. The verdict and its words
are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Literal

from pipelines.catalog import LoraMode, ModelSpec
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.file import Adapter, LoraFile
from pipelines.lora.layers import BIAS_PARTS, Layer, Layers, Reading, read, reading_of
from pipelines.lora.names import Side
from pipelines.lora.origin import fitting_models, looks_trained_for

Shapes = Mapping[str, tuple[int, ...]]
"""The parameters of a transformer, by name."""

Carried = tuple[Adapter, Layers]
"""A LoRA, and what of it is for one transformer."""
Stack = tuple[Carried, ...]
"""What one transformer carries, in the order in which it is applied; () for nothing."""

_SIDE_IN_NAME = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)


def target(layer: str, parameters: Container[str]) -> str | None:
    """The parameter that a layer's weight is: `scale_shift_table` and its like are parameters themselves."""
    return next((name for name in (f"{layer}.weight", layer) if name in parameters), None)


def check(file: LoraFile, spec: ModelSpec, shapes: Shapes, without: tuple[str, ...] = ()) -> Reading:
    """Read the file and compare every layer with `shapes`. Raises LoraInvalid, LoraIncompatible.

    `without`: parts of the names of layers that are left out.
    """
    reading = read(file, without)
    if reading.has_both_sides and not spec.moe:
        raise LoraIncompatible(
            f"it holds a high and a low side (transformer_1, transformer_2), and {spec.id} has one transformer; "
            "send it to a worker of wan22_14b_t2v or wan22_14b_i2v"
        )
    layers = reading.all_layers
    for layer in layers:
        if layer.kind == "full" and "A" in layer.keys and _shape_of(layer.name, shapes) != layer.shapes["A"]:
            raise LoraInvalid(f"layer {layer.name} lacks its lora_B; the file is incomplete, export it again")
    misfits = [(layer, why) for layer in layers if (why := misfit(layer, shapes))]
    if misfits:
        layer, why = misfits[0]
        which = f"{len(misfits)} of its {len(layers)} layers do not fit {spec.id}: {layer.name} {why}"
        raise LoraIncompatible(f"{which}. {_where_it_belongs(file, spec)}")
    return reading


def misfit(layer: Layer, shapes: Shapes) -> str:
    """Why a layer does not fit, or ""."""
    there = _shape_of(layer.name, shapes)
    if there is None:
        return "is not in this model"
    if layer.kind == "full" and layer.changes_weight:
        difference = layer.shapes[layer.difference]
        if difference != there:
            return f"has the shape {list(difference)} in the LoRA and {list(there)} in this model"
    elif layer.changes_weight and (layer.outputs, layer.inputs) != (there[0], math.prod(there[1:])):
        inputs, outputs = math.prod(there[1:]), there[0]
        return f"has {layer.inputs} inputs and {layer.outputs} outputs in the LoRA, and {inputs} and {outputs} in this model"
    for part in (*BIAS_PARTS, "magnitude"):
        size = there[:1] if part == "magnitude" else shapes.get(f"{layer.name}.bias")
        if part in layer.shapes and size is None:
            return "has a bias in the LoRA and none in this model"
        if part in layer.shapes and math.prod(layer.shapes[part]) != math.prod(size or ()):
            return f"has a {part} of {math.prod(layer.shapes[part])} numbers for {math.prod(size or ())} outputs"
    return ""


def mode_for(reading: Reading, mode: LoraMode, shapes: Shapes, zeros: AbstractSet[str] = frozenset()) -> tuple[LoraMode, str]:
    """(how the file is applied, why it is merged although it was to be carried beside the weights, or "").

    `zeros`: keys whose values are all 0; differences that are zero need no merge. With `beside`, differences are merged and
    factors are not; see `split`.
    """
    if mode == "merge":
        return "merge", ""
    carried = ("lora", "lokr") if mode == "beside" else ("lora",)
    differences = ""
    for layer in reading.all_layers:
        if layer.kind == "full" and set(layer.keys.values()) <= zeros:
            continue
        if mode == "beside" and layer.kind == "full":
            if _is_difference(layer, shapes):
                differences = f"it has a difference of a weight or bias (layer {layer.name}), which is merged into the weights"
            continue
        bias = any(part in layer.keys and layer.keys[part] not in zeros for part in BIAS_PARTS)
        is_linear = len(_shape_of(layer.name, shapes) or ()) == 2
        if layer.kind not in carried or bias or "magnitude" in layer.keys or not is_linear:
            kind = {"lokr": "LoKr factors", "full": "a difference of a weight or bias"}
            what = kind.get(layer.kind, "a bias, magnitude or kernel")
            return (
                "merge",
                f"it has {what} (layer {layer.name}), which an adapter cannot carry, so it is merged into the weights",
            )
    return mode, differences


def _is_difference(layer: Layer, shapes: Shapes) -> bool:
    """Whether a layer adds to its weight or bias, and is no product that can lie beside a linear layer."""
    is_linear = len(_shape_of(layer.name, shapes) or ()) == 2
    return layer.kind == "full" and not (is_linear and set(layer.keys) - {"A.scale"} == {"A"})


def why_not_on_codes(reading: Reading, coded: Container[str], zeros: AbstractSet[str] = frozenset()) -> str:
    """Why a file cannot be applied to a model that keeps codes in place of the weights of the layers `coded`, or ""."""
    for layer in reading.all_layers:
        parts = {part for part, key in layer.keys.items() if key not in zeros}
        if layer.kind == "full" and layer.name in coded and "diff" in parts:
            return f"it has a difference of a weight (layer {layer.name})"
        if parts & {"magnitude", "B.bias"}:
            return f"it has a bias or magnitude beside its factors (layer {layer.name})"
    return ""


def split(stack: Stack, shapes: Shapes, zeros_of: Callable[[LoraFile], AbstractSet[str]]) -> tuple[Stack, Stack]:
    """(factors that lie beside linear layers, differences that are merged) of a stack, each with all of its LoRAs or ().

    `zeros_of`: the keys of a file whose values are all 0.
    """
    beside: list[Carried] = []
    merged: list[Carried] = []
    for adapter, layers in stack:
        factors: dict[str, Layer] = {}
        rest: dict[str, Layer] = {}
        for path, layer in layers.items():
            if _is_difference(layer, shapes) or len(_shape_of(layer.name, shapes) or ()) != 2:
                rest[path] = layer
                continue
            factors[path] = _of_parts(layer, layer.kind, layer.keys.keys() - {"diff_b"})
            if "diff_b" in layer.keys:
                rest[path] = _of_parts(layer, "full", {"diff_b"})
        zeros = zeros_of(adapter.file)
        beside.append((adapter, factors))
        merged.append((adapter, {path: layer for path, layer in rest.items() if not set(layer.keys.values()) <= zeros}))
    return tuple(beside), tuple(merged) if any(layers for _, layers in merged) else ()


def _of_parts(layer: Layer, kind: Literal["lora", "lokr", "full"], parts: AbstractSet[str]) -> Layer:
    keys = {part: key for part, key in layer.keys.items() if part in parts or part.removesuffix(".scale") in parts}
    return replace(layer, kind=kind, keys=keys, shapes={part: layer.shapes[part] for part in keys})


def check_side(adapter: Adapter, reading: Reading) -> None:
    """An extra LoRA goes to the sides that it is sent for alone. Raises LoraIncompatible where it has nothing for them."""
    if adapter.is_extra and not _sides_of_extra(adapter, reading):
        theirs = next(iter(reading.sides))
        raise LoraIncompatible(f'its keys name only the {theirs} side; send it with "transformer": "{theirs}" or "both"')


def hints(adapter: Adapter, spec: ModelSpec, reading: Reading) -> list[str]:
    """What a careful operator would tell the user about a file that fits."""
    file, texts = adapter.file, []
    if reading.ignored:
        texts.append(f"{len(reading.ignored)} keys of the LoRA have no effect here, such as `{reading.ignored[0]}`")
    if file.base_version and file.base_version != spec.lora_base_version:
        texts.append(f"the LoRA looks trained for {looks_trained_for(file)}; its shapes fit {spec.id}, so it was applied")
    elif "image_encoder" in spec.sources and file.has_text_keys and not file.has_image_keys:
        texts.append("the LoRA has no image keys, so it looks trained for a text-to-video model; it was applied")
    if reading.has_both_sides:
        both = len(reading.sides) == 2
        if both and adapter.is_extra and adapter.side != "both":
            said = f'only the {adapter.side} side of the file was applied; to apply both, send it with "transformer": "both"'
        elif both:
            said = "the file holds the high and the low side; each was applied to its own"
        else:
            said = f"the keys of the file name the {next(iter(reading.sides))} side, so it was applied to that side alone"
        texts.append(said)
    elif adapter.side and (named := side_in_name(adapter.name)) and named != adapter.side:
        sent = "for both sides" if adapter.side == "both" else f"as the {adapter.side} side"
        texts.append(f"the file is named `{adapter.name}`, but was sent {sent}")
    return texts


def side_in_name(name: str) -> Side | None:
    """The side that a file's name tells, such as `high` for `my_HIGH-noise.safetensors`; None for neither or both."""
    found = {match.lower() for match in _SIDE_IN_NAME.findall(name)}
    return next(iter(found)) if len(found) == 1 else None


def by_transformer(adapters: Sequence[Adapter]) -> dict[str, Stack]:
    """What each transformer is to carry: its LoRA of `loras`, then the extra ones in their order.

    A file of `loras` that holds both sides is applied to both, but where the other has its own. An extra one goes to the sides
    that it was sent for. Raises what `read` raises.
    """
    sent = {adapter.side for adapter in adapters if not adapter.is_extra}
    wanted: dict[str, Stack] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.is_extra):
        reading = reading_of(adapter)
        if adapter.is_extra:
            for name, layers in _sides_of_extra(adapter, reading).items():
                wanted[name] = (*wanted.get(name, ()), (adapter, layers))
            continue
        sides = [adapter.side]
        if reading.has_both_sides:
            sides += [side for side in reading.sides if side not in sent]
        for side in sides:
            wanted[_transformer_of(side)] = ((adapter, reading.layers(_one_side(side))),)
    return wanted


def products_of(stack: Stack) -> Stack:
    """The layers that are products of factors, which an adapter carries."""
    kept = [(adapter, {path: layer for path, layer in layers.items() if layer.kind == "lora"}) for adapter, layers in stack]
    return tuple((adapter, layers) for adapter, layers in kept if layers)


def _sides_of_extra(adapter: Adapter, reading: Reading) -> dict[str, Layers]:
    """What of an extra LoRA is for which transformer."""
    sides: list[Side | None] = ["high", "low"] if adapter.side == "both" else [_one_side(adapter.side)]
    return {_transformer_of(side): layers for side in sides if (layers := reading.layers(side))}


def _transformer_of(side: str | None) -> str:
    return "transformer_2" if side == "low" else "transformer"


def _one_side(side: str | None) -> Side | None:
    assert side != "both"
    return side  # type: ignore[return-value]


def _shape_of(layer: str, shapes: Shapes) -> tuple[int, ...] | None:
    name = target(layer, shapes)
    return shapes[name] if name else None


def _where_it_belongs(file: LoraFile, spec: ModelSpec) -> str:
    if not [id for id in fitting_models(file) if id != spec.id]:
        return "It is not a LoRA for Wan, or its format is not known here; train it with ai-toolkit, or convert it"
    return f"It looks trained for {looks_trained_for(file, but_not=spec.id)}; send it to a worker of that model"
