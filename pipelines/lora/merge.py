"""LoRAs added into the weights, as the trainer does for its samples, and taken out again to the bit.

The product of a LoRA's factors is computed in float32, added to the float32 value of the weight, and stored in the weight's
own dtype. Subtracting it again would leave rounding behind, so a weight goes back to what the checkpoint's file says: the
file stays memory-mapped, which costs no memory of its own, and every merge starts from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.catalog import ModelSpec
from pipelines.checkpoints import Checkpoints
from pipelines.errors import blamed_on
from pipelines.lora.file import Adapter, transformer_of
from pipelines.lora.layers import LayerReader
from pipelines.weights import file_names, index_of


class Merges:
    """The merged LoRAs of one pipeline, by transformer; at most one each."""

    def __init__(self, spec: ModelSpec, reader: LayerReader, checkpoints: Checkpoints) -> None:
        self._pipe = reader.pipe
        self._reader = reader
        self._files = {name: _CheckpointFile(checkpoints.folder_of(name)) for name in spec.transformers}
        self._merged: dict[str, Adapter] = {}
        self._changed: dict[str, set[str]] = {name: set() for name in self._files}
        """Layers whose weights are not, or may not be, what the file says."""

    @torch.no_grad()
    def apply(self, adapters: Sequence[Adapter]) -> None:
        """Bring the weights to carry exactly these LoRAs at these scales; what is merged already stays.

        Raises LoraError. After an exception weights may be half merged: call `take_out_all` then.
        """
        wanted = {transformer_of(adapter.side): adapter for adapter in adapters}
        for name in self._files:
            before, after = self._merged.get(name), wanted.get(name)
            if before and after and (before.file.identity, before.scale) == (after.file.identity, after.scale):
                continue
            self._merged.pop(name, None)
            if after is None:
                self._restore(name, self._changed[name])
            else:
                with blamed_on(adapters.index(after)):
                    self._merge(name, after)
                self._merged[name] = after

    @property
    def are_active(self) -> bool:
        return bool(self._merged)

    @torch.no_grad()
    def take_out_all(self) -> None:
        """Put every weight back, whatever state it is in."""
        self._merged.clear()
        for name, layers in self._changed.items():
            self._restore(name, layers)

    def _merge(self, name: str, adapter: Adapter) -> None:
        layers, _ = self._reader.read(adapter.file)
        tensors = load_file(adapter.file.path)
        self._restore(name, self._changed[name] - layers.keys())
        self._changed[name] |= layers.keys()
        weights = self._weights(name, layers)
        for layer, weight in weights.items():
            pristine = self._files[name].read(f"{layer}.weight").to(weight.device, weight.dtype)
            merged = layers[layer].delta(tensors, weight.device).mul_(adapter.scale).add_(pristine)
            weight.copy_(merged)

    def _restore(self, name: str, layers: Iterable[str]) -> None:
        for layer, weight in self._weights(name, set(layers)).items():
            weight.copy_(self._files[name].read(f"{layer}.weight").to(weight.dtype))
            self._changed[name].discard(layer)

    def _weights(self, name: str, layers: Iterable[str]) -> Mapping[str, torch.Tensor]:
        transformer = getattr(self._pipe, name)
        return {layer: transformer.get_submodule(layer).weight for layer in layers}


class _CheckpointFile:
    """A transformer's safetensors file or shards, memory-mapped on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard_of = index_of(folder, "transformer")
        self._names = file_names(folder, "transformer")
        self._open: dict[str, Any] = {}

    def read(self, key: str) -> torch.Tensor:
        """The tensor in the file's dtype, in memory only while it is used."""
        name = self._shard_of[key] if self._shard_of else self._names[0]
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        tensor: torch.Tensor = self._open[name].get_tensor(key)
        return tensor
