"""The GPU and the model that is loaded on it: one job at a time, one thread for all its work, and whether it still computes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing, nullcontext
from itertools import chain
from typing import Any

from pipelines import WanModel
from pipelines.decode import Frames
from pipelines.errors import DeviceLost, LoraError
from pipelines.lora.file import Adapter
from worker.decide import Shot
from worker.faults import lora_error
from worker.frame_queue import FrameQueue
from worker.full_run import StepClock, full_run_seconds
from worker.logs import stage
from worker.ranks import Ranks
from worker.run import Run, in_thread, left_behind

_SECONDS_TO_STOP = 120.0
"""A step of the largest video, or the decode of some of its frames, takes up to a minute and cannot be interrupted."""
_SECONDS_BETWEEN_LOOKS = 1.0


class Gpu:
    """Runs the model for one job at a time."""

    def __init__(self, model: WanModel, ranks: Ranks) -> None:
        self.model = model
        self._ranks = ranks
        self._is_lost = False
        self._lock = asyncio.Lock()
        self._threads = [ThreadPoolExecutor(1, "gpu") for _ in range(ranks.number)]
        """One thread for all work of a rank: CUDA and compiled code set up state once per thread."""

    @property
    def is_lost(self) -> bool:
        """Whether a device no longer computes: the worker must be replaced."""
        return self._is_lost or self._ranks.are_lost

    @asynccontextmanager
    async def held_by(self, run: Run) -> AsyncIterator[None]:
        """Wait until no other job holds the GPU, and hold it during the block."""
        run.progress.stage("wait")
        async with AsyncExitStack() as held:
            with stage("wait", run.timings, job=run.id):
                await held.enter_async_context(self._lock)
            try:
                yield
            finally:
                run.needs_the_gpu = False

    def ranks_for(self, shot: Shot) -> int:
        """How many ranks can make videos like this at a time, each its own: 1 when all share one."""
        return 1 if self.model.shares(shot.sampling, shot.recipe) else self._ranks.number

    async def apply_loras(self, run: Run, adapters: Sequence[Adapter]) -> None:
        """Make the model carry exactly these LoRAs. Raises WorkerError, OutOfMemory, DeviceLost, Stopped."""
        run.progress.stage("load")
        with stage("load", run.timings, job=run.id):
            await self._run(run, self._apply_loras, run, adapters)

    async def generate(self, run: Run, shot: Shot, frames: FrameQueue, rank: int = 0) -> None:
        """Put the frames of one video into `frames`. Raises WorkerError, OutOfMemory, DeviceLost, Stopped, Abandoned.

        `rank`: which one makes it, or, for a video that all share, decodes it.
        """
        await self._run(run, self._generate, run, shot, frames, rank, rank=rank)

    async def _run(self, run: Run, function: Callable[..., None], *arguments: Any, rank: int = 0) -> None:
        if self.is_lost or left_behind.is_set():
            raise DeviceLost("the worker shuts down")  # a job that has waited for the GPU while another lost it
        in_vain = self._ranks.are_waited_for_in_vain

        @functools.wraps(function)
        def work() -> None:
            try:
                function(*arguments)
            except DeviceLost:  # noted here: of a job that is cancelled meanwhile, nobody reads the thread's error
                self._is_lost = True
                raise

        async with _until(in_vain, self._ranks.reason):
            await in_thread(run.stop, work, executor=self._threads[rank], seconds_to_stop=_SECONDS_TO_STOP, is_in_vain=in_vain)

    def _apply_loras(self, run: Run, adapters: Sequence[Adapter]) -> None:
        try:
            with self._ranks.doing("apply_loras", adapters, run.mode, run.quantization, run.recovery):
                self.model.apply_loras(adapters, run.mode, run.quantization, run.recovery)
        except LoraError as error:
            raise lora_error(error, run.request.lora_fields[error.position or 0]) from error

    def _generate(self, run: Run, shot: Shot, frames: FrameQueue, rank: int) -> None:
        check_speed, clock = run.deadline.watch(shot), StepClock()

        def on_step(step: int) -> None:
            run.check()
            run.progress.step(shot.index, step)
            check_speed(step)
            clock.tick()

        shared = self.model.shares(shot.sampling, shot.recipe)
        if rank:
            video = self._ranks.generate(rank, shot.sampling, shot.recipe, on_step, run.check)
        else:
            video = self.model.generate(shot.sampling, shot.recipe, on_step)
        where = {"gpu": rank} if rank else {}
        with (
            run.progress.making(shot.index),
            stage("generate", run.timings, job=run.id, prompt_index=shot.prompt_index, **where),
            closing(video) as chunks,
        ):
            on_step(0)
            with self._ranks.doing("denoise", shot.sampling, shot.recipe) if shared else nullcontext():
                first = next(chunks)  # the rest is decoded by this process alone
            colour = None
            for chunk in chain([first], chunks):
                run.check()
                colour = _has_one_colour(chunk) if colour is None else colour and _has_one_colour(chunk)
                run.progress.stage("encode", shot.index, shot.sampling.num_inference_steps)
                frames.put(chunk, run.stop)
        if shot.recipe.is_draft:
            clock.tick()
            seconds = full_run_seconds(shot, run.request.prompts[shot.prompt_index], clock, self.model.facts["gpus"])
            run.timings["full_run_estimate"] = round(run.timings.get("full_run_estimate", 0.0) + seconds, 1)
        if colour:
            said = "every pixel of the video has the same colour; the LoRA may be too strong, or its training may have failed"
            run.warnings.append(f"{shot.field}: {said}")


@asynccontextmanager
async def _until(is_in_vain: Callable[[], bool], reason: Callable[[], DeviceLost]) -> AsyncIterator[None]:
    """Stop the block when it is in vain, and raise the reason."""

    async def watch(limit: asyncio.Timeout) -> None:
        while not is_in_vain():
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(watch(limit))
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if not limit.expired():
            raise
        raise reason() from None


def _has_one_colour(frames: Frames) -> bool:
    return bool((frames == frames[0, 0, 0]).all())
