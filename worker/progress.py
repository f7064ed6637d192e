"""The progress of a job: turns step callbacks from the GPU's thread into updates, throttled, in order, and before the result.

The SDK's `progress_update` starts a thread per call, so updates overtake each other and arrive after the result. Here one task
sends them, with the SDK's own call that also sends the final result.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from tqdm import tqdm

from worker.logs import log

Update = dict[str, Any]
"""stage, prompt_index, prompts, step, steps, percent, seconds_left (None while it is unknown)."""

Send = Callable[[Update], Awaitable[None]]

_SECONDS_BETWEEN_UPDATES = 1.0
_SECONDS_TO_SEND = 5.0


class Progress:
    """The state of one job. `stage` and `step` may be called from any thread."""

    def __init__(self, step_counts: list[int]) -> None:
        """`step_counts`: the denoising steps of every prompt."""
        self._step_counts = step_counts
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._making: dict[int, tuple[str, int]] = {}
        """The stage and the finished steps of each prompt that is being made."""
        self._begun = 0
        """The last prompt that was begun."""
        self._lock = threading.Lock()
        self._first_step_at: float | None = None
        self._steps_at_first = 0
        self.latest: Update = {}
        self.stage("fetch")

    def stage(self, name: str, prompt_index: int = 0, step: int = 0) -> None:
        """Begin a stage: fetch, wait, load, denoise, encode or upload. Of prompts made side by side, the first is shown."""
        with self._lock:
            if prompt_index in self._making:
                self._making[prompt_index] = (name, step)
            self._begun = max(self._begun, prompt_index)
            making = self._making or {prompt_index: (name, step)}
            shown = min(making)
            name, step = making[shown]
            total = sum(self._step_counts)
            finished = sum(self._step_counts[index] for index in range(self._begun + 1) if index not in making)
            done = total if name == "upload" else finished + sum(steps for _, steps in making.values())
            self.latest = {
                "stage": name,
                "prompt_index": shown,
                "prompts": len(self._step_counts),
                "step": step,
                "steps": self._step_counts[shown],
                "percent": round(100 * done / total),
                "seconds_left": self._seconds_left(done, total),
            }
        self._loop.call_soon_threadsafe(self._changed.set)

    @contextmanager
    def making(self, prompt_index: int) -> Iterator[None]:
        """Count this prompt's steps while the block makes it, beside others; afterwards all of them count as done."""
        with self._lock:
            self._making[prompt_index] = ("denoise", 0)
        try:
            yield
        finally:
            with self._lock:
                del self._making[prompt_index]

    @property
    def seconds_left(self) -> float:
        """The time left for the denoising; infinite while it is unknown."""
        left = self.latest["seconds_left"]
        return float("inf") if left is None else float(left)

    def step(self, prompt_index: int, step: int) -> None:
        """Report that `step` denoising steps of this prompt are done."""
        self.stage("denoise", prompt_index, step)

    def _seconds_left(self, done: int, total: int) -> float | None:
        """Estimate from the mean time of the steps so far. The first step warms up, and only starts the clock."""
        now = time.monotonic()
        if done == 0:
            return None
        if self._first_step_at is None:
            self._first_step_at, self._steps_at_first = now, done
            return None
        steps = done - self._steps_at_first
        return round((total - done) * (now - self._first_step_at) / steps, 1) if steps else None

    @asynccontextmanager
    async def sent_by(self, send: Send) -> AsyncIterator[None]:
        """While the block runs, send the latest state whenever it changed, at most once a second.

        When the block ends, the last state has been sent and no update is on its way.
        """
        sending = asyncio.create_task(self._send_changes(send))
        try:
            yield
        finally:
            sending.cancel()
            await asyncio.wait([sending])
        if self._changed.is_set():
            await self._send_latest(send)

    async def _send_changes(self, send: Send) -> None:
        while True:
            await self._changed.wait()
            # Shielded: wait for an update that is being sent, so that it cannot arrive after the result.
            on_its_way = asyncio.ensure_future(self._send_latest(send))
            try:
                await asyncio.shield(on_its_way)
                await asyncio.sleep(_SECONDS_BETWEEN_UPDATES)
            except asyncio.CancelledError:
                await asyncio.wait([on_its_way])
                raise

    async def _send_latest(self, send: Send) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(send(self.latest), _SECONDS_TO_SEND)
        except Exception as error:  # a lost update must not fail the job
            log.warning("a progress update was not sent (%s)", type(error).__name__)


@asynccontextmanager
async def terminal_bar() -> AsyncIterator[Send]:
    """Shows updates as a bar in the terminal, or nothing if stderr is not a terminal."""
    with tqdm(total=100, file=sys.stderr, bar_format="{desc} {bar} {percentage:3.0f}%{postfix}", disable=None) as bar:

        async def send(update: Update) -> None:
            bar.set_description_str(f"{update['stage']} {update['prompt_index'] + 1}/{update['prompts']}", refresh=False)
            left = update["seconds_left"]
            bar.set_postfix_str("" if left is None else f"{left:.0f} s left", refresh=False)
            bar.n = update["percent"]
            bar.refresh()

        yield send
