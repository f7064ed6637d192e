"""Compare a LoRA file with the loaded transformer, by keys, shapes and values, before a weight is changed."""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from safetensors.torch import load_file

from pipelines.catalog import LoraMode, ModelSpec
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.file import Adapter, LoraFile, transformer_of
from pipelines.lora.layers import MERGE_INSTEAD, Layer, LayerReader, check_adapter_keys
from pipelines.lora.origin import looks_trained_for

_KEPT = 1000
"""Files whose values are not read again."""


class LoraCheck:
    """Create it before any LoRA is loaded: it notes the shape of every linear layer of the plain transformers.

    Several threads may use it.
    """

    def __init__(self, spec: ModelSpec, reader: LayerReader) -> None:
        self._spec = spec
        self._reader = reader
        self._linears = {name: _linear_shapes(getattr(reader.pipe, name)) for name in spec.transformers}
        self._has_effect = lru_cache(maxsize=_KEPT)(lambda file: _has_effect(file, reader.read(file)[0]))

    def check(self, adapter: Adapter, mode: LoraMode) -> list[str]:
        """Compare the file with the transformer it is for, by keys, shapes and values.

        Returns warnings: keys that have no effect, signs that the LoRA belongs to another model or side, a LoRA that does
        nothing. Raises LoraIncompatible, LoraInvalid.
        """
        file = adapter.file
        layers, dropped = self._reader.read(file)
        if mode == "adapter" and any(layer.kind == "lokr" for layer in layers.values()):
            raise LoraIncompatible(f"this is a LoKr file, which can be merged but not loaded as an adapter; {MERGE_INSTEAD}")
        self._check_fit(file, layers, self._linears[transformer_of(adapter.side)])
        if mode == "adapter":
            check_adapter_keys(file, self._reader.pipe)
        return [*self._hints(adapter, dropped), *self._effect_warnings(adapter)]

    def _check_fit(self, file: LoraFile, layers: dict[str, Layer], linears: dict[str, tuple[int, int]]) -> None:
        misfits = [name for name, layer in layers.items() if linears.get(name) != (layer.inputs, layer.outputs)]
        if not misfits:
            return
        first = misfits[0]
        there = "is not in this model"
        if first in linears:
            there = "has {} inputs and {} outputs in this model".format(*linears[first])
        raise LoraIncompatible(
            f"{len(misfits)} of its {len(layers)} layers do not fit {self._spec.id}: {first} ({layers[first].inputs} inputs, "
            f"{layers[first].outputs} outputs in the LoRA) {there}. It looks trained for "
            f"{looks_trained_for(file, but_not=self._spec.id)}; send it to a worker of that model"
        )

    def _hints(self, adapter: Adapter, dropped: list[str]) -> list[str]:
        """What a careful operator would tell the user about a file that fits."""
        file, hints = adapter.file, []
        if dropped:
            hints.append(f"{len(dropped)} keys of the LoRA have no effect here, such as `{dropped[0]}`")
        if file.base_version and file.base_version != self._spec.lora_base_version:
            hints.append(
                f"the LoRA looks trained for {looks_trained_for(file)}; its shapes fit {self._spec.id}, so it was applied"
            )
        elif "image_encoder" in self._spec.sources and file.has_text_keys and not file.has_image_keys:
            hints.append("the LoRA has no image keys, so it looks trained for a text-to-video model; it was applied")
        for side in ("high", "low"):
            if adapter.side and side != adapter.side and file.path.stem.endswith(f"_{side}_noise"):
                hints.append(f"the file is named `{file.path.name}`, but was sent as the {adapter.side} side")
        return hints

    def _effect_warnings(self, adapter: Adapter) -> list[str]:
        """Whether the LoRA does anything. Raises LoraInvalid for values that are not finite numbers."""
        if not self._has_effect(adapter.file):
            return ["the LoRA has no effect: a factor of every layer is all 0, as before the first training step"]
        return ["the LoRA has no effect: its network_multiplier is 0"] if adapter.scale == 0 else []


def _linear_shapes(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _has_effect(file: LoraFile, layers: dict[str, Layer]) -> bool:
    """Whether any layer's product can differ from 0. Raises LoraInvalid for NaN, infinity and dtypes that are no floats."""
    if strange := {dtype for dtype in file.dtypes.values() if not re.fullmatch("F64|F32|F16|BF16", dtype)}:
        raise LoraInvalid(f"its weights are stored as {min(strange)}; export the LoRA as float32, float16 or bfloat16")
    zeros, alphas = set(), {layer.keys.get("alpha") for layer in layers.values()}
    for key, tensor in load_file(file.path).items():
        in_use = tensor.float() if tensor.dtype == torch.float64 else tensor  # 1e300 is infinite in every dtype of a model
        if not in_use.isfinite().all():
            raise LoraInvalid(f"`{key}` contains NaN or infinity; the training run diverged, use an earlier save")
        if key in alphas and tensor < 0:  # diffusers would double one factor until it exceeds the other, which it never does
            raise LoraInvalid(f"`{key}` is negative; give it a positive alpha, and negate the LoRA by network_multiplier")
        if not tensor.any():
            zeros.add(key)
    return any(zeros.isdisjoint(layer.keys.values()) for layer in layers.values())
