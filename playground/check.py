"""What the worker's own code says of a request before it is sent, and the problems that an error's text lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.catalog import MODELS, ModelSpec
from pipelines.recipes import Recipe, documented, preview
from worker.errors import Code, WorkerError
from worker.request import parse


@dataclass(frozen=True)
class Finding:
    """One problem of a request; `field` is the path of its field, "" where it has none."""

    code: str
    field: str
    text: str


def check(request: Any) -> dict[str, Any]:
    """`problems`: as in `findings`; `prompts`: what each would make, or None where a number of it is none."""
    request = request if isinstance(request, dict) else {}
    spec = MODELS.get(str(request.get("model")))
    problems: list[Finding] = []
    try:
        parse(request, spec or next(iter(MODELS.values())))
    except WorkerError as error:
        problems = [Finding(problem.code, problem.field, problem.text) for problem in error.problems] or findings(str(error))
    prompts = request.get("prompts")
    made = [_made(spec, request.get("match"), prompt) for prompt in prompts] if spec and isinstance(prompts, list) else []
    return {"problems": [vars(problem) for problem in problems], "prompts": made}


def _made(spec: ModelSpec, match: Any, prompt: Any) -> dict[str, Any] | None:
    """Size, frames and seconds that come of the numbers of a prompt."""
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
    """The rules for sizes and frames; they are the same in both eras of the trainer."""
    return preview(spec, "flowmatch", "") if match == "preview" else documented(spec)


def findings(error: str) -> list[Finding]:
    """The problems that a job's error lists, see `WorkerError.of`. Of any other text one, without a field."""
    begins = re.match(r"([A-Z][A-Z_]+): ", error)
    code, text = (begins[1], error[begins.end() :]) if begins else ("", error)
    several = re.match(r"(\d+) problems: ", text)
    return [_finding(part, code) for part in (_parts(text[several.end() :], int(several[1])) if several else [text])]


def _parts(text: str, count: int) -> Iterable[str]:
    """`(1) first; (2) second` → first, second."""
    text = text.removeprefix("(1) ")
    for number in range(2, count + 1):
        part, _, text = text.partition(f"; ({number}) ")
        yield part
    yield text


def _finding(text: str, code: str) -> Finding:
    own = re.match(r"([A-Z][A-Z_]+): ", text)
    if own and own[1] in Code.__members__:
        code, text = own[1], text[own.end() :]
    field = re.match(r"`([^`]+)`: ", text)
    return Finding(code, field[1], text[field.end() :]) if field else Finding(code, "", text)
