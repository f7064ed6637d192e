"""The options of `run` → a request: those of the schema under the same names, and a file that they change."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, get_args

from client.errors import InvalidRequest
from client.request import is_file
from pipelines.catalog import MODELS, Match, Sampler
from worker.request import OutputFormat, Prompt, Request

_NUMBERS: dict[str, type] = {
    "width": int,
    "height": int,
    "sample_steps": int,
    "guidance_scale": float,
    "seed": int,
    "num_frames": int,
    "fps": int,
}
_THE_REQUEST = ("model", "trigger_word", "match", "output_format", "contact_sheet")
_EVERY_PROMPT = ("neg", *_NUMBERS, "sampler", "ctrl_img")
"""Fields of a prompt that an option sets, in every prompt of the request."""


def add_request_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="REQUEST.json", help="a request, or a job with `input`; - is stdin"
    )
    group = parser.add_argument_group("request", "In place of a file, or of what the file says.")
    group.add_argument("--model", metavar="ID", help=", ".join(MODELS))
    group.add_argument(
        "--lora",
        action="append",
        metavar="[SIDE=]PATH[@SCALE]",
        help="file below the worker's LORA_DIR, or a URL; high=… and low=… for Wan 2.2 14B",
    )
    group.add_argument("--trigger-word", metavar="WORD")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="several make several videos")
    group.add_argument("--image", dest="ctrl_img", metavar="FILE_OR_URL", help="the control image; a file is sent along")
    group.add_argument("--neg", metavar="TEXT", help=Prompt.model_fields["neg"].description)
    for name, kind in _NUMBERS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=Prompt.model_fields[name].description)
    group.add_argument("--sampler", choices=get_args(Sampler))
    group.add_argument("--match", choices=get_args(Match))
    group.add_argument("--output-format", choices=get_args(OutputFormat))
    sheet = Request.model_fields["contact_sheet"].description
    group.add_argument("--contact-sheet", action="store_true", default=None, help=sheet)
    group.add_argument("--send-hf-token", action="store_true", help="send HF_TOKEN of the environment, for LoRAs on the Hub")


def request_of(options: argparse.Namespace, stdin: Any) -> tuple[dict[str, Any], Path]:
    """The request, and the folder that its images are relative to. Raises InvalidRequest."""
    job: dict[str, Any] = {}
    folder = Path()
    if options.file is not None:
        job = _read(options.file, stdin)
        folder = options.file.parent
    request = dict(job["input"]) if isinstance(job.get("input"), dict) else job
    given = {name: value for name, value in vars(options).items() if value is not None}
    request |= {name: given[name] for name in _THE_REQUEST if name in given}
    if options.lora:
        request["loras"] = [lora_of(text) for text in options.lora]
    if options.send_hf_token:
        request["hf_token"] = os.environ.get("HF_TOKEN") or _complain("hf_token", "HF_TOKEN is not set in the environment")
    prompts = request.get("prompts")
    prompts = prompts if isinstance(prompts, list) else []
    if options.prompt:
        first = prompts[0] if prompts and isinstance(prompts[0], dict) else {}
        prompts = [first | {"prompt": text} for text in options.prompt]
    changes = {name: given[name] for name in _EVERY_PROMPT if name in given}
    if "ctrl_img" in changes:
        changes["ctrl_img_1"] = None  # the same field by another name
        if not changes["ctrl_img"].lower().startswith(("http://", "https://", "data:")):
            image = Path(changes["ctrl_img"]).absolute()  # not relative to the file's folder
            changes["ctrl_img"] = str(image) if is_file(image) else _complain("--image", f"there is no file {image}")
    if changes or options.prompt:
        request["prompts"] = [prompt | changes if isinstance(prompt, dict) else prompt for prompt in prompts]
    return ({**job, "input": request} if "input" in job else request), folder


def lora_of(text: str) -> dict[str, Any]:
    """`high=job/name.safetensors@0.8` as an item of `loras`."""
    lora: dict[str, Any] = {}
    side, _, rest = text.partition("=")
    if side in ("high", "low"):
        lora["transformer"], text = side, rest
    path, at, scale = text.rpartition("@")
    try:
        return {"path": path, **lora, "network_multiplier": float(scale)} if at else {"path": text, **lora}
    except ValueError:
        return {"path": text, **lora}


def _read(path: Path, stdin: Any) -> dict[str, Any]:
    try:
        job = json.loads(stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except OSError as error:
        _complain(str(path), f"cannot be read: {error.strerror}")
    except ValueError as error:
        _complain(str(path), f"is no JSON ({error})")
    return job if isinstance(job, dict) else _complain(str(path), "must be a JSON object")


def _complain(field: str, text: str) -> Any:
    raise InvalidRequest("INVALID_INPUT", [f"`{field}`: {text}"])
