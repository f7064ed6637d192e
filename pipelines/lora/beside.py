"""LoRAs beside the layers, as the trainer samples where it cannot merge: on quantized weights, or with several multipliers.

A LoRA is computed in float32 from the layer's input cast to float32, times alpha / rank, times the multiplier, and is added to
the layer's output in the output's dtype. A LoKr is computed in the input's dtype. What an adapter of peft computes differs in
both the dtype and the order of the roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from pipelines.lora.arithmetic import Tensors, alpha_scale, load_tensors, part
from pipelines.lora.file import Adapter
from pipelines.lora.layers import Layer, Layers

Hook = Callable[[torch.nn.Module, Any, torch.Tensor], torch.Tensor]


class Beside:
    """What one transformer carries beside its layers; at most one LoRA."""

    def __init__(self, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of a LoRA's factors and its arithmetic."""
        self._transformer = transformer
        self._device = device
        self._dtype = dtype
        self._carried: Adapter | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def is_active(self) -> bool:
        return bool(self._hooks)

    def apply(self, wanted: tuple[Adapter, Layers] | None) -> None:
        """Carry exactly this LoRA, or none; what is carried already stays."""
        adapter = wanted[0] if wanted else None
        if adapter is not None and self._carried is not None and _same(adapter, self._carried):
            return
        self.drop()
        if wanted is None or wanted[0].scale == 0:  # the trainer skips it
            return
        tensors = load_tensors(wanted[0].file)
        for path, layer in wanted[1].items():
            hook = self._hook(layer, tensors, wanted[0].scale)
            self._hooks.append(self._transformer.get_submodule(path).register_forward_hook(hook))
        self._carried = adapter

    def drop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._carried = None

    def _hook(self, layer: Layer, tensors: Tensors, multiplier: float) -> Hook:
        scale = torch.tensor(alpha_scale(layer, tensors), device=self._device)
        if layer.kind == "lokr":
            return _lokr(layer, tensors, scale, multiplier, self._device)
        down, up = (part(layer, half, tensors).to(self._device, self._dtype) for half in "AB")
        strength = torch.tensor(multiplier, device=self._device, dtype=self._dtype)
        scale = scale.to(torch.float32)

        def hook(_module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            change = linear(linear(inputs[0].to(down.dtype), down), up) * scale * strength
            return output + change.to(output.dtype)

        return hook


def _same(one: Adapter, other: Adapter) -> bool:
    return (one.file, one.scale) == (other.file, other.scale)


def _lokr(layer: Layer, tensors: Tensors, scale: torch.Tensor, multiplier: float, device: torch.device) -> Hook:
    names = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]
    parts = {name: part(layer, name, tensors).to(device, torch.float32) for name in names if name in layer.keys}
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    # (w1 ⊗ w2) x, with x as a matrix: through the rows by w2, or by its two factors, then through the columns by w1.
    second = [parts["lokr_w2"]] if "lokr_w2" in parts else [parts["lokr_w2_b"], parts["lokr_w2_a"]]

    def hook(_module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        dtype = output.dtype
        rows = inputs[0].to(dtype).unflatten(-1, (first.shape[1], second[0].shape[1]))
        for factor in second:
            rows = torch.einsum("...ij,kj->...ik", rows, factor.to(dtype))
        change = torch.einsum("...ij,ki->...kj", rows, first.to(dtype) * scale).flatten(-2)
        return output + change * torch.tensor(multiplier, device=device, dtype=dtype)

    return hook
