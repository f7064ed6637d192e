"""One job, in order: parse → fetch → generate → encode → upload → result.

The only module that touches both sides: the worker's files and networks, and the pipelines. Blocking work runs in threads;
a lock keeps the GPU to one job, and fetching and uploading lie outside it.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from PIL import Image

from pipelines import Sampling, WanModel, load_pipeline
from pipelines import errors as pipeline_errors
from pipelines.base import Frames
from pipelines.catalog import LoraMode, Sampler
from pipelines.lora_file import Adapter
from pipelines.recipes import Recipe, documented, era_of, preview
from worker.download import Stopped
from worker.errors import Code, Problem, WorkerError
from worker.images import load_control_image
from worker.logs import log, stage
from worker.loras import fetch_lora
from worker.progress import Progress, Send, cloud_sender, terminal_bar
from worker.report import Output, prompt_settings, result_of, settings_of, sum_of_pixels, teaching_warnings
from worker.request import Shot, parse, shots_of
from worker.run import Run
from worker.settings import Settings, SettingsError
from worker.storage import Storage, storage_of, storage_of_job
from worker.video import encode

Job = dict[str, Any]
Result = dict[str, Any]

_CODE_OF: dict[type[Exception], Code] = {
    pipeline_errors.CheckpointNotFound: Code.CHECKPOINT_NOT_FOUND,
    pipeline_errors.ToolkitRequired: Code.AI_TOOLKIT_REQUIRED,
    pipeline_errors.LoraInvalid: Code.LORA_INVALID,
    pipeline_errors.LoraIncompatible: Code.LORA_INCOMPATIBLE,
    pipeline_errors.OutOfMemory: Code.OUT_OF_MEMORY,
}


def cold_start(settings: Settings) -> JobRunner:
    """Load the model of `settings`. Raises SettingsError, and WorkerError: AI_TOOLKIT_REQUIRED, CHECKPOINT_NOT_FOUND."""
    storage = storage_of(settings)
    try:
        with stage("cold start", model=settings.model_id, device=settings.device):
            model = load_pipeline(
                settings.model_id,
                settings.checkpoint_dir,
                settings.device,
                settings.offload_mode,
                settings.ai_toolkit_path,
            )
    except pipeline_errors.DeviceUnavailable as error:
        raise SettingsError(str(error)) from error
    except pipeline_errors.PipelineError as error:
        raise _worker_error(error) from error
    return JobRunner(settings, model, storage)


class JobRunner:
    """Runs jobs on one loaded model. Jobs may overlap; the GPU does one at a time."""

    def __init__(self, settings: Settings, model: WanModel, storage: Storage) -> None:
        self._settings = settings
        self._model = model
        self._storage = storage
        self._gpu = asyncio.Lock()

    async def run(self, job: Job) -> Result:
        """The handler. Takes `{"id", "input", "s3Config"?}` and returns the documented result, or `{"error": "CODE: …"}`.

        An error is a result: nothing but a cancellation is raised.
        """
        job_id = _safe_id(job.get("id"))
        try:
            with stage("job", job=job_id):
                return await self._run(job, job_id)
        except Exception as error:
            return {"error": str(_told(error, job_id))}

    async def _run(self, job: Job, job_id: str) -> Result:
        request = parse(job.get("input"), self._model.spec)
        storage = self._storage
        if job.get("s3Config"):
            storage = storage_of_job(job["s3Config"], self._settings)
        match = request.match or self._settings.default_match
        if match == "preview" and self._settings.offload_mode == "sequential":
            text = "this worker runs with OFFLOAD_MODE=sequential, which cannot merge LoRAs; send documented"
            raise WorkerError.of([Problem(Code.INVALID_INPUT, "match", text)])
        mode: LoraMode = "merge" if match == "preview" else self._settings.lora_mode
        with tempfile.TemporaryDirectory(prefix="worker-wan-lora-") as folder:
            progress = Progress([prompt.sample_steps for prompt in request.prompts])
            run = Run(job_id, request, match, mode, storage, Path(folder), progress)
            async with self._sender(job) as send, run.progress.sent_by(send):
                async with self._in_time(run):
                    adapters, images = await self._fetch(run)
                    await run.in_thread(self._decide, run, adapters, images)
                outcomes = await self._make_and_store(run, adapters, images)
        if not any(isinstance(outcome, Output) for outcome in outcomes):
            raise next(outcome for outcome in outcomes if isinstance(outcome, WorkerError))
        return result_of(run, outcomes)

    def _decide(self, run: Run, adapters: list[Adapter], images: dict[str, Image.Image]) -> None:
        """How each prompt is made, from `match`, the LoRAs' metadata and the prompt's sampler; and what is said of it."""
        spec = self._model.spec
        files = [adapter.file for adapter in adapters]
        era, why = era_of(files)

        def recipe_for(sampler: Sampler | None) -> Recipe:
            return preview(spec, era, why, sampler) if run.match == "preview" else documented(spec, sampler)

        run.shots = shots_of(run.request, recipe_for)
        run.warnings = teaching_warnings(run, files, self._model.numbers_of)
        run.settings = settings_of(self._model.facts, adapters, run.match, run.mode)
        sums = {source: sum_of_pixels(image) for source, image in images.items()}
        run.prompt_settings = [
            prompt_settings(shot, self._model.numbers_of(shot.recipe), sums.get(run.control_image(shot))) for shot in run.shots
        ]

    @asynccontextmanager
    async def _in_time(self, run: Run) -> AsyncIterator[None]:
        """Stops the block when the job has used up its time. Raises WorkerError with TIMEOUT."""
        limit = self._settings.job_timeout
        left = None if limit is None else limit - (time.monotonic() - run.started)
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError:
            text = (
                f"the job took longer than the {limit:g} s of JOB_TIMEOUT; ask for fewer steps, frames or pixels, or raise it"
            )
            raise WorkerError(Code.TIMEOUT, text) from None

    def _sender(self, job: Job) -> AbstractAsyncContextManager[Send]:
        return cloud_sender(job) if self._settings.in_cloud else terminal_bar()

    async def _fetch(self, run: Run) -> tuple[list[Adapter], dict[str, Image.Image]]:
        """LoRAs, checked against the model, and the control images by their source. One error tells all that is wrong."""
        fields_of: dict[str, list[str]] = {}
        for index, prompt in enumerate(run.request.prompts):
            if prompt.control_image:
                name, source = prompt.control_image
                fields_of.setdefault(source, []).append(f"prompts[{index}].{name}")
        with stage("fetch", run.timings, job=run.id):
            loras = [run.in_thread(self._fetch_lora, run, index) for index in range(len(run.request.loras))]
            images = [
                run.in_thread(load_control_image, source, run.match, fields, self._settings.max_image_bytes, run.stop)
                for source, fields in fields_of.items()
            ]
            fetched = await asyncio.gather(*loras, *images, return_exceptions=True)
        problems: list[Problem] = []
        for outcome in fetched:
            if isinstance(outcome, WorkerError) and outcome.problems:
                problems += outcome.problems
            elif isinstance(outcome, BaseException):
                raise outcome
        if problems:
            raise WorkerError.of(problems)
        adapters = cast("list[Adapter]", fetched[: len(loras)])
        return adapters, dict(zip(fields_of, cast("list[Image.Image]", fetched[len(loras) :]), strict=True))

    def _fetch_lora(self, run: Run, index: int) -> Adapter:
        lora = run.request.loras[index]
        hf_token = run.request.hf_token or _secret(self._settings.hf_token)
        file = fetch_lora(lora, index, hf_token, self._settings, run.stop)
        adapter = Adapter(file, lora.network_multiplier, lora.transformer)
        try:
            run.lora_warnings[index] = self._model.check_lora(adapter, run.mode)
        except pipeline_errors.LoraError as error:
            raise _lora_error(error, index) from error
        return adapter

    async def _make_and_store(
        self, run: Run, adapters: list[Adapter], images: dict[str, Image.Image]
    ) -> list[Output | WorkerError]:
        """What became of every shot, in their order. A file is uploaded while the GPU makes the next one.

        A prompt that fails takes none of the others with it. Raises WorkerError when the LoRAs cannot be applied.
        """
        outcomes: list[asyncio.Future[Output] | WorkerError] = []
        try:
            try:
                async with self._in_time(run), self._turn_on_the_gpu(run):
                    await self._make(run, adapters, images, outcomes)
            except WorkerError as error:
                if not outcomes:
                    raise
                outcomes += [error] * (len(run.shots) - len(outcomes))
            run.progress.stage("upload", len(run.shots) - 1, run.shots[-1].sample_steps)
            return [outcome if isinstance(outcome, WorkerError) else await self._outcome(outcome, run) for outcome in outcomes]
        finally:
            uploads = [outcome for outcome in outcomes if isinstance(outcome, asyncio.Future)]
            for upload in uploads:
                upload.cancel()
            await asyncio.gather(*uploads, return_exceptions=True)

    async def _make(
        self,
        run: Run,
        adapters: list[Adapter],
        images: dict[str, Image.Image],
        outcomes: list[asyncio.Future[Output] | WorkerError],
    ) -> None:
        """Fill `outcomes`, shot by shot, with errors and with uploads under way."""
        run.progress.stage("load")
        with stage("load", run.timings, job=run.id):
            await run.in_thread(self._apply_loras, adapters, run.mode)
        for shot in run.shots:
            try:
                file = await run.in_thread(self._render, run, shot, images.get(run.control_image(shot)))
            except Exception as error:
                outcomes.append(_told(error, run.id))
            else:
                outcomes.append(asyncio.create_task(self._upload(run, shot, file)))

    @asynccontextmanager
    async def _turn_on_the_gpu(self, run: Run) -> AsyncIterator[None]:
        """Waits until no other job is on the GPU, and keeps it for the block."""
        run.progress.stage("wait")
        with stage("wait", run.timings, job=run.id):
            await self._gpu.acquire()
        try:
            yield
        finally:
            self._gpu.release()

    def _apply_loras(self, adapters: list[Adapter], mode: LoraMode) -> None:
        try:
            self._model.apply_loras(adapters, mode)
        except pipeline_errors.LoraError as error:
            raise _lora_error(error, error.position or 0) from error

    def _render(self, run: Run, shot: Shot, image: Image.Image | None) -> Path:
        """Generate and encode one video."""
        sampling = Sampling(
            prompt=shot.prompt,
            negative_prompt=shot.neg,
            width=shot.width,
            height=shot.height,
            num_frames=shot.num_frames,
            num_inference_steps=shot.sample_steps,
            guidance_scale=shot.guidance_scale,
            seed=shot.seed,
            control_image=image,
        )

        def on_step(step: int) -> None:
            run.check()
            run.progress.step(shot.index, step)

        run.check()
        run.progress.step(shot.index, 0)
        encoding = run.encoding(shot)
        target = run.folder / f"{shot.index}{encoding.suffix}"
        start, generating = time.monotonic(), run.timings.get("generate", 0.0)
        tag = json.dumps(run.settings | run.prompt_settings[shot.index])
        frames = self._timed_frames(run, shot, self._model.generate(sampling, shot.recipe, on_step))
        with stage("render", job=run.id, prompt_index=shot.index):
            encode(frames, target, encoding, shot.fps, tag)
        encoding_seconds = time.monotonic() - start - (run.timings["generate"] - generating)
        run.timings["encode"] = round(run.timings.get("encode", 0.0) + encoding_seconds, 3)
        return target

    @staticmethod
    def _timed_frames(run: Run, shot: Shot, frames: Iterator[Frames]) -> Iterator[Frames]:
        """Frames as they come, with the seconds that the pipeline took for them."""
        while True:
            start = time.monotonic()
            chunk = next(frames, None)
            run.timings["generate"] = round(run.timings.get("generate", 0.0) + time.monotonic() - start, 3)
            if chunk is None:
                return
            run.check()
            run.progress.stage("encode", shot.index, shot.sample_steps)
            yield chunk

    async def _upload(self, run: Run, shot: Shot, file: Path) -> Output:
        encoding, size = run.encoding(shot), file.stat().st_size
        with stage("upload", run.timings, job=run.id, prompt_index=shot.index, bytes=size):
            stored = await run.in_thread(run.storage.put, file, f"{run.id}/{file.name}", encoding.content_type)
        file.unlink()
        return Output(shot, stored, size)

    async def _outcome(self, upload: asyncio.Future[Output], run: Run) -> Output | WorkerError:
        try:
            return await upload
        except Exception as error:
            return _told(error, run.id)


def _worker_error(error: Exception) -> Exception:
    """A pipeline's error with its code; a worker's error and anything unforeseen as it is."""
    if isinstance(error, Stopped):
        return WorkerError(Code.CANCELLED, "the job was stopped")
    code = _CODE_OF.get(type(error))
    return WorkerError(code, str(error)) if code else error


def _told(error: Exception, job_id: str) -> WorkerError:
    """Log what a client will be told: its own error in a line, and a fault of the worker with its traceback."""
    error = _worker_error(error)
    if isinstance(error, WorkerError):
        log.warning("%s", error, extra={"fields": {"job": job_id}})
        return error
    log.error("a fault of the worker", exc_info=error, extra={"fields": {"job": job_id}})
    return WorkerError(Code.INTERNAL, f"a fault of the worker; its log says more under {job_id}")


def _lora_error(error: pipeline_errors.LoraError, index: int) -> WorkerError:
    return WorkerError.of([Problem(_CODE_OF[type(error)], f"loras[{index}].path", str(error))])


def _safe_id(job_id: Any) -> str:
    """The job's id as a part of a key or a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(job_id or "job"))[:100]


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value is not None else None
