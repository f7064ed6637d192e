"""LoRAs beside untouched weights, as diffusers adapters: load, switch, scale, drop.

Each transformer carries at most one LoRA. A LoRA of the same layers, ranks, dtypes and header settings is copied over the old
one; for any other, the old one is dropped and the new one loaded. The frames equal those of a fresh worker either way.

The adapter is made from the tensors and from our own reading of the header: no setting of a file reaches peft by itself, where
it would stay for the next LoRA.

In compiled transformers every LoRA is padded with zeros to one rank, and scales are tensors, so that nothing is compiled again
for another rank or another scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from pipelines import diffusers_privates as privates
from pipelines.catalog import ModelSpec
from pipelines.diffusers_privates import ADAPTER, adapter_layers
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.arithmetic import factors, load_tensors
from pipelines.lora.file import Adapter
from pipelines.lora.layers import Layers

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

    def __init__(self, spec: ModelSpec, pipe: Any) -> None:
        self._spec = spec
        self._pipe = pipe
        self._loaded: dict[str, tuple[Adapter, Layers]] = {}
        self.are_compiled = False

    def apply(self, name: str, wanted: tuple[Adapter, Layers] | None) -> None:
        """Make the transformer `name` carry exactly this LoRA at its scale, or none; what is loaded already stays.

        Raises LoraIncompatible, LoraInvalid. A transformer whose load fails may be left half adapted: call `drop` then.
        """
        loaded, transformer = self._loaded.get(name), getattr(self._pipe, name)
        if wanted is None:
            if loaded:
                self.drop(name)
            return
        adapter, layers = wanted
        if loaded and loaded[0].file != adapter.file and not self._swap(name, loaded, wanted):
            self.drop(name)
        if name not in self._loaded:
            self._load(transformer, adapter, layers)
        if not loaded or name not in self._loaded or loaded[0] != adapter:
            transformer.set_adapters([ADAPTER], [adapter.scale])
            if self.are_compiled:
                _scales_as_tensors(transformer)
        self._loaded[name] = wanted

    def drop_all(self) -> None:
        """Leave every transformer plain, whatever state it is in."""
        for name in self._spec.transformers:
            self.drop(name)

    def drop(self, name: str) -> None:
        getattr(self._pipe, name).unload_lora()
        self._loaded.pop(name, None)

    def _swap(self, name: str, old: tuple[Adapter, Layers], new: tuple[Adapter, Layers]) -> bool:
        """Copy `new` over `old`. False, with nothing done, where they differ in more than their numbers."""
        if self._outline(*old) != self._outline(*new):
            return False
        modules = adapter_layers(getattr(self._pipe, name))
        weights = {path: [getattr(modules[path], f"lora_{half}")[ADAPTER].weight for half in "AB"] for path in new[1]}
        if any(weight.is_meta for pair in weights.values() for weight in pair):  # an offloaded one is somewhere else
            return False
        tensors = load_tensors(new[0].file)
        for path, pair in weights.items():
            for weight, factor in zip(pair, factors(new[1][path], tensors), strict=True):
                rows, columns = factor.shape
                weight.data.zero_()[:rows, :columns] = factor
        return True

    def _outline(self, adapter: Adapter, layers: Layers) -> dict[str, tuple[object, ...]]:
        """What two files must have in common to be swapped: layers, dtypes, the header's scales and, unless compiled, ranks."""
        least, dtypes = (COMPILED_RANK if self.are_compiled else 0), adapter.file.dtypes
        return {
            path: (max(least, layer.rank or 0), layer.header_scale, *(dtypes[layer.keys[half]] for half in "AB"))
            for path, layer in layers.items()
        }

    def _load(self, transformer: Any, adapter: Adapter, layers: Layers) -> None:
        try:
            tensors = load_tensors(adapter.file)
            state = {
                f"{path}.lora_{half}.weight": tensor
                for path, layer in layers.items()
                for half, tensor in zip("AB", factors(layer, tensors), strict=True)
            }
            transformer.load_lora_adapter(
                state,
                prefix=None,
                adapter_name=ADAPTER,
                metadata=_config(layers),
                low_cpu_mem_usage=True,
                _pipeline=self._pipe if privates.is_moved_whole(transformer) else None,
            )
            privates.refresh_group_offloading(transformer)
        except OSError as error:
            raise LoraInvalid("the file could not be read; send the job again") from error
        except (ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch for" not in str(error):  # of the device, or of its memory
                raise
            raise LoraIncompatible(f"the LoRA could not be loaded into {self._spec.id}; nothing of it was kept") from error
        # A LoRA never silently does nothing: every layer of the file must have arrived.
        if lost := layers.keys() - adapter_layers(transformer).keys():
            raise LoraIncompatible(f"{len(lost)} of {len(layers)} layers of the LoRA were not loaded, such as {min(lost)}")
        if self.are_compiled:
            _pad_to_compiled_rank(transformer)


def _config(layers: Layers) -> Mapping[str, Any] | None:
    """peft's settings for layers whose header gives an alpha; None where diffusers finds them by the tensors."""
    if all(layer.header_scale == 1 for layer in layers.values()):
        return None
    ranks = {f"^{re.escape(path)}": layer.rank for path, layer in layers.items()}
    alphas = {f"^{re.escape(path)}": layer.header_scale * (layer.rank or 1) for path, layer in layers.items()}
    first = next(iter(ranks))
    return {
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(layers),
    }
