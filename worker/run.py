"""What belongs to one job while it runs, and how its blocking work runs in threads that leave when they must."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipelines.catalog import LoraMode, Match
from worker.deadline import Deadline
from worker.delivery import Delivery, Identity
from worker.net.download import Stopped
from worker.pictures import Picture, contact_sheet, poster
from worker.progress import Progress
from worker.request import Request, Shot
from worker.video import IMAGE, VIDEO, Encoding

T = TypeVar("T")


@dataclass(eq=False)
class Run:
    """One job: what was asked, where its files go, and what has become of it so far."""

    id: str
    identity: Identity
    request: Request
    match: Match
    mode: LoraMode
    delivery: Delivery
    folder: Path
    progress: Progress
    deadline: Deadline
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the job is cancelled or out of time; the threads that make its files look at it and leave."""
    stop_delivery: threading.Event = field(default_factory=threading.Event)
    """Set when the job is cancelled; what is finished when the time is over is still delivered."""
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What the job keeps hold of until it ends, such as its LoRAs in the cache."""
    is_past_the_gpu: bool = False
    shots: list[Shot] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """What decides the frames of all prompts alike."""
    prompt_settings: list[dict[str, Any]] = field(default_factory=list)
    """What decides the frames of each prompt, in effective numbers."""
    warnings: list[str] = field(default_factory=list)
    lora_warnings: dict[int, list[str]] = field(default_factory=dict)
    """By the LoRA's place in the request."""
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def encoding(self, shot: Shot) -> Encoding:
        """How the prompt's file is written: one frame is an image whatever the format."""
        return IMAGE if shot.num_frames == 1 else VIDEO[self.request.output_format]

    def pictures(self, shot: Shot) -> list[Picture]:
        """What is made beside the prompt's video; an image needs no picture of itself."""
        if shot.num_frames == 1:
            return []
        sheet = [contact_sheet(shot.width, shot.height, shot.num_frames)] if self.request.contact_sheet else []
        return [poster(shot.width, shot.height), *sheet]

    def control_image(self, shot: Shot) -> str:
        """The source of the prompt's control image, as in the request; "" when there is none."""
        _, source = self.request.prompts[shot.index].control_image or ("", "")
        return source

    def warn_of_picture(self, shot: Shot, picture: Picture, why: str) -> None:
        """The result says why a picture is `null` in it."""
        self.warnings.append(f"prompts[{shot.index}]: no {picture.kind}: {why}")

    def check(self) -> None:
        """Raises Stopped when the job must not go on."""
        if self.stop.is_set():
            raise Stopped

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work in a thread that looks at `stop`; see the function below."""
        return await in_thread(self.stop, function, *arguments)


async def in_thread(stop: threading.Event, function: Callable[..., T], *arguments: Any, executor: Executor | None = None) -> T:
    """Run blocking work in a thread of its own, or of `executor`. A cancellation sets `stop` and waits until it has left.

    Otherwise the thread of a cancelled job would go on beside the next job, on the same GPU. Not asyncio's pool: a few uploads
    that wait for their bucket would fill it, and keep the GPU from its work.
    """
    pool = executor or ThreadPoolExecutor(1)
    work: asyncio.Future[T] = asyncio.wrap_future(pool.submit(function, *arguments))
    if executor is None:
        pool.shutdown(wait=False)  # it ends with its work
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:
                continue
        if not work.cancelled():
            work.exception()  # seen: asyncio complains about errors that nobody looks at
        raise
