"""One job, in order: parse → fetch → generate → encode → upload → result.

The only module that touches both sides: the worker's files and networks, and the pipelines. Blocking work runs in threads;
a lock keeps the GPU to one job, and fetching and uploading lie outside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

from PIL import Image

from pipelines import Sampling, WanModel
from pipelines import errors as pipeline_errors
from pipelines.catalog import LoraMode, Sampler
from pipelines.lora.file import Adapter
from pipelines.recipes import Recipe, documented, era_of, preview
from worker import logs
from worker.deadline import Deadline
from worker.delivery import Delivery, Identity
from worker.errors import Code, Problem, WorkerError
from worker.files import scratch
from worker.frame_queue import Abandoned, Handover
from worker.images import Allowance, load_control_image
from worker.logs import log, stage
from worker.loras import fetch_lora
from worker.net.download import Stopped
from worker.pictures import JPEG, Camera, Picture
from worker.progress import Progress, Send, cloud_sender, terminal_bar
from worker.recovery import Recovery
from worker.report import (
    Output,
    PictureItems,
    picture_item,
    prompt_settings,
    result_of,
    settings_of,
    sum_of_pixels,
    teaching_warnings,
)
from worker.request import Shot, parse, shots_of
from worker.run import Run, in_thread
from worker.settings import Settings
from worker.storage import Storage, Stored, storage_of_job
from worker.video import encode

Job = dict[str, Any]
Result = dict[str, Any]

CODE_OF: dict[type[Exception], Code] = {
    pipeline_errors.CheckpointNotFound: Code.CHECKPOINT_NOT_FOUND,
    pipeline_errors.ToolkitRequired: Code.AI_TOOLKIT_REQUIRED,
    pipeline_errors.LoraInvalid: Code.LORA_INVALID,
    pipeline_errors.LoraIncompatible: Code.LORA_INCOMPATIBLE,
    pipeline_errors.OutOfMemory: Code.OUT_OF_MEMORY,
}


Outcomes = dict[int, Output | WorkerError]
"""By the index of the prompt: its file, or why there is none."""

_ID_OF_A_LOCAL_RUN = "local_test"
"""What the SDK calls every job of `python handler.py` that names no id."""
_FETCHES_AT_ONCE = 8
_SECONDS_AHEAD = 10.0
"""Before the GPU is free, the next job is taken; a download of a large LoRA takes longer, and most jobs bring none."""
_SECONDS_TO_UPLOAD = 15.0
"""For what was finished just before the job's time was over."""
_SECONDS_FOR_A_PICTURE = 10.0
"""A few tries, after which the result goes out without the poster; a bucket that has just taken the video seldom needs two."""


