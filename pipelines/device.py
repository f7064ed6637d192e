"""What a device's failure means: no memory, no device, or only that error."""

from __future__ import annotations

import contextlib
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipelines.errors import DeviceLost, MemoryLost, OutOfMemory, RankFailed


def answers(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access, an assert or an ECC error it does not, for ever."""
    try:
        probe = torch.ones(8, device=device)
        return float((probe + probe).sum()) == 16
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


@contextmanager
def device_errors(device: torch.device, refresh: Callable[[], None], remedy: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemory, DeviceLost or what the block raises, told apart by a probe of the device and not by the error's text.

    `refresh` brings back to main memory what a pass that died left on the device. Streaming would throw it away, with
    whatever is written into it by then. `remedy`: what the operator can do about too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError, RankFailed) as error:  # any of them in the midst of a pass
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            free(error, device)
        if not answers(device):
            raise DeviceLost("the device no longer answers") from error
        try:
            refresh()
        except (RuntimeError, MemoryError):
            raise DeviceLost("the model does not fit back into main memory") from error
        if out_of_memory:
            raise OutOfMemory(f"the device ran out of memory; ask for fewer frames or a smaller size, or {remedy()}") from None
        raise


@contextmanager
def exchange_errors() -> Iterator[None]:
    """Raise DeviceLost for the RuntimeError with which torch says that another process ended or that nothing came in time.

    Raises MemoryLost when there was no memory for the exchange.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryLost(
                "the memory ran out while the GPUs exchanged their results; ask for fewer frames or a smaller size, or run the "
                "worker with GPUS=1 or larger GPUs"
            ) from error
        raise DeviceLost("another GPU's process ended, or is silent; if this happens at every start, set GPUS=1") from error


def free(error: Exception, device: torch.device) -> None:
    """Give back what the call that died of `error` had in memory."""
    traceback.clear_frames(error.__traceback__)  # they hold its tensors: without this there is nothing to free yet
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a dead device
            torch.cuda.empty_cache()


_OUT_OF_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator|can't allocate memory|ALLOC_FAILED|ALLOCATION_FAILED", re.IGNORECASE
)
"""cudaHostAlloc (pinned memory) says "out of memory", cuBLAS and cuDNN "…_STATUS_ALLOC_FAILED"."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for want of memory. torch has a type for CUDA's own; other libraries only say it in their text."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
