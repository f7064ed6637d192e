"""What can go wrong in a pipeline, without a word about jobs: the worker gives each its code and the field."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errno of an OSError where a disk is full, or a quota used up."""


class PipelineError(Exception):
    """Base of all of them; the text is for the person who sent the request or started the worker."""


class CheckpointNotFound(PipelineError):
    """A folder or file that the model needs is not below the checkpoint folder."""


class ToolkitRequired(PipelineError):
    """The model runs on an ai-toolkit checkout, and there is none that can be used."""


class LibraryMoved(PipelineError):
    """A library is of a version that keeps something elsewhere than the tested one, and there is no way around it."""


class DeviceUnavailable(PipelineError):
    """The device asked for is not there, or cannot do what the settings ask of it."""


class LoraError(PipelineError):
    """One LoRA is at fault. `position`: which of those that were to be applied, where that is known."""

    position: int | None = None


@contextmanager
def blamed_on(position: int) -> Iterator[None]:
    """Give a LoraError raised in the block its position."""
    try:
        yield
    except LoraError as error:
        error.position = position
        raise


class LoraInvalid(LoraError):
    """The file is not a safetensors file that can be read to its end, or its numbers are no numbers."""


class LoraIncompatible(LoraError):
    """The file is fine, but its keys or shapes do not fit the loaded transformer."""


class DeviceLost(PipelineError):
    """The device no longer computes, whatever it is given: only a new process, or another device, helps."""


class MemoryLost(DeviceLost):
    """A device ran out of memory in an exchange with others, which wait for it in vain."""


class RankFailed(PipelineError):
    """Another process that makes the same video could not go on. It has the reason."""


class OutOfMemory(PipelineError):
    """The device ran out of memory; caches were freed and the pipeline can be used again."""
