"""A job's time limit. The first denoising steps of a prompt show whether it will finish in time, before the time is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from worker.decide import Shot
from worker.errors import Code, WorkerError

_STEPS_TO_MEASURE = 3
"""The first step warms up; the mean of the next two is the speed."""
_SAFE_PART = 0.9
"""The share of the time that a proposal may spend on denoising; the rest is for the decode and the upload."""


class Deadline:
    """The end of a job's time, in `time.monotonic` seconds."""

    def __init__(self, limit: float | None) -> None:
        """`limit`: JOB_TIMEOUT in seconds, from now; None: no limit."""
        self.limit = limit
        self._end = None if limit is None else time.monotonic() + limit

    def left(self) -> float | None:
        """Return the seconds left: below 0 when the time is over, None without a limit."""
        return None if self._end is None else self._end - time.monotonic()

    def error(self) -> WorkerError:
        """Return the error of a job whose time is over."""
        text = (
            f"the job took longer than the {self.limit:g} s of JOB_TIMEOUT; ask for fewer steps, frames or pixels, or raise "
            "JOB_TIMEOUT and the endpoint's execution timeout"
        )
        return WorkerError(Code.TIMEOUT, text)

    def watch(self, shot: Shot) -> Callable[[int], None]:
        """Return a function to call with the number of finished steps of this prompt.

        It raises WorkerError with TIMEOUT as soon as the speed shows that the prompt cannot be denoised in time.
        """
        if self._end is None:
            return lambda step: None
        end, first_step_at, steps = self._end, 0.0, shot.sampling.num_inference_steps

        def check(step: int) -> None:
            nonlocal first_step_at
            now = time.monotonic()
            if step <= 1:
                first_step_at = now
            elif step >= _STEPS_TO_MEASURE:
                seconds = (now - first_step_at) / (step - 1)
                if seconds * (steps - step) > end - now:
                    raise WorkerError(Code.TIMEOUT, self._too_much(shot, seconds, end - first_step_at + seconds))

        return check

    def _too_much(self, shot: Shot, seconds: float, budget: float) -> str:
        steps = shot.sampling.num_inference_steps
        fitting = " or ".join(_fitting(shot, _SAFE_PART * budget / (seconds * steps)))
        proposal = f"{fitting} would fit; ask for that" if fitting else "ask for fewer steps, frames and pixels"
        return (
            f"{shot.field}: at {seconds:.3g} s a step its {steps} steps take {seconds * steps:.3g} s, and it had "
            f"{budget:.3g} s left of the {self.limit:g} s of JOB_TIMEOUT; {proposal}, or raise JOB_TIMEOUT and the endpoint's "
            "execution timeout"
        )


def _fitting(shot: Shot, part: float) -> Iterator[str]:
    """Yield changes to the request that reduce its time to `part`. A step's time grows at least as frames and pixels do."""
    video = shot.sampling
    if (steps := int(video.num_inference_steps * part)) and not shot.recipe.is_draft:
        yield f"{steps} steps"
    if (frames := int(video.num_frames * part - 1) // 4 * 4 + 1) > 1:
        yield f"{frames} frames"
    width, height = shot.recipe.effective_size(int(video.width * part**0.5), int(video.height * part**0.5))
    if min(width, height) >= 64:
        yield f"{width}x{height} pixels"
