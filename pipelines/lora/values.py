"""The values of a LoRA file: whether they are numbers, and which of them change nothing."""

from __future__ import annotations

from functools import lru_cache

import torch

from pipelines.errors import LoraInvalid
from pipelines.lora.arithmetic import load_tensors
from pipelines.lora.file import FILES_KEPT, LoraFile
from pipelines.lora.layers import BIAS_PARTS, Layer, read


@lru_cache(maxsize=FILES_KEPT)
def zero_keys(file: LoraFile) -> frozenset[str]:
    """The keys whose tensors are all 0. Raises LoraInvalid for values that are used and are not finite numbers."""
    tensors, zeros = load_tensors(file), set()
    for layer in read(file).all_layers:
        for part, key in layer.keys.items():
            if part == "alpha" and not layer.uses_alpha:
                continue
            tensor = tensors[key]
            in_use = tensor.float() if tensor.dtype == torch.float64 or tensor.dtype.itemsize == 1 else tensor
            if not in_use.isfinite().all():  # 1e300 is infinite in every dtype of a model
                raise LoraInvalid(f"`{key}` contains NaN or infinity; the training run diverged, use an earlier save")
            if part == "alpha" and in_use < 0:
                raise LoraInvalid(f"`{key}` is negative; give it a positive alpha, and negate the LoRA by network_multiplier")
            if not in_use.any():
                zeros.add(key)
    return frozenset(zeros)


def has_effect(file: LoraFile) -> bool:
    """Whether any layer's change can differ from 0. Raises LoraInvalid, as `zero_keys` does."""
    zeros = zero_keys(file)
    return any(_can_change(layer, zeros) for layer in read(file).all_layers)


def _can_change(layer: Layer, zeros: frozenset[str]) -> bool:
    bias = {layer.keys[part] for part in BIAS_PARTS if part in layer.keys}
    weight = {key for part, key in layer.keys.items() if part not in BIAS_PARTS}
    return bool(bias - zeros) or "magnitude" in layer.keys or bool(weight and zeros.isdisjoint(weight))
