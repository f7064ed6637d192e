"""LoRAs beside untouched weights, as diffusers adapters: load, switch, scale, drop.

Each transformer carries at most one LoRA. A LoRA of the same layers, ranks and dtypes is copied into the place of the old one;
any other drops it and is loaded anew. The frames equal those of a fresh worker either way. Nothing here reloads the model.

Compiled transformers have places of a fixed rank, filled up with zeros, and scales that are tensors: what another rank or
another scale changes is then no part of the code, and nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import pad

from pipelines.catalog import ModelSpec
from pipelines.errors import LoraIncompatible, blamed_on
from pipelines.lora.file import Adapter, LoraFile, transformer_of
from pipelines.lora.layers import read_layers

_NAME = "lora"

COMPILED_RANK = 128
"""Of the places in a compiled transformer. A larger LoRA has one of its own, for which the blocks are compiled once more."""


def _modules_of(transformer: Any) -> dict[str, Any]:
    """The layers that carry the adapter, by name."""
    return {name: module for name, module in transformer.named_modules() if _NAME in getattr(module, "lora_A", {})}


def _widen(transformer: Any) -> None:
    """Bring its adapter to the rank of the places in compiled code; zeros add nothing."""
    for module in _modules_of(transformer).values():
        down, up = module.lora_A[_NAME], module.lora_B[_NAME]
        missing = max(0, COMPILED_RANK - down.weight.shape[0])
        down.weight = torch.nn.Parameter(pad(down.weight, (0, 0, 0, missing)), requires_grad=False)
        up.weight = torch.nn.Parameter(pad(up.weight, (0, missing)), requires_grad=False)


def _scales_as_tensors(transformer: Any) -> None:
    """What peft keeps as a number, for which code is compiled, as a tensor, which it reads."""
    tensors: dict[float, torch.Tensor] = {}
    for module in _modules_of(transformer).values():
        scale = module.scaling[_NAME]
        if scale not in tensors:
            tensors[scale] = torch.tensor(scale, device=module.lora_A[_NAME].weight.device)
        module.scaling[_NAME] = tensors[scale]


class Adapters:
    """The adapters of one pipeline, by the transformer that carries them."""

    def __init__(self, spec: ModelSpec, pipe: Any) -> None:
        self._spec = spec
        self._pipe = pipe
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
                        _widen(getattr(self._pipe, name))
            if self._loaded.get(name) != adapter:
                getattr(self._pipe, name).set_adapters([_NAME], [adapter.scale])
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
        layers = read_layers(new, self._pipe, self._spec.id)[0]
        outline = self._outline(new)
        if outline is None or outline != self._outline(old):
            return False
        modules = _modules_of(getattr(self._pipe, name))
        weights = {
            layer.keys[half]: getattr(modules[path], f"lora_{half}")[_NAME].weight
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
        """What two files must have in common to take each other's place: layers, dtypes and, unless compiled, ranks.

        None for a file with alphas, which are no tensors in an adapter.
        """
        layers = read_layers(file, self._pipe, self._spec.id)[0]
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
                adapter_name=_NAME,
                use_safetensors=True,
                local_files_only=True,
                load_into_transformer_2=name == "transformer_2",
            )
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LoraIncompatible(f"the LoRA could not be loaded into {self._spec.id}; nothing of it was kept") from error
        # A LoRA never silently does nothing: every layer the file has must have arrived.
        wanted = read_layers(adapter.file, self._pipe, self._spec.id)[0].keys()
        if lost := wanted - _modules_of(getattr(self._pipe, name)).keys():
            raise LoraIncompatible(f"{len(lost)} of {len(wanted)} layers of the LoRA were not loaded, such as {min(lost)}")
