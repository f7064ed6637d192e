"""Checks a request before it is sent, with the client's and the worker's own code, and says what each prompt would make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from client.errors import InvalidRequest
from client.request import job_of
from pipelines.catalog import MODELS, ModelSpec
from pipelines.recipes import Recipe, documented, preview
from worker.errors import Code, Problem


def check(request: Any, is_local: bool) -> dict[str, Any]:
    """The request's `problems`, and for each of its `prompts` the video's size, frames and seconds; None for bad numbers."""
    problems: Sequence[Problem] = ()
    try:
        job_of(request, None, is_local)
    except InvalidRequest as error:
        problems = error.problems
    request = request if isinstance(request, dict) else {}
    spec, prompts = MODELS.get(str(request.get("model"))), request.get("prompts")
    sizes = [_video(spec, request.get("match"), prompt) for prompt in prompts] if spec and isinstance(prompts, list) else []
    return {"problems": [vars(problem) for problem in problems], "prompts": sizes}


def _video(spec: ModelSpec, match: Any, prompt: Any) -> dict[str, Any] | None:
    """Effective size and frame count of a prompt's video, and its seconds."""
    if not isinstance(prompt, dict):
        return None
    asked: dict[str, Any] = {name: prompt.get(name) for name in ("width", "height", "num_frames", "fps")}
    if any(type(value) is not int or value < 1 for value in asked.values()):
        return None
    recipe = recipe_of(spec, match)
    width, height = recipe.effective_size(asked["width"], asked["height"])
    if not (width and height):
        return None
    frames = recipe.effective_frames(asked["num_frames"])
    return {"width": width, "height": height, "num_frames": frames, "seconds": round(frames / asked["fps"], 2)}


def recipe_of(spec: ModelSpec, match: Any) -> Recipe:
    """The recipe with the rules for sizes and frame counts, which are the same for all versions of the trainer."""
    return preview(spec, "flowmatch", "") if match == "preview" else documented(spec)


def served_model(problems: Sequence[Problem], asked: Any) -> str | None:
    """The model id that a MODEL_NOT_SERVED error names beside the requested one: the one that the worker serves."""
    texts = [problem.text for problem in problems if problem.code is Code.MODEL_NOT_SERVED]
    return next((name for text in texts for name in re.findall(r"\w+", text) if name in MODELS and name != asked), None)
