"""A stand-in for a GPU's memory, on a CPU: diffusers' streaming with its streams, pinned memory and transfers, all as copies.

Frames come out bit for bit, so that whatever differs is the state of the offloading. The copies are real: what is written into
a tensor "on the device" is lost when the tensor goes back, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from torch.utils.hooks import RemovableHandle

from pipelines import WanModel, offload
from pipelines.catalog import OffloadMode

CPU = torch.device("cpu")


class _Stream:
    def synchronize(self) -> None: ...


class _Backend:
    """What diffusers asks of a device with streams."""

    def __init__(self, _device: torch.device) -> None:
        self.Stream = _Stream

    def current_stream(self) -> _Stream:
        return _Stream()

    def stream(self, _stream: _Stream) -> Any:
        return nullcontext()


class StandInDevice:
    """Copies in place of transfers; it can run out of memory at a transfer, or while a module computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.transfers = 0
        self.fails_at: int | None = None
        """The number of the transfer that finds no memory."""
        monkeypatch.setattr(group_offloading, "TorchDeviceBackend", _Backend)
        group = group_offloading.ModuleGroup
        monkeypatch.setattr(group, "_to_cpu", staticmethod(lambda tensor, _low: tensor.data.clone()))
        monkeypatch.setattr(group, "_pinned_memory_tensors", lambda group: nullcontext(group.cpu_param_dict))
        monkeypatch.setattr(group, "_transfer_tensor_to_device", self._transfer)
        monkeypatch.setattr(offload, "apply_group_offloading", _apply)
        monkeypatch.setattr(offload, "copy_to", self.copy_to)
        monkeypatch.setattr(offload, "pinned", torch.clone)

    def place(self, model: WanModel, mode: OffloadMode) -> WanModel:
        """Have a model, loaded on a CPU, offloaded as on a GPU."""
        model._offloading = offload.place(model._pipe, torch.device("cuda"), mode)
        model.facts["offload_mode"] = model.loras.offload_mode = mode
        model.bytes_by_mode = dict.fromkeys(model.spec.offload_modes, 0)
        return model

    def copy_to(self, tensor: torch.Tensor, _device: torch.device) -> torch.Tensor:
        self.transfers += 1
        if self.transfers == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.data.clone()

    def _transfer(self, tensor: torch.Tensor, source: torch.Tensor, _stream: Any) -> None:
        tensor.data = self.copy_to(source, CPU)

    @contextmanager
    def full(self, after: int) -> Iterator[None]:
        """Within this block, the transfer after so many others finds no memory."""
        self.fails_at = self.transfers + after + 1
        try:
            yield
        finally:
            self.fails_at = None


@contextmanager
def full_in(module: torch.nn.Module, call: int = 1) -> Iterator[None]:
    """Within this block, the module finds no memory to compute in when it is called for the `call`th time."""
    calls = 0

    def fail(_module: torch.nn.Module, _inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle: RemovableHandle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def _apply(component: torch.nn.Module, offload_type: str, num_blocks_per_group: int | None = None, **_: Any) -> None:
    """diffusers' function of that name, without its check that the device is no CPU."""
    config = group_offloading.GroupOffloadingConfig(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=group_offloading.GroupOffloadingType(offload_type),
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=False,
        num_blocks_per_group=num_blocks_per_group,
        stream=_Stream(),  # type: ignore[arg-type]
    )
    group_offloading._apply_group_offloading(component, config)
