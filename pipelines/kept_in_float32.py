"""What diffusers keeps in float32 in a model of 16 bits, and the trainer does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch


class KeptInFloat32:
    """The tensors of a bf16 model that diffusers keeps in a wider dtype, and the trainer does not."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._is_cast = False
        self._wide = [
            (owner, name, tensor)
            for model, dtype in [(model, model.dtype) for model in models]  # diffusers walks through all modules to find it
            for module in model.modules()
            for owner in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers))
            for name, tensor in owner.items()
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype
        ]

    def cast(self, dtype: torch.dtype) -> bool:
        """Cast them as the trainer's `.to(dtype)` on the whole model does. Whether there was anything to do."""
        if self._is_cast:
            return False
        for owner, name, tensor in self._wide:
            narrow = tensor.detach().to(dtype)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            owner[name] = torch.nn.Parameter(narrow, requires_grad=False) if is_parameter else narrow
        self._is_cast = True
        return True

    def restore(self) -> bool:
        """Put the very tensors of the load back. Whether there was anything to do."""
        if not self._is_cast:
            return False
        for owner, name, tensor in self._wide:
            owner[name] = tensor
        self._is_cast = False
        return True