class JobRunner:
    """Runs jobs on one loaded model. Jobs may overlap; the GPU does one at a time."""

    def __init__(self, settings: Settings, model: WanModel, storage: Storage) -> None:
        self._settings = settings
        self._model = model
        self._storage = storage
        self._recovery = Recovery(settings.recovery_dir)
        self._scratch = scratch().name
        self._gpu = asyncio.Lock()
        self._runs: list[Run] = []
        self._one_of_a_kind: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By the identity's sum: a job that is delivered again while it runs waits for its own result."""
        self._gpu_thread = ThreadPoolExecutor(1, "gpu")
        self._fetching = ThreadPoolExecutor(_FETCHES_AT_ONCE, "fetch")
        self.device_is_lost = False
        """Set when the device no longer computes: the worker must be replaced."""

    async def run(self, job: Job) -> Result:
        """The handler. Takes `{"id", "input", "s3Config"?}` and returns the documented result, or `{"error": "CODE: …"}`.

        `send`, in a job of the local API, gets the updates. An error is a result: nothing but a cancellation is raised.
        """
        job_id = _safe_id(job.get("id"))
        try:
            with logs.hidden(_secrets_of(job)), stage("job", job=job_id), self._starting(job, job_id) as run:
                async with self._sender(job) as send, run.progress.sent_by(send):
                    return await self._run(run)
        except Exception as error:
            return {"error": str(self._told(error, job_id))}
        finally:
            self._leave_if_the_device_is_lost()

    def wants_a_job(self) -> bool:
        """Whether to take another job now: none waits for the GPU, and the one that is on it will soon be done."""
        ahead = [run for run in self._runs if not run.is_past_the_gpu]
        return not ahead or (len(ahead) == 1 and ahead[0].progress.seconds_left < _SECONDS_AHEAD)

    @contextmanager
    def _starting(self, job: Job, job_id: str) -> Iterator[Run]:
        """The job as it begins: its request checked, a folder for its files, nothing fetched."""
        request = parse(job.get("input"), self._model.spec)
        match = request.match or self._settings.default_match
        if match == "preview" and self._model.facts["offload_mode"] == "sequential":
            text = "this worker runs with OFFLOAD_MODE=sequential, which cannot merge LoRAs; send documented"
            raise WorkerError.of([Problem(Code.INVALID_INPUT, "match", text)])
        s3_config = job.get("s3Config")
        storage = storage_of_job(s3_config, self._settings) if s3_config else self._storage
        identity = Identity.of(None if job.get("id") in (None, _ID_OF_A_LOCAL_RUN) else job_id, job.get("input"))
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            run = Run(
                id=job_id,
                identity=identity,
                request=request,
                match=match,
                mode="merge" if match == "preview" else self._settings.lora_mode,
                delivery=Delivery(storage, not s3_config, self._recovery, job_id, identity),
                folder=Path(folder),
                progress=Progress([prompt.sample_steps for prompt in request.prompts]),
                deadline=Deadline(self._settings.seconds_per_job),
            )
            self._runs.append(run)
            try:
                with run.held:
                    yield run
            finally:
                self._runs.remove(run)

    async def _run(self, run: Run) -> Result:
        lock = self._one_of_a_kind.setdefault(run.identity.sum, asyncio.Lock())
        async with lock:
            return await self._run_alone(run)

    async def _run_alone(self, run: Run) -> Result:
        async with self._in_time(run):
            await run.in_thread(run.delivery.check)
            if recalled := await run.in_thread(run.delivery.recall):
                return recalled
            adapters, images = await self._fetch(run)
            await run.in_thread(self._decide, run, adapters, images)
        outcomes = await self._make_and_store(run, adapters, images)
        if not any(isinstance(outcome, Output) for outcome in outcomes):
            raise next(outcome for outcome in outcomes if isinstance(outcome, WorkerError))
        result = result_of(run, outcomes)
        if "errors" not in result:
            await run.in_thread(run.delivery.remember, result, run.folder)
        return result

    def _decide(self, run: Run, adapters: list[Adapter], images: dict[str, Image.Image]) -> None:
        """How each prompt is made, from `match`, the LoRAs' metadata and the prompt's sampler; and what is said of it."""
        spec = self._model.spec
        files = [adapter.file for adapter in adapters]
        era, why = era_of(files)

        def recipe_for(sampler: Sampler | None) -> Recipe:
            return preview(spec, era, why, sampler) if run.match == "preview" else documented(spec, sampler)

        run.shots = shots_of(run.request, recipe_for, run.identity.seed)
        run.warnings = teaching_warnings(run, files, self._model.numbers_of)
        run.settings = settings_of(self._model.facts, adapters, run.match, run.mode)
        sums = {source: sum_of_pixels(image) for source, image in images.items()}
        run.prompt_settings = [
            prompt_settings(shot, self._model.numbers_of(shot.recipe), sums.get(run.control_image(shot))) for shot in run.shots
        ]

    @asynccontextmanager
    async def _in_time(self, run: Run) -> AsyncIterator[None]:
        """Stops the block when the job has used up its time. Raises WorkerError with TIMEOUT."""
        try:
            async with asyncio.timeout(run.deadline.left()):
                yield
        except TimeoutError:
            raise run.deadline.error() from None

    def _sender(self, job: Job) -> AbstractAsyncContextManager[Send]:
        if self._settings.in_cloud:
            return cloud_sender(job)
        return nullcontext(job["send"]) if "send" in job else terminal_bar()

    async def _fetch(self, run: Run) -> tuple[list[Adapter], dict[str, Image.Image]]:
        """LoRAs, checked against the model, and the control images by their source. One error tells all that is wrong."""
        fields_of: dict[str, list[str]] = {}
        for index, prompt in enumerate(run.request.prompts):
            if prompt.control_image:
                name, source = prompt.control_image
                fields_of.setdefault(source, []).append(f"prompts[{index}].{name}")
        with stage("fetch", run.timings, job=run.id):
            loras = [
                in_thread(run.stop, self._fetch_lora, run, index, executor=self._fetching)
                for index in range(len(run.request.loras))
            ]
            allowance = Allowance()
            images = [
                in_thread(run.stop, self._fetch_image, run, source, fields, allowance, executor=self._fetching)
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

    def _fetch_image(self, run: Run, source: str, fields: list[str], allowance: Allowance) -> Image.Image:
        run.check()
        limits = (self._settings.max_image_bytes, run.stop, self._settings.allow_private_downloads)
        return load_control_image(source, run.match, fields, allowance, *limits)

    def _fetch_lora(self, run: Run, index: int) -> Adapter:
        lora = run.request.loras[index]
        hf_token = run.request.hf_token or _secret(self._settings.hf_token)
        file = fetch_lora(lora, index, hf_token, self._settings, run.stop, run.held)
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

        A prompt that fails takes none of the others with it, and what an earlier delivery of the job finished is not made
        again. Raises WorkerError when the LoRAs cannot be applied.
        """
        outcomes = await in_thread(run.stop_delivery, self._find, run)
        finishing: dict[int, asyncio.Task[Output]] = {}
        try:
            if missing := [shot for shot in run.shots if shot.index not in outcomes]:
                await self._make(run, missing, adapters, images, outcomes, finishing)
            run.progress.stage("upload", len(run.shots) - 1, run.shots[-1].sample_steps)
            outcomes |= {index: await self._settled(task, run) for index, task in finishing.items()}
            return [outcomes[shot.index] for shot in run.shots]
        finally:
            for task in finishing.values():
                task.cancel()
            await asyncio.gather(*finishing.values(), return_exceptions=True)

    def _find(self, run: Run) -> Outcomes:
        """The shots that an earlier delivery of the job finished."""
        found: Outcomes = {}
        for shot in run.shots:
            if run.stop_delivery.is_set():
                raise Stopped
            encoding = run.encoding(shot)
            name = f"{shot.index}{encoding.suffix}"
            try:
                stored = run.delivery.find(name, encoding.content_type, self._give_up_at(run), run.stop_delivery)
            except WorkerError as error:
                found[shot.index] = error
            else:
                if stored:
                    found[shot.index] = Output(shot, stored, self._find_pictures(run, shot))
        return found

    def _find_pictures(self, run: Run, shot: Shot) -> PictureItems:
        """Those beside a video that was found. One that is not there cannot be made without the frames."""
        found: PictureItems = {}
        for picture in run.pictures(shot):
            name, give_up_at = f"{shot.index}{picture.suffix}", time.monotonic() + _SECONDS_FOR_A_PICTURE
            try:
                stored = run.delivery.find(name, JPEG, give_up_at, run.stop_delivery)
            except WorkerError as error:
                run.warn_of_picture(shot, picture, self._told(error, run.id).message)
            else:
                if stored:
                    found[picture.kind] = picture_item(picture, stored)
                else:
                    run.warn_of_picture(shot, picture, "it was not found beside the video, which an earlier worker made")
        return found

    async def _make(
        self,
        run: Run,
        missing: list[Shot],
        adapters: list[Adapter],
        images: dict[str, Image.Image],
        outcomes: Outcomes,
        finishing: dict[int, asyncio.Task[Output]],
    ) -> None:
        """Make the missing shots: `finishing` gets what was made and is being encoded and uploaded, `outcomes` the errors."""
        try:
            async with self._in_time(run), self._turn_on_the_gpu(run):
                run.progress.stage("load")
                with stage("load", run.timings, job=run.id):
                    await self._on_the_gpu(run, self._apply_loras, adapters, run.mode)
                for shot in missing:
                    image = images.get(run.control_image(shot))
                    try:
                        async with self._encoder(run, shot, finishing) as frames:
                            await self._on_the_gpu(run, self._generate, run, shot, image, frames)
                    except pipeline_errors.DeviceLost:
                        raise
                    except Exception as error:
                        outcomes[shot.index] = self._told(error, run.id)
        except (WorkerError, pipeline_errors.PipelineError) as error:
            if not outcomes and not finishing:
                raise
            told = self._told(error, run.id)
            for shot in missing:
                if shot.index not in finishing:
                    outcomes.setdefault(shot.index, told)

    @asynccontextmanager
    async def _encoder(self, run: Run, shot: Shot, finishing: dict[int, asyncio.Task[Output]]) -> AsyncIterator[Handover]:
        """Takes the frames that the block makes; encodes and uploads them behind its back.

        `finishing` gets the task when the frames are all made, and also when they are not because it has failed.
        """
        frames = Handover()
        task = asyncio.create_task(self._finish(run, shot, frames))
        try:
            yield frames
            frames.end(whole=True)
        except Abandoned:
            pass
        except BaseException:
            frames.end(whole=False)
            await asyncio.gather(task, return_exceptions=True)
            raise
        finishing[shot.index] = task

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
            run.is_past_the_gpu = True

    def _apply_loras(self, adapters: list[Adapter], mode: LoraMode) -> None:
        try:
            self._model.apply_loras(adapters, mode)
        except pipeline_errors.LoraError as error:
            raise _lora_error(error, error.position or 0) from error

    async def _on_the_gpu(self, run: Run, function: Callable[..., None], *arguments: Any) -> None:
        """One thread for all GPU work: what CUDA and compiled code keep for a thread is then made once."""
        await in_thread(run.stop, function, *arguments, executor=self._gpu_thread)

    def _generate(self, run: Run, shot: Shot, image: Image.Image | None, frames: Handover) -> None:
        """Make the frames of one video."""
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

        in_time = run.deadline.watch(shot)

        def on_step(step: int) -> None:
            run.check()
            run.progress.step(shot.index, step)
            in_time(step)

        run.check()
        run.progress.step(shot.index, 0)
        with stage("generate", run.timings, job=run.id, prompt_index=shot.index):
            for chunk in self._model.generate(sampling, shot.recipe, on_step):
                run.check()
                run.progress.stage("encode", shot.index, shot.sample_steps)
                frames.put(chunk)

    async def _finish(self, run: Run, shot: Shot, frames: Handover) -> Output:
        file, pictures = await in_thread(run.stop_delivery, self._encode, run, shot, frames)
        return await self._upload(run, shot, file, pictures)

    def _encode(self, run: Run, shot: Shot, frames: Handover) -> tuple[Path, dict[Picture, Path]]:
        """Write one video while its frames come, and the pictures of it."""
        encoding, camera = run.encoding(shot), Camera(run.pictures(shot))
        target = run.folder / f"{shot.index}{encoding.suffix}"
        tag = json.dumps(run.settings | run.prompt_settings[shot.index])
        started = time.monotonic()
        try:
            encode(camera.watch(frames.until(run.stop_delivery)), target, encoding, shot.fps, tag)
        finally:
            frames.leave()
        pictures = self._write_pictures(run, shot, camera)
        seconds = time.monotonic() - started - frames.seconds_waited
        run.timings["encode"] = round(run.timings.get("encode", 0.0) + seconds, 3)
        return target, pictures

    def _write_pictures(self, run: Run, shot: Shot, camera: Camera) -> dict[Picture, Path]:
        """Those that can be written: the video is what was asked for, and is not lost with its poster."""
        written = {}
        for picture in run.pictures(shot):
            target = run.folder / f"{shot.index}{picture.suffix}"
            try:
                camera.save(picture, target)
            except Exception as error:
                run.warn_of_picture(shot, picture, self._told(error, run.id).message)
            else:
                written[picture] = target
        return written

    async def _upload(self, run: Run, shot: Shot, file: Path, pictures: dict[Picture, Path]) -> Output:
        """The video, and beside it its pictures."""
        arguments = (file, run.encoding(shot).content_type, self._give_up_at(run), run.stop_delivery)
        with stage("upload", run.timings, job=run.id, prompt_index=shot.index, bytes=file.stat().st_size):
            video = asyncio.create_task(in_thread(run.stop_delivery, run.delivery.put, *arguments))
            waiting = [self._upload_picture(run, shot, *made, video) for made in pictures.items()]
            stored, *items = await asyncio.gather(video, *waiting, return_exceptions=True)
        for outcome in (stored, *items):
            if isinstance(outcome, BaseException):
                raise outcome
        for path in (file, *pictures.values()):
            path.unlink()
        made = {picture.kind: item for picture, item in zip(pictures, items, strict=True) if item}
        return Output(shot, cast("Stored", stored), cast("PictureItems", made))

    async def _upload_picture(
        self, run: Run, shot: Shot, picture: Picture, path: Path, video: asyncio.Task[Stored]
    ) -> dict[str, Any] | None:
        """None when it cannot be stored: a result does not wait long for a poster, once the video is safe."""
        while True:
            video_is_stored = video.done()
            give_up_at = min(self._give_up_at(run), time.monotonic() + _SECONDS_FOR_A_PICTURE)
            try:
                stored = await in_thread(run.stop_delivery, run.delivery.put, path, JPEG, give_up_at, run.stop_delivery)
                return picture_item(picture, stored)
            except Stopped:
                raise
            except Exception as error:
                if video_is_stored:
                    run.warn_of_picture(shot, picture, self._told(error, run.id).message)
                    return None
                await asyncio.wait([video])  # the bucket may have been away; if it takes the video, it may take this
                if video.cancelled() or video.exception():
                    return None

    def _give_up_at(self, run: Run) -> float:
        """Until when an upload is tried again: UPLOAD_TIMEOUT from now, but the job has to end in time."""
        seconds, left = self._settings.upload_timeout, run.deadline.left()
        return time.monotonic() + (seconds if left is None else min(seconds, max(left, _SECONDS_TO_UPLOAD)))

    async def _settled(self, task: asyncio.Task[Output], run: Run) -> Output | WorkerError:
        try:
            return await task
        except Exception as error:
            return self._told(error, run.id)

    def _told(self, error: Exception, job_id: str) -> WorkerError:
        """Log what a client will be told: its own error in a line, and a fault of the worker with its traceback."""
        error = self._worker_error(error)
        if isinstance(error, WorkerError):
            log.warning("%s", error, extra={"fields": {"job": job_id}})
            return error
        log.error("a fault of the worker", exc_info=error, extra={"fields": {"job": job_id}})
        if isinstance(error, pipeline_errors.DeviceLost):
            self.device_is_lost = True
            return WorkerError(Code.INTERNAL, "the GPU failed, and this worker leaves; send the job again")
        return WorkerError(Code.INTERNAL, f"a fault of the worker; its log says more under {job_id}")

    def _worker_error(self, error: Exception) -> Exception:
        """A pipeline's error with its code; a worker's error and anything unforeseen as it is."""
        if isinstance(error, Stopped):
            return WorkerError(Code.CANCELLED, "the job was stopped")
        code = CODE_OF.get(type(error))
        if code is Code.OUT_OF_MEMORY:
            modes = self._model.spec.offload_modes
            other = modes[modes.index(self._model.facts["offload_mode"]) + 1 :]
            remedy = f"run the worker with OFFLOAD_MODE={other[0]}" if other else "use a GPU with more memory"
            return WorkerError(code, f"{error}, or {remedy}")
        return WorkerError(code, str(error)) if code else error

    def _leave_if_the_device_is_lost(self) -> None:
        """Tell whoever serves the jobs to end, once this one's result is out. A single local run ends by itself."""
        if self.device_is_lost and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            log.error("the device no longer answers: the worker leaves, to be replaced")
            os.kill(os.getpid(), signal.SIGTERM)


def _lora_error(error: pipeline_errors.LoraError, index: int) -> WorkerError:
    return WorkerError.of([Problem(CODE_OF[type(error)], f"loras[{index}].path", str(error))])


def _safe_id(job_id: Any) -> str:
    """The job's id as a part of a key or a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(job_id or "job"))[:100]


def _secrets_of(job: Job) -> list[str]:
    """Whatever a job may bring of secrets; the input is not checked yet."""
    raw, s3_config = job.get("input"), job.get("s3Config")
    found = [raw.get("hf_token")] if isinstance(raw, dict) else []
    found += s3_config.values() if isinstance(s3_config, dict) else []
    return [value for value in found if isinstance(value, str)]


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value is not None else None
