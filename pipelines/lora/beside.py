"""LoRAs beside the layers, as the trainer samples where it cannot merge: on quantized weights, or with several multipliers.

A LoRA is computed in float32 from the layer's input cast to float32, times alpha / rank, times the multiplier, and is added to
the layer's output in the output's dtype. One of full rank has a single factor. A LoKr is computed in the input's dtype. What an
adapter of peft computes differs in both the dtype and the order of the roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from pipelines.errors import blamed_on
from pipelines.lora.arithmetic import Tensors, alpha_scale, load_tensors, lokr_factor, part
from pipelines.lora.file import LoraFile
from pipelines.lora.fit import Stack
from pipelines.lora.layers import LOKR_PARTS, Layer, Layers

Hook = Callable[[torch.nn.Module, Any, torch.Tensor], torch.Tensor]


class Beside:
    """What one transformer carries beside its layers: each LoRA adds to the output in its turn."""

    def __init__(self, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of a LoRA's factors and its arithmetic."""
        self._transformer = transformer
        self._device = device
        self._dtype = dtype
        self._carried: list[tuple[LoraFile, float, Layers]] = []
        self._hooks: list[RemovableHandle] = []

    @property
    def is_active(self) -> bool:
        return bool(self._hooks)

    def apply(self, wanted: Stack) -> None:
        """Carry exactly these LoRAs, in their order; what is carried already stays."""
        identity = [(adapter.file, adapter.scale, layers) for adapter, layers in wanted]
        if self._carried and self._carried == identity:
            return
        self.drop()
        for position, (adapter, layers) in enumerate(wanted):
            if adapter.scale == 0:  # the trainer skips it
                continue
            with blamed_on(position):
                tensors = load_tensors(adapter.file)
            for path, layer in layers.items():
                hook = self._hook(layer, tensors, adapter.scale)
                self._hooks.append(self._transformer.get_submodule(path).register_forward_hook(hook))
        self._carried = identity

    def drop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._carried = []

    def _hook(self, layer: Layer, tensors: Tensors, multiplier: float) -> Hook:
        scale = torch.tensor(alpha_scale(layer, tensors), device=self._device)
        if layer.kind == "lokr":
            return _lokr(layer, tensors, scale, multiplier, self._device)
        down, *up = (part(layer, half, tensors).to(self._device, self._dtype) for half in "AB" if half in layer.keys)
        strength = torch.tensor(multiplier, device=self._device, dtype=self._dtype)
        scale = scale.to(torch.float32)

        def hook(_module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            change = linear(inputs[0].to(down.dtype), down)
            change = (linear(change, up[0]) if up else change) * scale * strength
            return output + change.to(output.dtype)

        return hook


def _lokr(layer: Layer, tensors: Tensors, scale: torch.Tensor, multiplier: float, device: torch.device) -> Hook:
    parts = {name: part(layer, name, tensors).to(device, torch.float32) for name in LOKR_PARTS if name in layer.keys}
    first = lokr_factor(parts, "w1")
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
