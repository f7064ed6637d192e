"""LoRAs beside untouched weights, as diffusers adapters: load, switch, scale, drop.

Each transformer carries at most one LoRA. A LoRA of the same layers, ranks and dtypes is copied over the old one; for any
other, the old one is dropped and the new one loaded. The frames equal those of a fresh worker either way.

In compiled transformers every LoRA is padded with zeros to one rank, and scales are tensors, so that nothing is compiled again
for another rank or another scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import pad

from pipelines.catalog import ModelSpec
from pipelines.diffusers_privates import ADAPTER, adapter_layers
from pipelines.errors import LoraIncompatible, LoraInvalid, blamed_on
from pipelines.lora.file import Adapter, LoraFile, transformer_of
from pipelines.lora.layers import LayerReader

COMPILED_RANK = 128
"""The rank to which LoRAs are padded in compiled blocks. For a larger LoRA the blocks are compiled once more."""


def _pad_to_compiled_rank(transformer: Any) -> None:
    """Pad the adapter with zeros, which add nothing, to the rank that compiled code expects."""
    for module in adapter_layers(transformer).values():
        down, up = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        missing = max(0, COMPILED_RANK - down.weight.shape[0])
        down.weight = torch.nn.Parameter(pad(down.weight, (0, 0, 0, missing)), requires_grad=False)
        up.weight = torch.nn.Parameter(pad(up.weight, (0, missing)), requires_grad=False)


def _scales_as_tensors(transformer: Any) -> None:
    """Turn peft's scales into tensors. Code is compiled for the value of a number, but reads a tensor."""
    tensors: dict[float, torch.Tensor] = {}
    for module in adapter_layers(transformer).values():
        scale = module.scaling[ADAPTER]
        if scale not in tensors:
            tensors[scale] = torch.tensor(scale, device=module.lora_A[ADAPTER].weight.device)
        module.scaling[ADAPTER] = tensors[scale]


class Adapters:
    """The adapters of one pipeline, by the transformer that carries them."""

    def __init__(self, spec: ModelSpec, reader: LayerReader) -> None:
        self._spec = spec
        self._pipe = reader.pipe
        self._reader = reader
        self._loaded: dict[str, Adapter] = {}
        self.are_compiled = False

    def apply(self, adapters: Sequence[Adapter]) -> None:
        """Bring the transformers to carry exactly these LoRAs at these scales; what is loaded already stays.

        Raises LoraIncompatible. A transformer whose load fails may be left half adapted: call `drop_all` then.
        """
        wanted = {transformer_of(adapter.side): adapter for adapter in adapters}
        for name in set(self._loaded) - set(wanted):
            self._drop(name)
        for position, (name, adapter) in enumerate(wanted.items()):
            with blamed_on(position):
                loaded = self._loaded.get(name)
                if loaded and loaded.file.identity != adapter.file.identity and not self._swap(name, loaded.file, adapter.file):
                    self._drop(name)
                if name not in self._loaded:
                    self._load(name, adapter)
                    if self.are_compiled:
                        _pad_to_compiled_rank(getattr(self._pipe, name))
            if self._loaded.get(name) != adapter:
                getattr(self._pipe, name).set_adapters([ADAPTER], [adapter.scale])
                if self.are_compiled:
                    _scales_as_tensors(getattr(self._pipe, name))
                self._loaded[name] = adapter

    def drop_all(self) -> None:
        """Leave every transformer plain, whatever state it is in."""
        for name in self._spec.transformers:
            self._drop(name)

    def _drop(self, name: str) -> None:
        getattr(self._pipe, name).unload_lora()
        self._loaded.pop(name, None)

    def _swap(self, name: str, old: LoraFile, new: LoraFile) -> bool:
        """Copy `new` into the tensors of `old`. False, with nothing done, where they differ in more than their numbers."""
        layers = self._reader.read(new)[0]
        outline = self._outline(new)
        if outline is None or outline != self._outline(old):
            return False
        modules = adapter_layers(getattr(self._pipe, name))
        weights = {
            layer.keys[half]: getattr(modules[path], f"lora_{half}")[ADAPTER].weight
            for path, layer in layers.items()
            for half in ("A", "B")
        }
        if any(weight.is_meta for weight in weights.values()):  # an offloaded one is somewhere else
            return False
        with safe_open(new.path, framework="pt") as tensors:
            for key, weight in weights.items():
                rows, columns = new.shapes[key]
                weight.data.zero_()[:rows, :columns] = tensors.get_tensor(key)
        return True

    def _outline(self, file: LoraFile) -> dict[str, tuple[object, ...]] | None:
        """What two files must have in common to be swapped: layers, dtypes and, unless compiled, ranks.

        None for a file with alphas, which are not tensors in an adapter.
        """
        layers = self._reader.read(file)[0]
        if any(layer.keys.keys() != {"A", "B"} for layer in layers.values()):
            return None
        least = COMPILED_RANK if self.are_compiled else 0
        return {
            path: (max(least, file.shapes[layer.keys["A"]][0]), *(file.dtypes[layer.keys[half]] for half in ("A", "B")))
            for path, layer in layers.items()
        }

    def _load(self, name: str, adapter: Adapter) -> None:
        path = adapter.file.path
        try:
            self._pipe.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=ADAPTER,
                use_safetensors=True,
                local_files_only=True,
                load_into_transformer_2=name == "transformer_2",
            )
        except OSError as error:
            raise LoraInvalid("the file could not be read; send the job again") from error
        except (ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch for" not in str(error):  # of the device, or of its memory
                raise
            raise LoraIncompatible(f"the LoRA could not be loaded into {self._spec.id}; nothing of it was kept") from error
        # A LoRA never silently does nothing: every layer of the file must have arrived.
        wanted = self._reader.read(adapter.file)[0].keys()
        if lost := wanted - adapter_layers(getattr(self._pipe, name)).keys():
            raise LoraIncompatible(f"{len(lost)} of {len(wanted)} layers of the LoRA were not loaded, such as {min(lost)}")
