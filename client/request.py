"""What a user gives → the job that is sent: checked as the worker will, with local images inside it.

What only this computer can know is checked here: that an image is there, that a LoRA's path is not one of this computer, and
that the whole is not larger than RunPod takes.
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
from worker.errors import WorkerError
from worker.request import is_url, parse

MAX_PAYLOAD = 10 << 20
"""Bytes of a POST to /run, as RunPod's own command counts them. (/runsync takes twice as many, and forgets after a minute.)"""

MAX_IMAGE = 64 << 20
"""Bytes; the default of the worker's MAX_IMAGE_BYTES."""

_LONGEST_PATH = 4096
"""Characters; a longer text is an image, not the name of one."""

_REMEDY = (
    "is a file of this computer, which the worker cannot read: upload it to the Hugging Face Hub or a bucket and give its URL, "
    "or put it below LORA_DIR on the network volume and give its path from there, such as job/name.safetensors"
)
_REMEDY_HERE = (
    "is not below the worker's LORA_DIR, or not named from there: put it there and give its path from there, such as "
    "job/name.safetensors"
)

Problem = tuple[str, str]
"""The field, and what is wrong with it."""


def job_of(raw: dict[str, Any], folder: Path, here: bool) -> dict[str, Any]:
    """The job to send. `folder`: what paths of images are relative to; `here`: the worker is on this computer.

    `raw` is a job's `input`, or an object that has one, and what RunPod takes beside it. Raises InvalidRequest.
    """
    job = (
        {name: value for name, value in raw.items() if name != "id"}
        if isinstance(raw, dict) and "input" in raw
        else {"input": raw}
    )
    found: list[Problem] = []
    job["input"] = _with_images(job["input"], folder, found)
    found += _local_loras(job["input"], here)
    code, of_schema = _schema_problems(job["input"])
    told = {field for field, _ in found}
    problems = [f"`{field}`: {text}" for field, text in found]
    problems += [text for field, text in of_schema if field not in told]
    if not problems and not here:
        problems += _size_problems(job)
    if problems:
        raise InvalidRequest(code or "INVALID_INPUT", problems)
    return job


def body_of(job: dict[str, Any]) -> bytes:
    """The job as it goes over the wire."""
    return json.dumps(job, separators=(",", ":")).encode()


def _schema_problems(request: Any) -> tuple[str | None, list[Problem]]:
    """The code of the worker's error, and its problems; the worker of this model is the one that is meant."""
    model = request.get("model") if isinstance(request, dict) else None
    served = MODELS.get(model) if isinstance(model, str) else None
    try:
        parse(request, served or next(iter(MODELS.values())))
    except WorkerError as error:
        lines = [(problem.field, f"{problem} ({problem.code})") for problem in error.problems]
        return error.code, lines or [("", error.message)]
    return None, []


def _with_images(request: Any, folder: Path, found: list[Problem]) -> Any:
    """The request with every control image that is a file of this computer as a data URL."""
    if not isinstance(request, dict) or not isinstance(request.get("prompts"), list):
        return request
    prompts = [dict(prompt) if isinstance(prompt, dict) else prompt for prompt in request["prompts"]]
    for index, prompt in enumerate(prompts):
        for name in ("ctrl_img", "ctrl_img_1"):
            source = prompt.get(name) if isinstance(prompt, dict) else None
            if isinstance(source, str) and _may_be_path(source):
                try:
                    prompt[name] = _data_url(folder / source) or source
                except ValueError as error:
                    found.append((f"prompts[{index}].{name}", str(error)))
    return {**request, "prompts": prompts}


def _data_url(path: Path) -> str:
    """The image that is in this file; "" for what is no file and not named like one. Raises ValueError."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if not is_file(path):
        if kind.startswith("image/"):
            raise ValueError(f"there is no file {path}")
        return ""
    try:
        if path.stat().st_size > MAX_IMAGE:
            raise ValueError(f"{path} has more than the {MAX_IMAGE >> 20} MiB that a worker takes; shrink it")
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _may_be_path(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_PATH and not is_url(text) and not text.lower().startswith("data:") and "\0" not in text


def _local_loras(request: Any, here: bool) -> Iterator[Problem]:
    """LoRAs of this computer, which no worker elsewhere can see; a worker here looks below its LORA_DIR only."""
    loras = request.get("loras") if isinstance(request, dict) else None
    for index, lora in enumerate(loras if isinstance(loras, list) else []):
        path = lora.get("path") if isinstance(lora, dict) else None
        if not isinstance(path, str) or not _may_be_path(path):
            continue
        is_relative = not path.startswith(("/", "~", "./", "../")) and not Path(path).is_absolute()
        if is_relative and (here or not is_file(path)):
            continue
        if is_file(path):
            yield f"loras[{index}].path", _REMEDY_HERE if here else _REMEDY


def is_file(path: str | Path) -> bool:
    """Whether there is such a file here, whatever the text is."""
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):
        return False


def _size_problems(job: dict[str, Any]) -> Iterator[str]:
    size = len(body_of(job))
    if size <= MAX_PAYLOAD:
        return
    limit = MAX_PAYLOAD >> 20
    yield f"it has {size / (1 << 20):.1f} MiB, and RunPod takes {limit} MiB; send large images as URLs, or shrink them"
    for index, prompt in enumerate(job["input"]["prompts"]):
        for name in ("ctrl_img", "ctrl_img_1"):
            image = prompt.get(name) or ""
            if len(image) > MAX_PAYLOAD // 20:
                text = f"{len(image) / (1 << 20):.1f} MiB as base64; as a JPEG of the video's size it is far smaller"
                yield f"`prompts[{index}].{name}`: {text}"
