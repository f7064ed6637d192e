"""The weights as the checkpoint's files have them. Everything that changes weights for a job starts from and returns to these.

The files stay memory-mapped, which costs no memory of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipelines.weights import file_names, index_of


class CheckpointFile:
    """A component's safetensors file or shards, opened on first use."""

    def __init__(self, folder: Path, component: str) -> None:
        self._folder = folder
        self._shard_of = index_of(folder, component)
        self._names = file_names(folder, component)
        self._open: dict[str, Any] = {}

    def read(self, key: str) -> torch.Tensor:
        """The tensor in the file's dtype, in memory only while it is used. Raises OSError where there is no such file."""
        name = self._shard_of[key] if self._shard_of else self._names[0]
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        tensor: torch.Tensor = self._open[name].get_tensor(key)
        return tensor

    @torch.no_grad()
    def restore(self, component: torch.nn.Module, parameters: set[str]) -> None:
        """Give these parameters their values in the file; each leaves the set when it has them."""
        for parameter in sorted(parameters):
            value = component.get_parameter(parameter)
            value.copy_(self.read(parameter).to(value.dtype))
            parameters.discard(parameter)
