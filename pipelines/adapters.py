"""LoRAs on the loaded transformers, as diffusers adapters: check, load, switch, scale, drop.

Each transformer carries at most one LoRA. A switch drops the old adapter and loads the new one beside the untouched base
weights, so any rank can follow any other and the frames equal those of a fresh worker. Nothing here reloads the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from pipelines.catalog import ModelSpec
from pipelines.errors import LoraError, LoraIncompatible, LoraInvalid
from pipelines.lora_file import LoraFile

Side = Literal["high", "low"]

_ADAPTER = "lora"
_REMEMBERED_FILES = 1000
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
        self._has_effect: dict[tuple[int, ...], bool] = {}
        """By file identity, for files whose values have been read."""

    def check(self, adapter: Adapter) -> list[str]:
        """Compare the file with the transformer it is for, by keys, shapes and values; touches no weight of the model.

        Returns warnings: keys that have no effect, signs that the LoRA belongs to another model or side, a LoRA that does
        nothing. Raises LoraIncompatible, LoraInvalid.
        """
        file = adapter.file
        if strange := _other_adapter_kind(file.shapes):
            raise LoraIncompatible(f"this is {strange}; {self._spec.id} takes plain LoRA files (lora_A and lora_B keys)")
        layers, dropped = self._layers_of(file)
        self._check_fit(file, layers, self._linears[_TRANSFORMER_OF[adapter.side]])
        return [*self._hints(adapter, dropped), *self._effect_warnings(adapter)]

    def apply(self, adapters: Sequence[Adapter]) -> None:
        """Bring the transformers to carry exactly these LoRAs at these scales; what is loaded already stays.

        Raises LoraIncompatible with its `position`; every transformer is plain then.
        """
        wanted = {_TRANSFORMER_OF[adapter.side]: adapter for adapter in adapters}
        try:
            for name, loaded in list(self._loaded.items()):
                if name not in wanted or wanted[name].file.identity != loaded.file.identity:
                    self._drop(name)
            for name, adapter in wanted.items():
                if name not in self._loaded:
                    self._load(name, adapter)
                getattr(self._pipe, name).set_adapters([_ADAPTER], [adapter.scale])
                self._loaded[name] = adapter
        except BaseException as error:
            for name in self._linears:
                self._drop(name)
            if isinstance(error, LoraError):
                error.position = adapters.index(adapter)
            raise

    def _drop(self, name: str) -> None:
        """Leave a transformer plain, whatever state it is in."""
        getattr(self._pipe, name).unload_lora()
        self._loaded.pop(name, None)

    def _load(self, name: str, adapter: Adapter) -> None:
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
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LoraIncompatible(f"the LoRA could not be loaded into {self._spec.id}; nothing of it was kept") from error
        # A LoRA never silently does nothing: every layer the file has must have arrived.
        wanted = self._layers_of(adapter.file)[0].keys()
        modules = getattr(self._pipe, name).named_modules()
        if lost := wanted - {layer for layer, module in modules if _ADAPTER in getattr(module, "lora_A", {})}:
            raise LoraIncompatible(f"{len(lost)} of {len(wanted)} layers of the LoRA were not loaded, such as {min(lost)}")

    def _layers_of(self, file: LoraFile) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """({layer: (inputs, outputs)}, keys without effect), by diffusers' own key conversion on empty tensors.

        An alpha is a number that the conversion multiplies into the weights; only the `lora_unet_` format insists on it.
        """
        tensors = {key: torch.empty(shape, device="meta") for key, shape in file.shapes.items() if not key.endswith(".alpha")}
        alphas = {key: torch.ones(()) for key in file.shapes if key.endswith(".alpha") and key.startswith("lora_unet_")}
        try:
            converted = self._pipe.lora_state_dict({**tensors, **alphas})
        except (ValueError, KeyError, IndexError) as error:
            raise LoraIncompatible(
                f"its keys, such as `{_strangest(file.shapes)}`, are not those of a LoRA for {self._spec.id}; "
                f"it looks trained for {file.looks_trained_for()}"
            ) from error
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in converted.items():
            layer, _, half = key.removeprefix("transformer.").rpartition(".lora_")
            if key.startswith("transformer."):
                halves.setdefault(layer, {})[half] = tensor
        halves.pop("", None)
        if not halves:
            raise LoraIncompatible(f"it has no lora_A and lora_B keys; it looks trained for {file.looks_trained_for()}")
        layers = {layer: _inputs_and_outputs(layer, parts) for layer, parts in halves.items()}
        with_bias = [layer for layer, parts in halves.items() if "B.bias" in parts]
        if with_bias and len(with_bias) < len(layers):
            raise LoraIncompatible(
                f"{len(with_bias)} of its {len(layers)} layers, such as {with_bias[0]}, have a bias, and the others have none; "
                "diffusers can only load a LoRA with a bias on all layers or on none"
            )
        kept = {id(tensor) for tensor in converted.values()}
        return layers, [] if alphas else [key for key, tensor in tensors.items() if id(tensor) not in kept]

    def _check_fit(self, file: LoraFile, layers: dict[str, tuple[int, int]], linears: dict[str, tuple[int, int]]) -> None:
        misfits = [layer for layer, shape in layers.items() if linears.get(layer) != shape]
        if not misfits:
            return
        first = misfits[0]
        there = "is not in this model"
        if first in linears:
            there = "has {} inputs and {} outputs in this model".format(*linears[first])
        raise LoraIncompatible(
            f"{len(misfits)} of its {len(layers)} layers do not fit {self._spec.id}: {first} ({layers[first][0]} inputs, "
            f"{layers[first][1]} outputs in the LoRA) {there}. It looks trained for "
            f"{file.looks_trained_for(but_not=self._spec.id)}; send it to a worker of that model"
        )

    def _hints(self, adapter: Adapter, dropped: list[str]) -> list[str]:
        """What a careful operator would tell the user about a file that fits."""
        file, hints = adapter.file, []
        if dropped:
            hints.append(f"{len(dropped)} keys of the LoRA have no effect here, such as `{dropped[0]}`")
        if file.base_version and file.base_version != self._spec.lora_base_version:
            hints.append(
                f"the LoRA looks trained for {file.looks_trained_for()}; its shapes fit {self._spec.id}, so it was applied"
            )
        elif "image_encoder" in self._spec.sources and file.has_text_keys and not file.has_image_keys:
            hints.append("the LoRA has no image keys, so it looks trained for a text-to-video model; it was applied")
        for side in ("high", "low"):
            if adapter.side and side != adapter.side and file.path.stem.endswith(f"_{side}_noise"):
                hints.append(f"the file is named `{file.path.name}`, but was sent as the {adapter.side} side")
        return hints

    def _effect_warnings(self, adapter: Adapter) -> list[str]:
        """Whether the LoRA does anything. Raises LoraInvalid when its values are no numbers."""
        file = adapter.file
        if file.identity not in self._has_effect:
            if len(self._has_effect) >= _REMEMBERED_FILES:
                self._has_effect.clear()
            self._has_effect[file.identity] = _read_effect(file)
        if not self._has_effect[file.identity]:
            return ["the LoRA has no effect: lora_A or lora_B is all 0 in every layer, as before the first training step"]
        return ["the LoRA has no effect: its network_multiplier is 0"] if adapter.scale == 0 else []


def _linear_shapes(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _inputs_and_outputs(layer: str, parts: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Widths of a layer from its lora_A [rank, inputs] and lora_B [outputs, rank]."""
    down, up = parts.get("A.weight"), parts.get("B.weight")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2:
        raise LoraInvalid(f"layer {layer} lacks one of lora_A and lora_B; the file is incomplete")
    if down.shape[0] != up.shape[1]:
        raise LoraInvalid(f"layer {layer} has rank {down.shape[0]} in lora_A and {up.shape[1]} in lora_B")
    return down.shape[1], up.shape[0]


