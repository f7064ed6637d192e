"""The form shows the sizes and the problems that the worker would find."""

from __future__ import annotations

from typing import Any

import pytest

from client import JobFailed
from pipelines.catalog import MODELS, ModelSpec
from pipelines.recipes import documented, preview
from playground.check import check, served_model
from worker.decide import shots_of
from worker.errors import WorkerError
from worker.parse import parse

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
        (shown,) = check(request, False)["prompts"]
        for recipe in recipes:
            (shot,) = shots_of(parse(request, spec), lambda _, recipe=recipe: recipe, lambda _: 0)
            assert (shown["width"], shown["height"], shown["num_frames"]) == (
                shot.sampling.width,
                shot.sampling.height,
                shot.sampling.num_frames,
            )


def test_an_invalid_number_has_no_size_and_is_a_problem() -> None:
    found = check(request_for("wan21_1b", width="wide", height=480, num_frames=41), False)
    assert found["prompts"] == [None]
    assert [problem["field"] for problem in found["problems"]] == ["prompts[0].width"]


def test_a_good_request_has_no_problem_for_any_model() -> None:
    for model_id in MODELS:
        assert check(request_for(model_id), False)["problems"] == []


@pytest.mark.parametrize("request_", [None, [], "x", {}, {"prompts": 3}, {"model": "wan21_1b", "prompts": [None, 3]}])
def test_any_other_value_has_problems(request_: Any) -> None:
    assert check(request_, False)["problems"]


@pytest.mark.parametrize("served", MODELS.values(), ids=lambda spec: spec.id)
@pytest.mark.parametrize("asked", MODELS)
def test_the_model_that_a_worker_serves_is_known_from_its_error(asked: str, served: ModelSpec) -> None:
    if asked == served.id:
        return
    with pytest.raises(WorkerError) as caught:
        parse(request_for(asked), served)
    assert served_model(JobFailed(str(caught.value)).problems, asked) == served.id


def test_no_other_error_names_a_served_model() -> None:
    text = "LORA_INCOMPATIBLE: `loras[0].path`: fits wan21_14b, not wan21_1b"
    assert served_model(JobFailed(text).problems, "wan21_1b") is None
