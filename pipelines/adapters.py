"""LoRAs beside untouched weights, as diffusers adapters: load, switch, scale, drop.

Each transformer carries at most one LoRA. A switch drops the old adapter and loads the new one, so any rank can follow any
other and the frames equal those of a fresh worker. Nothing here reloads the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.catalog import ModelSpec
from pipelines.errors import LoraIncompatible, blamed_on
from pipelines.lora_file import Adapter, transformer_of
from pipelines.lora_layers import read_layers

_NAME = "lora"


class Adapters:
    """The adapters of one pipeline, by the transformer that carries them."""

    def __init__(self, spec: ModelSpec, pipe: Any) -> None:
        self._spec = spec
        self._pipe = pipe
        self._loaded: dict[str, Adapter] = {}

    def apply(self, adapters: Sequence[Adapter]) -> None:
        """Bring the transformers to carry exactly these LoRAs at these scales; what is loaded already stays.

        Raises LoraIncompatible. A transformer whose load fails may be left half adapted: call `drop_all` then.
        """
        wanted = {transformer_of(adapter.side): adapter for adapter in adapters}
        for name, loaded in list(self._loaded.items()):
            if name not in wanted or wanted[name].file.identity != loaded.file.identity:
                self._drop(name)
        for position, (name, adapter) in enumerate(wanted.items()):
            if name not in self._loaded:
                with blamed_on(position):
                    self._load(name, adapter)
            getattr(self._pipe, name).set_adapters([_NAME], [adapter.scale])
            self._loaded[name] = adapter

    def drop_all(self) -> None:
        """Leave every transformer plain, whatever state it is in."""
        for name in self._spec.transformers:
            self._drop(name)

    def _drop(self, name: str) -> None:
        getattr(self._pipe, name).unload_lora()
        self._loaded.pop(name, None)

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
        modules = getattr(self._pipe, name).named_modules()
        if lost := wanted - {layer for layer, module in modules if _NAME in getattr(module, "lora_A", {})}:
            raise LoraIncompatible(f"{len(lost)} of {len(wanted)} layers of the LoRA were not loaded, such as {min(lost)}")
