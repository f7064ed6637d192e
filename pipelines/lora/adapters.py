"""LoRAs beside untouched weights, as diffusers adapters: load, switch, scale, drop.

Each transformer carries at most one adapter. Several LoRAs are one adapter too: their factors side by side, whose product is
the sum of theirs. An adapter of the same layers, ranks, dtypes and header settings is copied over the old one; for any other,
the old one is dropped and the new one loaded. The frames equal those of a fresh worker either way.

The adapter is made from the tensors and from our own reading of the header: no setting of a file reaches peft by itself, where
it would stay for the next LoRA.

In compiled transformers every LoRA is padded with zeros to one rank, and scales are tensors, so that nothing is compiled again
for another rank or another scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from pipelines import diffusers_privates as privates
from pipelines.catalog import ModelSpec
from pipelines.diffusers_privates import ADAPTER, adapter_layers
from pipelines.errors import LoraIncompatible, LoraInvalid, blamed_on
from pipelines.lora.arithmetic import factors, load_tensors
from pipelines.lora.fit import Stack
from pipelines.lora.layers import Layer
from pipelines.reading import DTYPES

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
        self._dtype: torch.dtype = pipe.transformer.dtype
        self._loaded: dict[str, Stack] = {}
        self.are_compiled = False

    def apply(self, name: str, wanted: Stack) -> None:
        """Make the transformer `name` carry exactly these LoRAs at their scales; what is loaded already stays.

        Raises LoraIncompatible, LoraInvalid. A transformer whose load fails may be left half adapted: call `drop` then.
        """
        loaded, transformer = self._loaded.get(name, ()), getattr(self._pipe, name)
        if not wanted:
            if loaded:
                self.drop(name)
            return
        if loaded and _numbers(loaded) != _numbers(wanted) and not self._swap(name, loaded, wanted):
            self.drop(name)
        if name not in self._loaded:
            self._load(transformer, wanted)
        if not loaded or name not in self._loaded or _scale(loaded) != _scale(wanted):
            transformer.set_adapters([ADAPTER], [_scale(wanted)])
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

    def _swap(self, name: str, old: Stack, new: Stack) -> bool:
        """Copy `new` over `old`. False, with nothing done, where they differ in more than their numbers."""
        transformer = getattr(self._pipe, name)
        outline = self._outline(new, self._dtype)
        if self._outline(old, self._dtype) != outline:
            return False
        modules = adapter_layers(transformer)
        weights = {path: [getattr(modules[path], f"lora_{half}")[ADAPTER].weight for half in "AB"] for path in outline}
        if any(weight.is_meta for pair in weights.values() for weight in pair):  # an offloaded one is somewhere else
            return False
        made = _factors_of(new, self._dtype)
        for path, pair in weights.items():
            for weight, factor in zip(pair, made[path], strict=True):
                rows, columns = factor.shape
                weight.data.zero_()[:rows, :columns] = factor
        return True

    def _outline(self, stack: Stack, dtype: torch.dtype) -> dict[str, tuple[object, ...]]:
        """What two adapters must share to be swapped: layers, dtypes, the header's scales and, unless compiled, ranks."""
        least = COMPILED_RANK if self.are_compiled else 0
        if len(stack) > 1:
            kind = _dtype_of(stack, dtype)
            return {
                path: (max(least, sum(layer.rank or 0 for layer, _ in each)), kind) for path, each in _by_layer(stack).items()
            }
        adapter, layers = stack[0]
        dtypes = adapter.file.dtypes
        return {
            path: (max(least, layer.rank or 0), layer.header_scale, *(dtypes[layer.keys[half]] for half in "AB"))
            for path, layer in layers.items()
        }

    def _load(self, transformer: Any, stack: Stack) -> None:
        layers = _by_layer(stack).keys()
        try:
            made = _factors_of(stack, self._dtype)
            state = {
                f"{path}.lora_{half}.weight": tensor
                for path, pair in made.items()
                for half, tensor in zip("AB", pair, strict=True)
            }
            transformer.load_lora_adapter(
                state,
                prefix=None,
                adapter_name=ADAPTER,
                metadata=_config(stack),
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
        if lost := layers - adapter_layers(transformer).keys():
            raise LoraIncompatible(f"{len(lost)} of {len(layers)} layers of the LoRA were not loaded, such as {min(lost)}")
        if self.are_compiled:
            _pad_to_compiled_rank(transformer)


class _Part(NamedTuple):
    """A layer of one LoRA of a stack."""

    layer: Layer
    position: int


def _by_layer(stack: Stack) -> dict[str, list[_Part]]:
    """The parts of each layer, in the order of the stack."""
    parts: dict[str, list[_Part]] = {}
    for position, (_, layers) in enumerate(stack):
        for path, layer in layers.items():
            parts.setdefault(path, []).append(_Part(layer, position))
    return parts


def _numbers(stack: Stack) -> object:
    """What decides the numbers of the adapter's factors: of several LoRAs, their scales too."""
    if len(stack) == 1:
        return stack[0][0].file
    return [(adapter.file, adapter.scale) for adapter, _ in stack]


def _scale(stack: Stack) -> float:
    """The adapter's scale. Those of several LoRAs lie in the factors."""
    return stack[0][0].scale if len(stack) == 1 else 1.0


def _factors_of(stack: Stack, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(lora_A [rank, inputs], lora_B [outputs, rank]) of every layer. Raises LoraInvalid, OSError.

    Of one LoRA in the file's dtype, and its scale is peft's. Of several, the ranks lie side by side in one dtype that holds the
    numbers of all files and of the model, which has `dtype`; the scales, and what the headers say of them, are multiplied into
    lora_B in float32.
    """
    tensors = []
    for position, (adapter, _) in enumerate(stack):
        with blamed_on(position):
            tensors.append(load_tensors(adapter.file))
    if len(stack) == 1:
        return {path: factors(layer, tensors[0]) for path, layer in stack[0][1].items()}
    common = _dtype_of(stack, dtype)
    made = {}
    for path, parts in _by_layer(stack).items():
        pairs = [factors(layer, tensors[position]) for layer, position in parts]
        scales = [stack[position][0].scale * layer.header_scale for layer, position in parts]
        downs = [down.to(common) for down, _ in pairs]
        ups = [(up.float() * scale).to(common) for (_, up), scale in zip(pairs, scales, strict=True)]
        made[path] = (torch.cat(downs), torch.cat(ups, dim=1))
    return made


def _dtype_of(stack: Stack, dtype: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds the numbers of every file and of the model. fp8 numbers come as float32."""
    names = {adapter.file.dtypes[layer.keys[half]] for adapter, layers in stack for layer in layers.values() for half in "AB"}
    used = (DTYPES[name] for name in sorted(names))
    return reduce(torch.promote_types, (torch.float32 if one.itemsize == 1 else one for one in used), dtype)


def _config(stack: Stack) -> Mapping[str, Any] | None:
    """peft's settings for layers whose header gives an alpha; None where diffusers finds them by the tensors."""
    layers = stack[0][1]
    if len(stack) > 1 or all(layer.header_scale == 1 for layer in layers.values()):
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
