"""LoRAs on the loaded transformers, as diffusers adapters: check, load, switch, scale, drop.

Each transformer carries at most one LoRA. A switch drops the old adapter and loads the new one beside the untouched base
weights, so any rank can follow any other and the frames equal those of a fresh worker. Nothing here reloads the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipelines.catalog import ModelSpec
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora_file import LoraFile

Side = Literal["high", "low"]

_ADAPTER = "lora"
_TRANSFORMER_OF: dict[Side | None, str] = {None: "transformer", "high": "transformer", "low": "transformer_2"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA as a request wants it: which file, how strong, and on a MoE model on which side."""

    file: LoraFile
    scale: float = 1.0
    side: Side | None = None


class Adapters:
    """The LoRAs of one pipeline.

    Made before any LoRA is loaded, since it notes the shape of every linear layer of the plain transformers.
    """

    def __init__(self, spec: ModelSpec, pipe: Any) -> None:
        self._spec = spec
        self._pipe = pipe
        self._linears = {
            name: _linear_shapes(getattr(pipe, name)) for name in ("transformer", "transformer_2") if name in spec.sources
        }
        self._loaded: dict[str, Adapter] = {}

    def check(self, adapter: Adapter) -> list[str]:
        """Compare the file's keys and shapes with the transformer it is for; touches no weight.

        Returns warnings: keys that have no effect, signs that the LoRA belongs to another model or side.
        Raises LoraIncompatible, LoraInvalid.
        """
        file = adapter.file
        if strange := _other_adapter_kind(file.shapes):
            raise LoraIncompatible(f"this is {strange}; {self._spec.id} takes plain LoRA files (lora_A and lora_B keys)")
        pairs, dropped = self._layers_of(file)
        self._check_fit(file, pairs, self._linears[_TRANSFORMER_OF[adapter.side]])

        warnings = []
        if dropped:
            warnings.append(f"{len(dropped)} keys of the LoRA have no effect here, such as `{dropped[0]}`")
        if file.base_version and file.base_version != self._spec.lora_base_version:
            warnings.append(
                f"the LoRA looks trained for {file.looks_trained_for()}; its shapes fit {self._spec.id}, so it was applied"
            )
        elif "image_encoder" in self._spec.sources and not file.has_image_keys:
            warnings.append("the LoRA has no image keys, so it looks trained for a text-to-video model; it was applied")
        for side in ("high", "low"):
            if adapter.side and side != adapter.side and file.path.stem.endswith(f"_{side}_noise"):
                warnings.append(f"the file is named `{file.path.name}`, but was sent as the {adapter.side} side")
        if adapter.scale == 0:
            warnings.append("the LoRA has no effect: its network_multiplier is 0")
        return warnings

    def apply(self, adapters: Sequence[Adapter]) -> list[str]:
        """Bring the transformers to carry exactly these LoRAs at these scales; what is loaded already stays.

        Returns warnings. Raises LoraInvalid or LoraIncompatible; every transformer is plain then.
        """
        wanted = {_TRANSFORMER_OF[adapter.side]: adapter for adapter in adapters}
        try:
            for name in self._linears:
                if name in self._loaded and (
                    name not in wanted or wanted[name].file.identity != self._loaded[name].file.identity
                ):
                    self._drop(name)
            warnings = []
            for name, adapter in wanted.items():
                if name not in self._loaded:
                    warnings += self._load(name, adapter)
                getattr(self._pipe, name).set_adapters([_ADAPTER], [adapter.scale])
                self._loaded[name] = adapter
            return warnings
        except BaseException:
            self.drop_all()
            raise

    def drop_all(self) -> None:
        """Leave every transformer plain, whatever state it is in."""
        for name in self._linears:
            self._drop(name)

    def _drop(self, name: str) -> None:
        transformer = getattr(self._pipe, name)
        if hasattr(transformer, "peft_config"):
            transformer.unload_lora()
        self._loaded.pop(name, None)

    def _load(self, name: str, adapter: Adapter) -> list[str]:
        path = adapter.file.path
        try:
            self._pipe.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=_ADAPTER,
                use_safetensors=True,
                local_files_only=True,
                load_into_transformer_2=name == "transformer_2",
            )
        except (ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LoraIncompatible(f"the LoRA could not be loaded into {self._spec.id}; nothing of it was kept") from error
        self._check_loaded(name, adapter.file)
        return self._check_values(name)

    def _check_loaded(self, name: str, file: LoraFile) -> None:
        """A LoRA never silently does nothing: every layer the file has must have arrived."""
        pairs, _ = self._layers_of(file)
        adapted = {
            layer for layer, module in getattr(self._pipe, name).named_modules() if _ADAPTER in getattr(module, "lora_A", {})
        }
        if lost := sorted(pairs.keys() - adapted):
            raise LoraIncompatible(f"{len(lost)} of {len(pairs)} layers of the LoRA were not loaded, such as {lost[0]}")

    def _check_values(self, name: str) -> list[str]:
        weights = [
            (key, parameter) for key, parameter in getattr(self._pipe, name).named_parameters() if f".{_ADAPTER}." in key
        ]
        if not _all(parameter.isfinite().all() for _, parameter in weights):
            raise LoraInvalid("the LoRA's weights contain NaN or infinity; the training run diverged, use an earlier save")
        if _all((parameter == 0).all() for key, parameter in weights if ".lora_B." in key):
            return ["the LoRA has no effect: all its lora_B weights are 0, as before the first training step"]
        return []

    def _layers_of(self, file: LoraFile) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """({layer: (inputs, outputs)}, keys without effect), by diffusers' own key conversion on empty tensors."""
        tensors = {key: torch.empty(shape, device="meta") for key, shape in file.shapes.items() if _is_weight(key)}
        alphas = {key: torch.ones(()) for key in file.shapes if key.endswith(".alpha") and key.startswith("lora_unet_")}
        try:
            converted = self._pipe.lora_state_dict({**tensors, **alphas})
        except (ValueError, KeyError, IndexError) as error:
            raise LoraIncompatible(
                f"its keys, such as `{next(iter(file.shapes))}`, are not those of a LoRA for {self._spec.id}; "
                f"it looks trained for {file.looks_trained_for()}"
            ) from error
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in converted.items():
            layer, _, half = key.removeprefix("transformer.").rpartition(".lora_")
            if key.startswith("transformer.") and half in ("A.weight", "B.weight"):
                halves.setdefault(layer, {})[half[0]] = tensor
        if not halves:
            raise LoraIncompatible(f"it has no lora_A and lora_B keys; it looks trained for {file.looks_trained_for()}")
        pairs = {}
        for layer, both in halves.items():
            if len(both) != 2 or any(tensor.ndim != 2 for tensor in both.values()):
                raise LoraInvalid(f"layer {layer} lacks one of lora_A and lora_B; the file is incomplete")
            if both["A"].shape[0] != both["B"].shape[1]:
                raise LoraInvalid(f"layer {layer} has rank {both['A'].shape[0]} in lora_A and {both['B'].shape[1]} in lora_B")
            pairs[layer] = (both["A"].shape[1], both["B"].shape[0])
        kept = {id(tensor) for tensor in converted.values()}
        dropped = [] if alphas else [key for key, tensor in tensors.items() if id(tensor) not in kept]
        dropped += [key for key in file.shapes if "dora_scale" in key]
        return pairs, dropped

    def _check_fit(self, file: LoraFile, pairs: dict[str, tuple[int, int]], linears: dict[str, tuple[int, int]]) -> None:
        misfits = [layer for layer, shape in pairs.items() if linears.get(layer) != shape]
        if not misfits:
            return
        first = misfits[0]
        inputs, outputs = pairs[first]
        there = "is not in this model"
        if first in linears:
            there = "has {} inputs and {} outputs in this model".format(*linears[first])
        raise LoraIncompatible(
            f"{len(misfits)} of its {len(pairs)} layers do not fit {self._spec.id}: {first} ({inputs} inputs, {outputs} "
            f"outputs in the LoRA) {there}. It looks trained for {file.looks_trained_for()}; send it to a worker of that model"
        )


def _linear_shapes(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _is_weight(key: str) -> bool:
    """Alphas are scalars that the conversion folds into the weights, and DoRA scales are left out by it."""
    return not key.endswith(".alpha") and "dora_scale" not in key


def _other_adapter_kind(keys: Iterable[str]) -> str:
    keys = list(keys)
    for mark, kind in ((".lokr_", "a LoKr file"), (".hada_", "a LoHa file"), (".oft_", "an OFT file")):
        if any(mark in key for key in keys):
            return kind
    if any("transformer_1.blocks." in key for key in keys):
        return "a file that holds the high and the low side together; split it and send each side as its own item"
    return ""


def _all(flags: Iterable[torch.Tensor]) -> bool:
    """Whether all of these 0-d flags are set, with a single copy off the device."""
    stacked = list(flags)
    return bool(torch.stack(stacked).all()) if stacked else True
