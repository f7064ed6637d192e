"""How long the full run of a draft takes, by the clock of the draft."""

import pytest

from pipelines.catalog import MODELS
from pipelines.recipes import Sampling, draft_of
from worker import full_run
from worker.decide import Shot
from worker.full_run import StepClock, full_run_seconds
from worker.request import Prompt


@pytest.mark.parametrize(
    ("prompt", "gpus", "passes"),
    [
        ({}, 1, 50),
        ({}, 2, 25),
        ({}, 4, 50),
        ({"sample_steps": 30}, 1, 60),
        ({"guidance_scale": 1.0}, 1, 25),
        ({"sample_steps": 2, "guidance_scale": 0.0}, 2, 2),
    ],
)
def test_the_passes_of_the_full_run_take_what_those_of_the_draft_took(
    prompt: dict, gpus: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step (9 s) warms up, and before the third (5 s) the second transformer came to the device."""
    ticks = iter([100.0, 109.0, 111.0, 116.0, 118.0, 121.0])
    monkeypatch.setattr(full_run.time, "monotonic", lambda: next(ticks))
    clock = StepClock()
    for _ in range(6):
        clock.tick()
    recipe = draft_of(MODELS["wan22_14b_t2v"])
    shot = Shot(0, recipe, recipe.fit(Sampling("a")), 16, (), 0)
    assert clock.seconds_per_step == 2.0
    assert full_run_seconds(shot, Prompt(prompt="a", **prompt), clock, gpus) == 21 + (passes - 4) * 2