def _read_effect(file: LoraFile) -> bool:
    """Whether any layer's product can differ from 0. Raises LoraInvalid for NaN, infinity and dtypes that are no floats."""
    if strange := {dtype for dtype in file.dtypes.values() if dtype not in ("F64", "F32", "F16", "BF16")}:
        raise LoraInvalid(f"its weights are stored as {min(strange)}; export the LoRA as float32, float16 or bfloat16")
    zeros: dict[str, bool] = {}
    for key, tensor in load_file(file.path).items():
        if not tensor.isfinite().all():
            raise LoraInvalid(f"`{key}` contains NaN or infinity; the training run diverged, use an earlier save")
        layer = re.split(r"\.lora_", key)[0]
        if ".lora_" in key:
            zeros[layer] = zeros.get(layer, False) or not tensor.any()
    return not all(zeros.values())


def _strangest(keys: Iterable[str]) -> str:
    """The key that looks least like one of a Wan LoRA, to show to the user."""
    usual = re.compile(r"(diffusion_model\.|transformer\.|lora_unet_)blocks[._]\d+[._].*(\.lora_\w+\.weight|\.alpha|\.diff_b)")
    keys = list(keys)
    return next((key for key in keys if not usual.fullmatch(key)), keys[0])


def _other_adapter_kind(keys: Iterable[str]) -> str:
    keys = list(keys)
    for mark, kind in ((".lokr_", "LoKr"), (".hada_", "LoHa"), (".oft_", "OFT"), ("dora_scale", "DoRA")):
        if any(mark in key for key in keys):
            return f"a {kind} file"
    if any("transformer_1.blocks." in key for key in keys):
        return "a file that holds the high and the low side together; split it and send each side as its own item"
    return ""
