"""How a job's `input` becomes a Request.

`parse` returns a Request or raises one error that lists every problem. It looks at nothing but the input: no file, no network,
no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from pipelines.catalog import DEFAULT_GUIDANCE_SCALE, MODELS, ModelSpec
from pipelines.trained import QTYPES
from worker.errors import Code, Problem, WorkerError
from worker.findings import path_of, problems_of
from worker.request import MAX_EXTRA_LORAS, MAX_PROMPTS, MAX_SEED, OBJECTS, Request, is_hub, is_url

MAX_VALUES = 20_000
"""Values of an input, all objects and lists counted. Checking them takes a tenth of a second."""

MAX_PROBLEMS = 100
"""How many problems an error lists; an answer of megabytes would not arrive."""

MAX_GIF_PIXELS = 1_000_000_000
"""Width times height times frames: Pillow holds a byte for each until it writes a GIF. 953 frames of 1024x1024."""


def parse(raw: Any, served: ModelSpec) -> Request:
    """Check a job's `input` against the schema and against the rules of the model it names.

    Raises WorkerError: INVALID_INPUT, MODEL_NOT_FOUND, MODEL_NOT_SERVED, LORA_FILE_REQUIRED, SINGLE_LORA_ONLY,
    MOE_FORMAT_REQUIRED, MOE_FORMAT_NOT_SUPPORTED, SINGLE_MOE_CONFIG_ONLY, CONTROL_IMAGE_REQUIRED.
    """
    if not isinstance(raw, dict):
        raise WorkerError(Code.INVALID_INPUT, "`input` must be an object with the fields model, loras and prompts")
    _raise_if_any(_raw_problems(raw))
    # Nothing is said of a model that does not exist but that: its rules are not known.
    spec = MODELS.get(raw["model"]) if isinstance(raw.get("model"), str) else served
    request, found = None, iter(list[Problem]())
    try:
        request = Request.model_validate(raw)
    except ValidationError as error:
        found = problems_of(error, OBJECTS)
    # That there is no `loras` at all has a code of its own, from `_lora_problems`.
    of_schema = (problem for problem in found if problem.field != "loras" or raw.get("loras") is not None)
    of_loras = chain(_lora_problems(raw, spec), _extra_lora_problems(raw, spec)) if spec else ()
    of_prompts = chain(_draft_problems(raw, spec), _prompt_problems(raw, spec)) if spec else ()
    _raise_if_any(chain(_model_problems(raw, served), of_schema, of_loras, of_prompts))
    assert request
    _raise_if_any(chain(_gif_problems(request), _training_problems(request), _count_problems(request)))
    return request


def _training_problems(request: Request) -> Iterator[Problem]:
    given = request.trained_with
    if given and given.qtype is not None and given.as_trained_with().format not in QTYPES:
        text = f"must be one of {', '.join(QTYPES)}, as in the training's config; other formats are not rebuilt here"
        yield Problem(Code.INVALID_INPUT, "trained_with.qtype", text)


def _count_problems(request: Request) -> Iterator[Problem]:
    if (videos := sum(prompt.num_videos for prompt in request.prompts)) > MAX_PROMPTS:
        text = f"the prompts ask for {videos} videos, and a job makes {MAX_PROMPTS} at most; send several jobs"
        yield Problem(Code.INVALID_INPUT, "prompts", text)
    for index, prompt in enumerate(request.prompts):
        if prompt.seed is not None and prompt.seed + prompt.num_videos - 1 > MAX_SEED:
            text = f"the last of {prompt.num_videos} videos would have a seed above {MAX_SEED}; start lower"
            yield Problem(Code.INVALID_INPUT, f"prompts[{index}].seed", text)


def _gif_problems(request: Request) -> Iterator[Problem]:
    for index, prompt in enumerate(request.prompts if request.output_format == "gif" else []):
        pixels = prompt.width * prompt.height * prompt.num_frames
        if pixels > MAX_GIF_PIXELS:
            text = (
                f"a gif of {prompt.num_frames} frames of {prompt.width}x{prompt.height} has {pixels / 1e6:.0f} million pixels, "
                f"and {MAX_GIF_PIXELS / 1e6:.0f} million fit into the worker's memory; ask for fewer frames, or for mp4 or webp"
            )
            yield Problem(Code.INVALID_INPUT, f"prompts[{index}].num_frames", text)


def _raise_if_any(problems: Iterator[Problem]) -> None:
    """Raises WorkerError with the first MAX_PROBLEMS of them."""
    listed = list(islice(problems, MAX_PROBLEMS))
    if next(problems, None):
        listed[-1] = Problem(listed[-1].code, "", f"there are more than {MAX_PROBLEMS} problems; correct these first")
    if listed:
        raise WorkerError.of(listed)


def _model_problems(raw: Mapping[str, Any], served: ModelSpec) -> Iterator[Problem]:
    model = raw.get("model")
    if not isinstance(model, str) or model == served.id:
        return
    if model in MODELS:
        text = f"this worker serves {served.id}, not {model}; send the request to an endpoint of {model}"
        yield Problem(Code.MODEL_NOT_SERVED, "model", text)
    else:
        named = f"{model!r} is" if re.fullmatch(r"[\w.-]{1,32}", model, re.ASCII) else "this is"
        close = get_close_matches(model.lower(), MODELS, n=1)
        meant = f"; did you mean `{close[0]}`? The" if close else "; the"
        text = f"{named} not a model id{meant} known ones are {', '.join(MODELS)}"
        yield Problem(Code.MODEL_NOT_FOUND, "model", text)


def _lora_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    """The rules between the items and the model; what one item may look like is the schema's."""
    loras = raw.get("loras")
    if loras is None or loras == []:
        example = '{"path": "job/name.safetensors"' + (', "transformer": "high"}' if spec.moe else "}")
        yield Problem(Code.LORA_FILE_REQUIRED, "loras", f"at least one LoRA is required, such as [{example}]")
    if not isinstance(loras, list):
        return
    sides = [item.get("transformer") if isinstance(item, dict) else None for item in loras]
    for index, item in enumerate(loras):
        yield from _path_problems(f"loras[{index}].path", item)
        if spec.moe and isinstance(item, dict) and sides[index] is None:
            text = f'{spec.id} has two transformers: say which one this LoRA is for, "high" or "low"'
            yield Problem(Code.MOE_FORMAT_REQUIRED, f"loras[{index}].transformer", text)
        if not spec.moe and sides[index] is not None:
            text = f"{spec.id} has one transformer and takes a single LoRA; leave `transformer` out"
            yield Problem(Code.MOE_FORMAT_NOT_SUPPORTED, f"loras[{index}].transformer", text)
    if not spec.moe and len(loras) > 1:
        yield Problem(Code.SINGLE_LORA_ONLY, "loras", f"{spec.id} takes exactly one LoRA, not {len(loras)}; send one item")
    given = [side for side in sides if side in ("high", "low")]
    if spec.moe and (len(loras) > 2 or len(set(given)) < len(given)):
        text = f"{spec.id} takes one high and one low LoRA at most; send each side once"
        yield Problem(Code.SINGLE_MOE_CONFIG_ONLY, "loras", text)


