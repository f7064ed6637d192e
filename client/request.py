"""Turns a user's request into the job to send: checks it as the worker does, and puts local images inside it.

Three checks need this computer: that an image file exists, that a LoRA's path is not a file of this computer, and that the
job is not larger than RunPod accepts.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.errors import InvalidRequest
from pipelines.catalog import MODELS
from worker.errors import Code, Problem, WorkerError
from worker.parse import parse
from worker.request import is_url

MAX_PAYLOAD = 10_000_000
"""Bytes of a request to /run: RunPod documents 10 MB. (/runsync accepts 20 MB, and keeps its result for one minute.)
Source: https://docs.runpod.io/serverless/endpoints/operation-reference."""

MAX_IMAGE = 64 << 20
"""Bytes; the default of the worker's MAX_IMAGE_BYTES."""

_LONGEST_PATH = 4096
"""Characters. A longer text is an image in base64, not the name of a file."""

_OF_A_MODEL = (Code.MOE_FORMAT_REQUIRED, Code.MOE_FORMAT_NOT_SUPPORTED, Code.SINGLE_LORA_ONLY, Code.CONTROL_IMAGE_REQUIRED)
"""Codes of rules that not every model has."""

_LOCAL_LORA = (
    "is a file of this computer, which the worker cannot read: upload it to the Hugging Face Hub or a bucket and give its URL, "
    "or put it below LORA_DIR on the network volume and give its path from there, such as job/name.safetensors"
)
_OUTSIDE_LORA_DIR = (
    "is not a path below the worker's LORA_DIR: put the file there and give its path from there, such as job/name.safetensors"
)


def job_of(raw: Any, folder: Path | None, is_local: bool) -> dict[str, Any]:
    """The job to send.

    `raw`: a job's `input`, or an object with `input` and RunPod's own fields beside it. `folder`: the base of relative image
    paths; None leaves image files alone. `is_local`: the worker runs on this computer. Raises InvalidRequest.
    """
    job = {name: value for name, value in raw.items() if name != "id"} if _is_job(raw) else {"input": raw}
    problems: list[Problem] = []
    if folder is not None:
        job["input"] = _with_images(job["input"], folder, problems)
    problems += _lora_problems(job["input"], is_local)
    known = {problem.field for problem in problems}
    problems += [problem for problem in _schema_problems(job["input"]) if problem.field not in known]
    if not problems and not is_local:
        problems += _size_problems(job)
    if problems:
        raise InvalidRequest(problems)
    return job


def _is_job(raw: Any) -> bool:
    return isinstance(raw, dict) and "input" in raw


def body_of(job: dict[str, Any]) -> bytes:
    """The job as compact JSON, as it is sent."""
    return json.dumps(job, separators=(",", ":")).encode()


def _schema_problems(request: Any) -> list[Problem]:
    """The problems that a worker of the request's model would find; without a model, those that every worker would find."""
    model = request.get("model") if isinstance(request, dict) else None
    served = MODELS.get(model) if isinstance(model, str) else None
    try:
        parse(request, served or next(iter(MODELS.values())))
    except WorkerError as error:
        problems = list(error.problems) or [Problem(error.code, "", error.message)]
        return [problem for problem in problems if model is not None or problem.code not in _OF_A_MODEL]
    return []


_IMAGES = ("ctrl_img", "ctrl_img_1", "last_img")
"""Fields of a prompt that may be files of this computer."""


def _with_images(request: Any, folder: Path, problems: list[Problem]) -> Any:
    """The request with each control image that is a file of this computer as a data URL."""
    if not isinstance(request, dict) or not isinstance(request.get("prompts"), list):
        return request
    prompts = [dict(prompt) if isinstance(prompt, dict) else prompt for prompt in request["prompts"]]
    for index, prompt in enumerate(prompts):
        for name in _IMAGES:
            source = prompt.get(name) if isinstance(prompt, dict) else None
            if isinstance(source, str) and _may_be_path(source):
                try:
                    prompt[name] = _data_url(folder / source) or source
                except ValueError as error:
                    problems.append(Problem(Code.INVALID_INPUT, f"prompts[{index}].{name}", str(error)))
    return {**request, "prompts": prompts}


def _data_url(path: Path) -> str:
    """The image file as a data URL; "" if `path` is neither a file nor named like an image. Raises ValueError."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if not is_file(path):
        if kind.startswith("image/"):
            raise ValueError(f"there is no file {path}")
        return ""
    try:
        if path.stat().st_size > MAX_IMAGE:
            raise ValueError(f"{path} is larger than the {MAX_IMAGE >> 20} MiB that a worker accepts; shrink it")
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _may_be_path(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_PATH and not is_url(text) and not text.lower().startswith("data:") and "\0" not in text


def _lora_problems(request: Any, is_local: bool) -> Iterator[Problem]:
    """LoRA paths that are files of this computer. A remote worker cannot read them, and a local one reads only its LORA_DIR."""
    for field in ("loras", "extra_loras"):
        loras = request.get(field) if isinstance(request, dict) else None
        for index, lora in enumerate(loras if isinstance(loras, list) else []):
            path = lora.get("path") if isinstance(lora, dict) else None
            if not isinstance(path, str) or not _may_be_path(path) or not is_file(path):
                continue
            is_relative = not path.startswith(("/", "~", "./", "../")) and not Path(path).is_absolute()
            if not (is_relative and is_local):
                yield Problem(Code.INVALID_INPUT, f"{field}[{index}].path", _OUTSIDE_LORA_DIR if is_local else _LOCAL_LORA)


def is_file(path: str | Path) -> bool:
    """Whether the file exists. False, without an error, for a text that cannot be a path."""
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):
        return False


def _size_problems(job: dict[str, Any]) -> Iterator[Problem]:
    size = len(body_of(job))
    if size <= MAX_PAYLOAD:
        return
    text = f"the request has {size / 1e6:.1f} MB, and RunPod accepts {MAX_PAYLOAD / 1e6:.0f} MB; "
    yield Problem(Code.INVALID_INPUT, "", text + "send large images as URLs, or shrink them")
    for index, prompt in enumerate(job["input"]["prompts"]):
        for name in _IMAGES:
            image = prompt.get(name) or ""
            if len(image) > MAX_PAYLOAD // 20:
                text = f"{len(image) / 1e6:.1f} MB as base64; a JPEG of the video's size is far smaller"
                yield Problem(Code.INVALID_INPUT, f"prompts[{index}].{name}", text)
