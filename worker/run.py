"""The state of a running job, and how its blocking work runs in threads that stop with the job."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipelines.catalog import LoraMode, Match
from pipelines.lora.file import Adapter
from pipelines.trained import Quantization
from worker.deadline import Deadline
from worker.decide import Shot
from worker.delivery import Delivery, Identity
from worker.errors import Stopped
from worker.logs import log
from worker.pictures import Picture, contact_sheet, poster
from worker.progress import Progress
from worker.request import Request
from worker.storage.base import Limit
from worker.training import NOT_KNOWN, KnownTraining
from worker.video import IMAGE, VIDEO, Encoding

T = TypeVar("T")

_SECONDS_TO_UPLOAD = 15.0
"""How long the upload of finished work is retried when the job has no time left."""
_SECONDS_TO_STOP = 30.0
"""How long a thread may run on after `stop` is set."""


@dataclass(eq=False)
class Run:
    """One job: its request, the place for its files, and its state."""

    id: str
    identity: Identity
    request: Request
    match: Match
    mode: LoraMode
    delivery: Delivery
    folder: Path
    progress: Progress
    deadline: Deadline
    upload_timeout: float
    """Seconds."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the job is cancelled or out of time; the threads that make its files then stop."""
    stop_delivery: threading.Event = field(default_factory=threading.Event)
    """Set when the job is cancelled. When the job is only out of time, finished work is still delivered."""
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Resources to release when the job ends, such as its LoRAs in the cache."""
    needs_the_gpu: bool = True
    shots: list[Shot] = field(default_factory=list)
    training: KnownTraining = NOT_KNOWN
    """How the LoRAs' training ran."""
    quantization: Quantization | None = None
    recovery: Adapter | None = None
    """The accuracy recovery adapter beneath the LoRAs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that decide the frames of all prompts alike."""
    prompt_settings: list[dict[str, Any]] = field(default_factory=list)
    """The effective settings that decide the frames of each prompt."""
    warnings: list[str] = field(default_factory=list)
    lora_warnings: dict[str, list[str]] = field(default_factory=dict)
    """By the LoRA's field in the request, such as `loras[0]`."""
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def encoding(self, shot: Shot) -> Encoding:
        """Return how to write the prompt's file. One frame is an image, whatever the format."""
        return IMAGE if shot.sampling.num_frames == 1 else VIDEO[self.request.output_format]

    def pictures(self, shot: Shot) -> list[Picture]:
        """Return the pictures to make of the prompt's video. An image needs none."""
        video = shot.sampling
        if video.num_frames == 1:
            return []
        sheet = [contact_sheet(video.width, video.height, video.num_frames)] if self.request.contact_sheet else []
        return [poster(video.width, video.height), *sheet]

    def warn_of_picture(self, shot: Shot, picture: Picture, why: str) -> None:
        """Add a warning that says why a picture is `null`."""
        self.warnings.append(f"{shot.field}: no {picture.kind}: {why}")

    def check(self) -> None:
        """Raise Stopped if the job must not go on."""
        if self.stop.is_set():
            raise Stopped

    def give_up_at(self) -> float:
        """Return when retries of an upload end (`time.monotonic`): after UPLOAD_TIMEOUT, or when the job's time is over."""
        return min(time.monotonic() + self.upload_timeout, self.delivery_limit().ends)

    def delivery_limit(self, seconds: float = float("inf")) -> Limit:
        """Return the limit for delivering finished work: `seconds` within the job's time, or some seconds when that is over."""
        left = self.deadline.left()
        return Limit.of(min(seconds, float("inf") if left is None else max(left, _SECONDS_TO_UPLOAD)), self.stop_delivery)

    @contextlib.asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Stop the block when the job's time is over. Raises WorkerError with TIMEOUT."""
        try:
            async with asyncio.timeout(self.deadline.left()):
                yield
        except TimeoutError:
            raise self.deadline.error() from None

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work in a thread that checks `stop`; see the function below."""
        return await in_thread(self.stop, function, *arguments)


left_behind = threading.Event()
"""Set when a thread did not stop in time. Only the end of the process ends it, so the worker must be replaced."""


async def in_thread(
    stop: threading.Event,
    function: Callable[..., T],
    *arguments: Any,
    executor: Executor | None = None,
    seconds_to_stop: float = _SECONDS_TO_STOP,
) -> T:
    """Run blocking work in a new thread, or in one of `executor`. A cancellation sets `stop` and waits for the thread.

    Without the wait, the thread of a cancelled job would run on beside the next job, on the same GPU. A thread that does not
    stop within `seconds_to_stop` is left behind: the job's answer is sent, and the process ends. asyncio's own pool is too
    small: a few uploads that wait for their bucket would fill it, and the GPU would get no work.
    """
    pool = executor or ThreadPoolExecutor(1)
    work: asyncio.Future[T] = asyncio.wrap_future(pool.submit(function, *arguments))
    if executor is None:
        pool.shutdown(wait=False)  # the thread ends with its work
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        give_up_at = time.monotonic() + seconds_to_stop
        while not work.done() and (left := give_up_at - time.monotonic()) > 0:
            try:
                await asyncio.wait([work], timeout=left)
            except asyncio.CancelledError:
                continue
        if not work.done():
            log.critical("a thread does not stop (%s); the worker shuts down and must be replaced", function.__qualname__)
            left_behind.set()
        elif not work.cancelled():
            work.exception()  # retrieve it: asyncio logs errors that nobody retrieves
        raise
