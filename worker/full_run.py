"""How long the full run of a draft would take, from the seconds that its own passes through a transformer took."""

from __future__ import annotations

import statistics
import time

from worker.decide import Shot
from worker.request import Prompt


class StepClock:
    """The moments at which the denoising began and its steps ended, and when the video was finished."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def tick(self) -> None:
        """Call it at the beginning, after each step, and at the end."""
        self._ticks.append(time.monotonic())

    @property
    def seconds(self) -> float:
        return self._ticks[-1] - self._ticks[0]

    @property
    def seconds_per_step(self) -> float:
        """The median of the steps but the first, which encodes the text and warms up.

        It leaves out the one step before which the second transformer comes to the device.
        """
        begin, *ends, _ = self._ticks
        steps = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
        return statistics.median(steps[1:] or steps)


def full_run_seconds(shot: Shot, prompt: Prompt, clock: StepClock, gpus: int) -> float:
    """Return the seconds in which the full run makes this video.

    A step of a draft is one pass. With guidance it is two, which two GPUs compute at once; four split all passes. All else
    takes as long as in the draft.
    """
    passes = prompt.sample_steps * (2 if prompt.guidance_scale > 1 and gpus != 2 else 1)
    return clock.seconds + (passes - shot.sampling.num_inference_steps) * clock.seconds_per_step
