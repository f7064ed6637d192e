"""LoRAs added into the weights, as the trainer does for its samples, and taken out again to the bit.

The product of a LoRA's factors is computed in float32, added to the float32 value of the weight, and stored in the weight's
own dtype. Subtracting it again would leave rounding behind, so a weight is restored from the checkpoint's file, and every merge
starts from it. Of several LoRAs, each is added to the float32 sum of those before it, which is rounded once.

Differences that go with factors beside the layers are added in the weight's own dtype, as the trainer does where it cannot
merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipelines.errors import blamed_on
from pipelines.lora.arithmetic import (
    Tensors,
    add_difference,
    add_difference_of_bias,
    change_bias,
    change_weight,
    load_tensors,
)
from pipelines.lora.file import LoraFile
from pipelines.lora.fit import Stack, target
from pipelines.lora.layers import Layer, Layers
from pipelines.pristine import CheckpointFile

_Change = Callable[[Layer, Tensors, torch.Tensor, float, torch.device], torch.Tensor]


class Merges:
    """The merged LoRAs of one pipeline, by transformer."""

    def __init__(self, pipe: Any, files: Mapping[str, CheckpointFile], device: torch.device) -> None:
        """`files`: the weights of each transformer. `device` computes the merges, wherever the weights wait."""
        self._pipe = pipe
        self._device = device
        self._files = files
        self._merged: dict[str, tuple[bool, list[tuple[LoraFile, float, Layers]]]] = {}
        self._changed: dict[str, set[str]] = {name: set() for name in self._files}
        """Parameters whose values are not, or may not be, what the file says."""

    @torch.no_grad()
    def apply(self, name: str, wanted: Stack, go_with_factors: bool = False) -> None:
        """Make the weights of the transformer `name` carry exactly these LoRAs, in their order; what is merged already stays.

        `go_with_factors`: they are differences of layers, and the factors of their files lie beside the layers.
        After an exception weights may be half merged: call `take_out_all` then.
        """
        # One file can have a part for each side, so that file and scale alone do not say what is merged.
        identity = (go_with_factors, [(adapter.file, adapter.scale, layers) for adapter, layers in wanted])
        if wanted and self._merged.get(name) == identity:
            return
        self._merged.pop(name, None)
        if not wanted:
            self._restore(name, self._changed[name])
        else:
            self._merge(name, wanted, go_with_factors)
            self._merged[name] = identity

    @property
    def are_active(self) -> bool:
        return bool(self._merged)

    @torch.no_grad()
    def take_out_all(self) -> None:
        """Restore every weight, whatever state it is in."""
        self._merged.clear()
        for name, changed in self._changed.items():
            self._restore(name, changed)

    def _merge(self, name: str, stack: Stack, go_with_factors: bool) -> None:
        of_weight, of_bias = (add_difference, add_difference_of_bias) if go_with_factors else (change_weight, change_bias)
        parameters = dict(getattr(self._pipe, name).named_parameters())
        changes: dict[str, list[tuple[_Change, Layer, Tensors, float]]] = {}
        for position, (adapter, layers) in enumerate(stack):
            if adapter.scale == 0:  # a DoRA's magnitudes would change the weights all the same
                continue
            with blamed_on(position):
                tensors = load_tensors(adapter.file)
            for path, layer in layers.items():
                if layer.changes_weight:
                    changed = target(path, parameters) or path
                    changes.setdefault(changed, []).append((of_weight, layer, tensors, adapter.scale))
                if layer.changes_bias:
                    changes.setdefault(f"{path}.bias", []).append((of_bias, layer, tensors, adapter.scale))
        self._restore(name, self._changed[name] - changes.keys())
        self._changed[name] = set(changes)
        for parameter, each in changes.items():
            value = parameters[parameter]
            merged = self._files[name].read(parameter, self._device).to(value.dtype)
            for change, layer, tensors, scale in each:
                merged = change(layer, tensors, merged, scale, self._device)
            value.copy_(merged)

    def _restore(self, name: str, changed: set[str]) -> None:
        self._files[name].restore(getattr(self._pipe, name), changed)
