"""What the form shows of a request before it is sent is what the worker makes of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.catalog import MODELS
from pipelines.recipes import documented, preview
from playground.check import Finding, check, findings
from worker.errors import Code, Problem, WorkerError
from worker.request import parse, shots_of

PICTURE = "https://example.com/first.png"


def request_for(model_id: str, **prompt: Any) -> dict[str, Any]:
    spec = MODELS[model_id]
    lora = {"path": "a.safetensors", **({"transformer": "high"} if spec.moe else {})}
    image = {"ctrl_img": PICTURE} if spec.control_image == "required" else {}
    return {"model": model_id, "loras": [lora], "prompts": [{"prompt": "x", "fps": 16, **image, **prompt}]}


@pytest.mark.parametrize("match", ["documented", "preview"])
@pytest.mark.parametrize("model_id", MODELS)
def test_sizes_and_frames_are_those_that_the_worker_makes(model_id: str, match: str) -> None:
    spec = MODELS[model_id]
    recipes = [documented(spec)] if match == "documented" else [preview(spec, era, "") for era in ("unipc", "flowmatch")]
    for step in range(200):
        asked = {"width": 64 + 3 * step, "height": 4096 - 5 * step, "num_frames": 1 + step}
        request = request_for(model_id, **asked) | {"match": match}
        (shown,) = check(request)["prompts"]
        for recipe in recipes:
            (shot,) = shots_of(parse(request, spec), lambda _, recipe=recipe: recipe, lambda _: 0)
            assert (shown["width"], shown["height"], shown["num_frames"]) == (
                shot.sampling.width,
                shot.sampling.height,
                shot.sampling.num_frames,
            )


def test_a_number_that_is_none_makes_nothing_and_is_a_problem() -> None:
    found = check(request_for("wan21_1b", width="wide", height=480, num_frames=41))
    assert found["prompts"] == [None]
    assert [problem["field"] for problem in found["problems"]] == ["prompts[0].width"]


def test_a_good_request_has_no_problem_for_any_model() -> None:
    for model_id in MODELS:
        assert check(request_for(model_id))["problems"] == []


@pytest.mark.parametrize("request_", [None, [], "x", {}, {"prompts": 3}, {"model": "wan21_1b", "prompts": [None, 3]}])
def test_whatever_is_sent_gets_problems(request_: Any) -> None:
    assert check(request_)["problems"]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="`"), min_size=1).filter(
    lambda text: not re.search(r"; \(\d+\) |^[A-Z_]+: |^\d+ problems: ", text)
)


@given(
    st.lists(st.builds(Problem, st.sampled_from(Code), st.sampled_from(["", "model", "prompts[1].width"]), TEXTS), min_size=1)
)
def test_every_problem_of_an_error_is_found_in_its_text(problems: list[Problem]) -> None:
    found = findings(str(WorkerError.of(problems)))
    assert found == [Finding(problem.code, problem.field, problem.text) for problem in problems]


def test_an_error_of_something_else_is_one_finding_without_a_field() -> None:
    assert findings("Worker exited with 137") == [Finding("", "", "Worker exited with 137")]
