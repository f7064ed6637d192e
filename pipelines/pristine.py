"""The weights as the checkpoint's files have them. Everything that changes weights for a job starts from and returns to these.

On a CPU the files stay memory-mapped, which costs no memory of its own; for a GPU they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from pipelines.reading import DTYPES, read_into
from pipelines.safetensors_header import Header, header_of
from pipelines.weights import file_names, index_of

_CPU = torch.device("cpu")
Component = TypeVar("Component", bound=torch.nn.Module)


class CheckpointFile:
    """A component's safetensors file or shards, opened on first use."""

    def __init__(self, folder: Path, component: str) -> None:
        self._folder = folder
        self._shard_of = index_of(folder, component)
        self._names = file_names(folder, component)
        self._open: dict[str, Any] = {}
        self._headers: dict[str, Header] = {}

    def read(self, key: str, device: torch.device = _CPU) -> torch.Tensor:
        """The tensor in the file's dtype; on a CPU it is in memory only while it is used.

        Raises OSError where there is no such file.
        """
        name = self._name_of(key)
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        mapped: torch.Tensor = self._open[name].get_tensor(key)
        if device.type == "cpu":
            return mapped
        value = torch.empty_like(mapped, device=device)
        self._fill({key: value})
        return value

    @torch.no_grad()
    def restore(self, component: torch.nn.Module, parameters: set[str]) -> None:
        """Give these parameters their values in the file; they leave the set when they have them."""
        values = {name: component.get_parameter(name) for name in sorted(parameters)}
        alike = {name: value for name, value in values.items() if self._has(name, value)}
        self._fill(alike)
        for name in values.keys() - alike.keys():
            values[name].copy_(self.read(name).to(values[name].dtype))
        parameters.clear()

    @torch.no_grad()
    def bring(self, component: Component, device: torch.device) -> Component:
        """Do `component.to(device)`, but read what the file has in the weight's dtype straight to the device."""
        there = {}
        for name, tensor in chain(component.named_parameters(), component.named_buffers()):
            if self._has(name, tensor):
                there[name] = torch.empty_like(tensor, device=device)
                tensor.data = there[name]
        self._fill(there)
        return component.to(device)

    def _has(self, key: str, value: torch.Tensor) -> bool:
        """Whether the file has the bytes of this tensor, as they are in memory."""
        header = self._header_with(key)
        dtype = DTYPES.get(header.dtypes.get(key, ""))
        return dtype == value.dtype and header.shapes[key] == value.shape and value.is_contiguous()

    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        headers = {key: self._header_with(key) for key in values}
        read_into(
            (self._folder / self._name_of(key), headers[key].bytes + headers[key].places[key][0], value)
            for key, value in values.items()
        )

    def _name_of(self, key: str) -> str:
        return self._shard_of.get(key, self._names[0])

    def _header_with(self, key: str) -> Header:
        """The header of the file that has this tensor, if one has it."""
        name = self._name_of(key)
        if name not in self._headers:
            self._headers[name] = header_of(self._folder / name)
        return self._headers[name]
