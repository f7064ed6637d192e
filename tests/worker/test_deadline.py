from dataclasses import replace

import pytest

from pipelines.catalog import MODELS
from pipelines.recipes import Sampling, documented, draft_of
from worker import deadline
from worker.deadline import Deadline
from worker.decide import Shot
from worker.errors import WorkerError

SHOT = Shot(
    index=1,
    recipe=documented(MODELS["wan21_1b"]),
    sampling=Sampling("a", width=832, height=480, num_frames=41, num_inference_steps=20),
    fps=16,
    warnings=(),
    prompt_index=1,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(deadline, "time", clock)
    return clock


def failure(clock, limit: float, seconds_per_step: float, shot: Shot = SHOT, first_step: float = 0.0) -> tuple[int, str]:
    """(the step at which the job is given up, what it says)."""
    check = Deadline(limit).watch(shot)
    clock.now += first_step
    for step in range(shot.sampling.num_inference_steps + 1):
        try:
            check(step)
        except WorkerError as error:
            return step, str(error)
        clock.now += seconds_per_step
    return -1, ""


def test_a_job_that_cannot_make_it_is_given_up_after_three_steps(clock):
    step, text = failure(clock, limit=100, seconds_per_step=10)
    assert step == 3
    assert text.startswith(
        "TIMEOUT: prompts[1]: at 10 s a step its 20 steps take 200 s, and it had 100 s left of the 100 s of JOB_TIMEOUT"
    )


def test_a_job_that_makes_it_is_left_alone(clock):
    assert failure(clock, limit=201, seconds_per_step=10) == (-1, "")


def test_a_slow_first_step_is_not_taken_for_the_speed(clock):
    assert failure(clock, limit=300, seconds_per_step=10, first_step=90) == (-1, "")


def test_what_is_proposed_fits(clock):
    _, text = failure(clock, limit=100, seconds_per_step=10)
    assert "; 9 steps or 17 frames or 544x320 pixels would fit; ask for that, or raise JOB_TIMEOUT" in text
    for change in ({"num_inference_steps": 9}, {"num_frames": 17}, {"width": 544, "height": 320}):
        full, smaller = SHOT.sampling, replace(SHOT.sampling, **change)
        work = smaller.num_frames * smaller.width * smaller.height / (full.num_frames * full.width * full.height)
        assert failure(clock, 100, 10 * work, replace(SHOT, sampling=smaller)) == (-1, "")


def test_what_cannot_fit_is_not_proposed(clock):
    tiny = replace(SHOT, sampling=replace(SHOT.sampling, width=64, height=64, num_frames=5, num_inference_steps=4))
    assert "; ask for fewer steps, frames and pixels, or raise JOB_TIMEOUT" in failure(clock, 10, 40, tiny)[1]


def test_a_job_that_slows_down_later_is_given_up_then(clock):
    check = Deadline(100).watch(SHOT)
    for step in range(10):
        clock.now += 2
        check(step)
    clock.now += 60
    with pytest.raises(WorkerError):
        check(10)


def test_without_a_limit_nothing_is_given_up(clock):
    assert failure(clock, None, 1e9) == (-1, "")
    assert Deadline(None).left() is None


def test_the_time_left_runs_down(clock):
    ends = Deadline(100)
    clock.now += 30
    assert ends.left() == 70


def test_of_a_draft_fewer_steps_are_not_proposed(clock):
    spec = MODELS["wan21_14b"]
    shot = replace(SHOT, recipe=draft_of(spec), sampling=draft_of(spec).fit(SHOT.sampling))
    assert "25 frames or 688x400 pixels would fit" in failure(clock, limit=31, seconds_per_step=10, shot=shot)[1]
