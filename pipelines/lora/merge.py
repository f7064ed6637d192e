"""LoRAs added into the weights, as the trainer does for its samples, and taken out again to the bit.

The product of a LoRA's factors is computed in float32, added to the float32 value of the weight, and stored in the weight's
own dtype. Subtracting it again would leave rounding behind, so a weight is restored from the checkpoint's file, and every merge
starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipelines.lora.arithmetic import change_bias, change_weight, load_tensors
from pipelines.lora.file import Adapter
from pipelines.lora.fit import target
from pipelines.lora.layers import Layers
from pipelines.pristine import CheckpointFile


class Merges:
    """The merged LoRAs of one pipeline, by transformer; at most one each."""

    def __init__(self, pipe: Any, files: Mapping[str, CheckpointFile], device: torch.device) -> None:
        """`files`: the weights of each transformer. `device` computes the merges, wherever the weights wait."""
        self._pipe = pipe
        self._device = device
        self._files = files
        self._merged: dict[str, Adapter] = {}
        self._changed: dict[str, set[str]] = {name: set() for name in self._files}
        """Parameters whose values are not, or may not be, what the file says."""

    @torch.no_grad()
    def apply(self, name: str, wanted: tuple[Adapter, Layers] | None) -> None:
        """Make the weights of the transformer `name` carry exactly this LoRA, or none; what is merged already stays.

        After an exception weights may be half merged: call `take_out` then.
        """
        before = self._merged.get(name)
        if wanted and before and (before.file, before.scale) == (wanted[0].file, wanted[0].scale):
            return
        self._merged.pop(name, None)
        if wanted is None:
            self._restore(name, self._changed[name])
        else:
            self._merge(name, *wanted)
            self._merged[name] = wanted[0]

    @property
    def are_active(self) -> bool:
        return bool(self._merged)

    @torch.no_grad()
    def take_out_all(self) -> None:
        """Restore every weight, whatever state it is in."""
        self._merged.clear()
        for name, changed in self._changed.items():
            self._restore(name, changed)

    def _merge(self, name: str, adapter: Adapter, layers: Layers) -> None:
        tensors, parameters = load_tensors(adapter.file), dict(getattr(self._pipe, name).named_parameters())
        changes = {}
        for path, layer in layers.items():
            if layer.changes_weight:
                changes[target(path, parameters) or path] = (layer, change_weight)
            if layer.changes_bias:
                changes[f"{path}.bias"] = (layer, change_bias)
        self._restore(name, self._changed[name] - changes.keys())
        self._changed[name] = set(changes)
        for parameter, (layer, change) in changes.items():
            value = parameters[parameter]
            pristine = self._files[name].read(parameter).to(self._device, value.dtype)
            value.copy_(change(layer, tensors, pristine, adapter.scale, self._device))

    def _restore(self, name: str, changed: set[str]) -> None:
        self._files[name].restore(getattr(self._pipe, name), changed)
