"""Turns every exception that can end a job or a start into the WorkerError that the client or the operator gets."""

from __future__ import annotations

from pipelines.errors import (
    DISK_FULL,
    CheckpointNotFound,
    DeviceLost,
    LoraError,
    LoraIncompatible,
    LoraInvalid,
    MemoryLost,
    OutOfMemory,
    ToolkitRequired,
)
from worker.errors import Code, Problem, Stopped, WorkerError
from worker.logs import log

_CODE_OF: dict[type[Exception], Code] = {
    CheckpointNotFound: Code.CHECKPOINT_NOT_FOUND,
    ToolkitRequired: Code.AI_TOOLKIT_REQUIRED,
    LoraInvalid: Code.LORA_INVALID,
    LoraIncompatible: Code.LORA_INCOMPATIBLE,
    OutOfMemory: Code.OUT_OF_MEMORY,
    MemoryLost: Code.OUT_OF_MEMORY,
}


def report(error: Exception, job_id: str) -> WorkerError:
    """Log `error` and return what the client gets. An error that was reported before is not logged again."""
    known = worker_error(error)
    if known is None:
        log.error("internal error", exc_info=error, extra={"fields": {"job": job_id}})
        text = f"internal error; search the worker's log for job {job_id}"
        if isinstance(error, DeviceLost):
            text = "the GPU failed and this worker is shutting down; send the job again"
        known = WorkerError(Code.INTERNAL, text)
    elif not known.is_reported:
        log.warning("%s", known, extra={"fields": {"job": job_id}})
    known.is_reported = True
    return known


def worker_error(error: Exception) -> WorkerError | None:
    """Return the documented error for `error`; None for an unexpected error, and for a device that is lost without a
    reason that the client can do something about."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, Stopped):
        return WorkerError(Code.CANCELLED, "the job was stopped")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return WorkerError(
            Code.INTERNAL, "the worker's disk is full; give its container more, or ask for fewer or smaller videos"
        )
    code = _CODE_OF.get(type(error))
    return WorkerError(code, str(error)) if code else None


def lora_error(error: LoraError, field: str) -> WorkerError:
    """Return the error of the LoRA that `field` names: `extra_loras[1]` or the like, or `draft`."""
    where = field if field == "draft" else f"{field}.path"
    return WorkerError.of([Problem(_CODE_OF[type(error)], where, str(error))])