def _extra_lora_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    extra = raw.get("extra_loras")
    for index, item in enumerate(extra[: MAX_EXTRA_LORAS + 1] if isinstance(extra, list) else []):
        yield from _path_problems(f"extra_loras[{index}].path", item)
        side = item.get("transformer") if isinstance(item, dict) else None
        where = f"extra_loras[{index}].transformer"
        if spec.moe and isinstance(item, dict) and side is None:
            text = f'{spec.id} has two transformers: say which this LoRA is for, "high", "low" or "both"'
            yield Problem(Code.MOE_FORMAT_REQUIRED, where, text)
        if not spec.moe and side is not None:
            text = f"{spec.id} has one transformer; leave `transformer` out"
            yield Problem(Code.MOE_FORMAT_NOT_SUPPORTED, where, text)


def _draft_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    if raw.get("draft") is not True:
        return
    if spec.draft is None:
        with_one = ", ".join(other.id for other in MODELS.values() if other.draft)
        text = f"there is no few-step recipe for {spec.id}; leave it out, or use one of {with_one}"
        yield Problem(Code.INVALID_INPUT, "draft", text)
    elif raw.get("match") == "preview":
        text = "a draft does not look like the samples of the training; leave out `draft`, or set `match` to documented"
        yield Problem(Code.INVALID_INPUT, "draft", text)


def _path_problems(where: str, item: Any) -> Iterator[Problem]:
    path = item.get("path") if isinstance(item, dict) else None
    if not isinstance(path, str):
        return
    if not path.strip():
        yield Problem(Code.LORA_FILE_REQUIRED, where, "the path is empty; name a file such as job/name.safetensors")
    elif is_url(path):
        try:
            url = urlsplit(path)
            host = url.hostname
        except ValueError:
            host = None
        if not host:
            yield Problem(Code.INVALID_INPUT, where, "the URL has no proper host; use https://host/name.safetensors")
        elif "/tree/" in url.path and is_hub(host):
            text = "this URL shows a folder; use the file's own URL, with /resolve/ and the file's name"
            yield Problem(Code.INVALID_INPUT, where, text)
    elif "://" in path:
        yield Problem(Code.INVALID_INPUT, where, "only http and https URLs are fetched; use one, or a file below LORA_DIR")
    elif path.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", path) or "\0" in path:
        text = "must be relative to the LoRA folder, without `..`, such as job/name.safetensors"
        yield Problem(Code.INVALID_INPUT, where, text)


