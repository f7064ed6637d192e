"""The process: takes jobs, makes a job that is delivered twice only once, and shuts down when the GPU is lost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from pipelines import WanModel
from pipelines.catalog import OFFLOAD, ModelSpec
from worker import logs
from worker.deadline import Deadline
from worker.delivery import Delivery, Identity
from worker.errors import Code, Problem, WorkerError
from worker.faults import report
from worker.files import scratch
from worker.gpu import Gpu
from worker.job import Job, Result
from worker.logs import log, stage
from worker.parse import parse
from worker.progress import Progress, Send, terminal_bar
from worker.ranks import Ranks
from worker.recovery import Recovery
from worker.request import Request
from worker.run import Run, left_behind
from worker.settings import Settings
from worker.storage.base import Storage
from worker.storage.choice import MAX_S3_FIELDS, storage_of_job

_ID_OF_A_LOCAL_RUN = "local_test"
"""The SDK's id for every job of `python handler.py` that has none."""
_SECONDS_AHEAD = 10.0
"""How long before the GPU is free the next job is taken. Downloading a large LoRA takes longer, but most jobs need none."""


class Service:
    """Serves jobs with one loaded model. Jobs may overlap; the GPU runs one at a time."""

    def __init__(self, settings: Settings, model: WanModel, storage: Storage, ranks: Ranks | None = None) -> None:
        self._settings = settings
        self._storage = storage
        self._gpu = Gpu(model, ranks or Ranks())
        self._recovery = Recovery(settings.recovery_dir, settings.recovery_max_bytes)
        self._scratch = scratch().name
        self._runs: list[Run] = []
        self._duplicate_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Locks by the checksum of the identity: a job that is delivered again while it runs waits for its own result."""

    @property
    def must_be_replaced(self) -> bool:
        """Whether the GPU no longer computes, or a thread does not stop."""
        return self._gpu.is_lost or left_behind.is_set()

    async def run(self, raw_job: dict[str, Any]) -> Result:
        """The handler. Takes `{"id", "input", "s3Config"?}` and returns the documented result, or `{"error": "CODE: …"}`.

        A job of the local API has `send` too, which gets the progress updates. Raises nothing but a cancellation.
        """
        job_id = _safe_id(raw_job.get("id"))
        with logs.hidden(_secrets_of(raw_job)):
            try:
                with stage("job", job=job_id), self._started(raw_job, job_id) as run:
                    async with self._sender(raw_job) as send, run.progress.sent_by(send), self._after_its_duplicate(run):
                        return await Job(run, self._gpu, self._settings).result()
            except Exception as error:
                return {"error": str(report(error, job_id))}
            finally:
                self._shut_down_if_lost()

    def wants_a_job(self) -> bool:
        """Return whether to take another job now: no job waits for the GPU, and the one that holds it ends soon."""
        ahead = [run for run in self._runs if run.needs_the_gpu]
        return not ahead or (len(ahead) == 1 and ahead[0].progress.seconds_left < _SECONDS_AHEAD)

    @contextmanager
    def _started(self, raw_job: dict[str, Any], job_id: str) -> Iterator[Run]:
        """Check the request and create a run, with a folder for its files. Nothing is downloaded yet."""
        settings, raw_input, s3_config = self._settings, raw_job.get("input"), raw_job.get("s3Config")
        request = parse(raw_input, self._gpu.model.spec)
        match = request.match or ("documented" if request.draft else settings.default_match)
        offload_mode = self._gpu.model.facts["offload_mode"]
        if match == "preview" and not OFFLOAD[offload_mode].can_merge:
            text = f"this worker runs with OFFLOAD_MODE={offload_mode}, which cannot merge LoRAs; set `match` to documented"
            raise WorkerError.of([Problem(Code.INVALID_INPUT, "match", text)])
        storage = storage_of_job(s3_config, settings) if s3_config else self._storage
        identity = Identity.of(None if raw_job.get("id") in (None, _ID_OF_A_LOCAL_RUN) else job_id, raw_input)
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as folder:
            run = Run(
                id=job_id,
                identity=identity,
                request=request,
                match=match,
                mode="merge" if match == "preview" else settings.lora_mode,
                delivery=Delivery(storage, not s3_config, self._recovery, job_id, identity),
                folder=Path(folder),
                progress=Progress(_step_counts(request, self._gpu.model.spec)),
                deadline=Deadline(settings.seconds_per_job),
                upload_timeout=settings.upload_timeout,
            )
            self._runs.append(run)
            try:
                with run.held:
                    yield run
            finally:
                self._runs.remove(run)

    @asynccontextmanager
    async def _after_its_duplicate(self, run: Run) -> AsyncIterator[None]:
        """Wait while the same job, delivered earlier, is running."""
        lock = self._duplicate_locks.setdefault(run.identity.sum, asyncio.Lock())
        run.needs_the_gpu = not lock.locked()
        async with lock:
            run.needs_the_gpu = True
            yield

    def _sender(self, raw_job: dict[str, Any]) -> AbstractAsyncContextManager[Send]:
        if self._settings.in_cloud:
            from worker.runpod.queue import progress_sender  # other modes of the worker do not need the SDK

            return progress_sender(raw_job)
        return nullcontext(raw_job["send"]) if "send" in raw_job else terminal_bar()

    def _shut_down_if_lost(self) -> None:
        """Tell the process to end when this job's result is sent. A single local run ends by itself."""
        if self.must_be_replaced and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            log.error("the GPU failed, or a thread does not stop; the worker shuts down and must be replaced")
            os.kill(os.getpid(), signal.SIGTERM)


def _step_counts(request: Request, spec: ModelSpec) -> list[int]:
    """Return the denoising steps of each video."""
    of_draft = len(spec.draft.timesteps) if request.draft and spec.draft else None
    return [of_draft or prompt.sample_steps for prompt in request.prompts for _ in range(prompt.num_videos)]


def _safe_id(job_id: Any) -> str:
    """Return the job's id as a part of a key or a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(job_id or "job"))[:100]


def _secrets_of(raw_job: dict[str, Any]) -> list[str]:
    """Return the secrets that an unchecked job may contain."""
    raw_input, s3_config = raw_job.get("input"), raw_job.get("s3Config")
    found = [raw_input.get("hf_token")] if isinstance(raw_input, dict) else []
    found += s3_config.values() if isinstance(s3_config, dict) and len(s3_config) <= MAX_S3_FIELDS else []
    return [value for value in found if isinstance(value, str)]