def _prompt_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    prompts = raw.get("prompts")
    for index, prompt in enumerate(prompts if isinstance(prompts, list) else []):
        if not isinstance(prompt, dict):
            continue
        images = {name: prompt.get(name) for name in ("ctrl_img", "ctrl_img_1")}
        given = {name: image for name, image in images.items() if isinstance(image, str) and not image.isspace() and image}
        where = f"prompts[{index}].{next(iter(given), 'ctrl_img')}"
        if len(set(given.values())) == 2:
            text = "`ctrl_img` and `ctrl_img_1` are two different images, and this model takes one; leave one out"
            yield Problem(Code.INVALID_INPUT, where, text)
        elif (
            not given
            and spec.control_image == "required"
            and all(image is None or isinstance(image, str) for image in images.values())
        ):
            text = f"{spec.id} needs a control image: give an http(s) URL, base64 or a data URL"
            yield Problem(Code.CONTROL_IMAGE_REQUIRED, where, text)
        elif given and spec.control_image == "none":
            takers = ", ".join(other.id for other in MODELS.values() if other.control_image != "none")
            text = f"{spec.id} takes no control image; leave it out, or use one of {takers}"
            yield Problem(Code.INVALID_INPUT, where, text)
        yield from _last_image_problems(index, prompt, spec)
        yield from _guidance_problems(index, prompt, spec)


def _last_image_problems(index: int, prompt: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    last, where = prompt.get("last_img"), f"prompts[{index}].last_img"
    if not isinstance(last, str) or not last or last.isspace():
        return
    if not spec.takes_last_image:
        takers = " or ".join(other.id for other in MODELS.values() if other.takes_last_image)
        text = f"{spec.id} was not made to end on a given frame; leave it out, or use {takers}"
        yield Problem(Code.INVALID_INPUT, where, text)
    elif prompt.get("num_frames") in (1, 2, 3, 4):
        text = "a video with a first and a last frame has 5 frames or more; set `num_frames` to at least 5"
        yield Problem(Code.INVALID_INPUT, where, text)


def _guidance_problems(index: int, prompt: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    second, where = prompt.get("guidance_scale_2"), f"prompts[{index}].guidance_scale_2"
    if not isinstance(second, int | float) or isinstance(second, bool):
        return
    first = prompt.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
    if not spec.moe:
        text = f"{spec.id} has one transformer; leave it out, and set `guidance_scale`"
        yield Problem(Code.INVALID_INPUT, where, text)
    elif second > 1 and isinstance(first, int | float) and first <= 1:
        text = "there is no guidance at all with a `guidance_scale` of 1 or less; raise that above 1, or leave this out"
        yield Problem(Code.INVALID_INPUT, where, text)


def _raw_problems(raw: Any) -> Iterator[Problem]:
    """What is wrong before a value is looked at: more values than MAX_VALUES, and texts and field names with lone surrogates,
    which JSON can carry and nothing behind it can.
    """
    # Each with the way to it, as (the way to its container, its key): of deep ones, a copy of the whole way would be long.
    waiting: list[tuple[Any, Any]] = [((), raw)]
    seen = 0
    while waiting:
        way, value = waiting.pop()
        if isinstance(value, str) and not _is_unicode(value):
            text = "contains invalid Unicode (an unpaired surrogate); send valid Unicode"
            yield Problem(Code.INVALID_INPUT, _path_of_way(way), text)
        elif isinstance(value, dict | list) and (seen := seen + len(value)) > MAX_VALUES:
            text = f"has too many values: the whole input may have {MAX_VALUES}; send several jobs"
            yield Problem(Code.INVALID_INPUT, _path_of_way(way), text)
            return
        elif isinstance(value, dict):
            waiting += [((way, key), item if _is_unicode(key) else key) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [((way, index), item) for index, item in enumerate(value)]


def _path_of_way(way: Any) -> str:
    location: list[int | str] = []
    while way:
        way, key = way
        location.append(key)
    return path_of(tuple(reversed(location)))


def _is_unicode(text: str) -> bool:
    return not re.search(r"[\ud800-\udfff]", text)
