"""The options of `run`: the fields of a request, under the same names. They replace what a request file says.

And those of `from-training` and `sweep`."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, get_args

from client.errors import InvalidRequest
from client.request import is_file
from pipelines.catalog import MODELS, ImageFit, Match, Sampler
from worker.errors import Code, Problem
from worker.request import OutputFormat, Prompt, Request

_NUMBERS: dict[str, type] = {
    "width": int,
    "height": int,
    "sample_steps": int,
    "guidance_scale": float,
    "guidance_scale_2": float,
    "shift": float,
    "seed": int,
    "num_videos": int,
    "num_frames": int,
    "fps": int,
}
_REQUEST_FIELDS = ("model", "draft", "trigger_word", "match", "trained_with", "output_format", "contact_sheet")
_IMAGES = {"ctrl_img": "--image", "last_img": "--last-image"}
_PROMPT_FIELDS = ("neg", *_NUMBERS, "sampler", *_IMAGES, "image_fit")
"""Fields of a prompt. An option sets them in every prompt of the request."""

TRAINING_EPILOG = """\
FOLDER is what ai-toolkit wrote: config.yaml, the LoRA files and samples/. With no further option it makes the samples of the
last step again, with the trainer's own prompts, seeds and sizes ("match": "preview").

The worker must be able to read the LoRA. Copy the folder to the network volume as loras/NAME, or give the folder's address:
  --lora-folder https://huggingface.co/me/my_lora/resolve/main

examples:
  python -m client from-training output/my_lora --dry-run
  python -m client from-training output/my_lora --endpoint ENDPOINT_ID --step 1500 --sample 0
  python -m client from-training output/my_lora --prompt "[trigger] on the beach" --endpoint ENDPOINT_ID
"""

SWEEP_EPILOG = """\
The same command goes on with a sweep that was stopped: finished videos are kept, jobs that still run are followed, and what
failed is tried again. With more LoRAs, scales or seeds it makes the new videos only.

The folder gets grid.mp4, sheet.jpg, index.html to look through, and each video in videos/.

examples:
  python -m client sweep request.json --lora boat/boat_000001000 --lora boat/boat_000002000 --scale 0.6,0.8,1 --seed 42,43
  python -m client sweep --training output/boat --scale 0.8,1 --endpoint ENDPOINT_ID
  python -m client sweep request.json --scale=-1,0,1
"""


def add_request_options(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    group = parser.add_argument_group("request", "Options replace the fields of a file, or make a request without one.")
    group.add_argument(
        "--lora",
        action="append",
        metavar="[SIDE=]PATH[@SCALE]",
        help="file below the worker's LORA_DIR, or a URL; high=… and low=… for Wan 2.2 14B",
    )
    _add_fields(group, _NUMBERS)
    group.add_argument("--output-format", choices=get_args(OutputFormat))
    sheet = Request.model_fields["contact_sheet"].description
    group.add_argument("--contact-sheet", action="store_true", default=None, help=sheet)


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    group = parser.add_argument_group("sweep", "Each prompt is made with every LoRA, scale and seed.")
    group.add_argument(
        "--lora",
        action="append",
        metavar="PATH[@SCALE]",
        help="a LoRA to try; repeat it for each. For Wan 2.2 14B, NAME is NAME_high_noise.safetensors and NAME_low_noise…, and "
        "high=PATH,low=PATH names two other files",
    )
    group.add_argument(
        "--scale", action="extend", type=_list_of(float), metavar="N,N,…", help="the LoRA's network_multiplier, as 0.6,0.8,1"
    )
    group.add_argument("--seed", action="extend", type=_list_of(int), metavar="N,N,…", help="as 42,43")
    group.add_argument(
        "--concurrency", type=int, default=3, metavar="N", help="jobs in the endpoint's queue at once (default: %(default)s)"
    )
    group.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    training = parser.add_argument_group("training", "A training's folder in place of a request: every LoRA that it saved.")
    training.add_argument(
        "--training", type=Path, metavar="FOLDER", help="what ai-toolkit wrote: config.yaml and the LoRA files"
    )
    training.add_argument(
        "--step", action="extend", type=_list_of(int), metavar="N,N,…", help="only the LoRAs that were saved at these steps"
    )
    training.add_argument(
        "--sample", action="extend", type=_list_of(int), metavar="N,N,…", help="the config's samples to make (default: 0)"
    )
    training.add_argument("--lora-folder", metavar="WHERE", help=_LORA_FOLDER)
    group = parser.add_argument_group("request", "Options replace the fields of the file or the config, for all videos.")
    _add_fields(group, [name for name in _NUMBERS if name not in ("seed", "num_videos")])


def _list_of(kind: type) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    numbers.__name__ = f"list of {'whole ' * (kind is int)}numbers"  # argparse says: invalid … value
    return numbers


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="REQUEST.json", help="a request, or a job with `input`; - reads stdin"
    )


def _add_fields(group: argparse._ArgumentGroup, numbers: Iterable[str]) -> None:
    group.add_argument("--model", metavar="ID", help=", ".join(MODELS))
    group.add_argument(
        "--extra-lora",
        dest="extra_loras",
        action="append",
        metavar="[SIDE=]PATH[@SCALE]",
        help="one more LoRA on top; high=…, low=… or both=… for Wan 2.2 14B",
    )
    group.add_argument("--draft", action="store_true", default=None, help=Request.model_fields["draft"].description)
    group.add_argument("--trigger-word", metavar="WORD")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; repeat it for several videos")
    group.add_argument(
        "--image", dest="ctrl_img", metavar="FILE_OR_URL", help="control image; a file is sent inside the request"
    )
    group.add_argument("--last-image", dest="last_img", metavar="FILE_OR_URL", help="frame to end on, for wan22_14b_i2v")
    group.add_argument("--image-fit", choices=get_args(ImageFit), help=Prompt.model_fields["image_fit"].description)
    group.add_argument("--neg", metavar="TEXT", help=Prompt.model_fields["neg"].description)
    for name in numbers:
        help = Prompt.model_fields[name].description
        group.add_argument(f"--{name.replace('_', '-')}", type=_NUMBERS[name], metavar="N", help=help)
    group.add_argument("--sampler", choices=get_args(Sampler))
    group.add_argument("--match", choices=get_args(Match))
    group.add_argument(
        "--trained-with", metavar="JSON", help='how the training ran, such as {"quantize": true}; for --match preview'
    )
    group.add_argument(
        "--send-hf-token",
        action="store_true",
        help="send the environment's HF_TOKEN, to download private LoRAs from the Hugging Face Hub",
    )


_LORA_FOLDER = "where the worker finds the LoRA files: a folder below its LORA_DIR, or a URL (default: the training's name)"


def add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the training's output folder")
    parser.add_argument("--step", type=int, metavar="N", help="the LoRA that was saved at this step (default: the last)")
    parser.add_argument("--sample", type=int, action="append", metavar="N", help="only this sample, counted from 0; repeatable")
    parser.add_argument("--prompt", metavar="TEXT", help="another prompt, with the values of the sample (default: the first)")
    parser.add_argument("--lora-folder", metavar="WHERE", help=_LORA_FOLDER)
    parser.add_argument("--model", choices=MODELS, metavar="ID", help="if the config does not say which")
    parser.add_argument("--output-format", choices=get_args(OutputFormat), help="png: lossless frames (default: mp4)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")


def request_of(options: argparse.Namespace, stdin: Any) -> tuple[dict[str, Any], Path]:
    """The request, and the base folder of its relative image paths. Raises InvalidRequest."""
    job: dict[str, Any] = {}
    folder = Path()
    if options.file is not None:
        job = _read(options.file, stdin)
        folder = options.file.parent
    if isinstance(job.get("input"), dict):
        return {**job, "input": changed_request(job["input"], options)}, folder
    return (job if "input" in job else changed_request(job, options)), folder


def changed_request(request: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The request with the values of all options that were given. Raises InvalidRequest."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    if options.trained_with:
        given["trained_with"] = _training_of(options.trained_with)
    request = request | {name: given[name] for name in _REQUEST_FIELDS if name in given}
    if options.lora:
        request["loras"] = [lora_of(text) for text in options.lora]
    if options.extra_loras:
        request["extra_loras"] = [lora_of(text) for text in options.extra_loras]
    if options.send_hf_token:
        request["hf_token"] = os.environ.get("HF_TOKEN") or _reject("hf_token", "HF_TOKEN is not set in the environment")
    prompts = request.get("prompts")
    prompts = prompts if isinstance(prompts, list) else []
    if options.prompt:
        first = prompts[0] if prompts and isinstance(prompts[0], dict) else {}
        prompts = [first | {"prompt": text} for text in options.prompt]
    changes = {name: given[name] for name in _PROMPT_FIELDS if name in given}
    if "ctrl_img" in changes:
        changes["ctrl_img_1"] = None  # another name of the same field
    for name in [name for name in _IMAGES if name in changes]:
        if not changes[name].lower().startswith(("http://", "https://", "data:")):
            image = Path(changes[name]).absolute()  # relative to the current folder, not to the file's
            changes[name] = str(image) if is_file(image) else _reject(_IMAGES[name], f"there is no file {image}")
    if changes or options.prompt:
        request["prompts"] = [prompt | changes if isinstance(prompt, dict) else prompt for prompt in prompts]
    return request


_REMEDIES = {
    Code.LORA_FILE_REQUIRED: "is required: a file below the worker's LORA_DIR, such as job/name.safetensors, or a URL",
    Code.CONTROL_IMAGE_REQUIRED: "is required by this model: an image of this computer, or a URL",
    Code.MOE_FORMAT_REQUIRED: "needs its side with this model: write high=PATH or low=PATH",
}
"""What an option would do, for the codes whose own text speaks of fields."""


def in_terms_of_options(error: InvalidRequest, options: argparse.Namespace) -> InvalidRequest:
    """The error with the names of options in place of fields, for all that was given as an option or could be."""

    def renamed(problem: Problem) -> Problem:
        path = problem.field.split(".")
        name = path[-1] if path[0].startswith("prompts[") else re.sub(r"\W.*", "", path[0])
        option = {"ctrl_img": "image", "prompts": "prompt", "loras": "lora"}.get(name, name.replace("_", "-"))
        attribute = {"image": "ctrl_img"}.get(option, option.replace("-", "_"))
        in_file = options.file is not None and getattr(options, attribute, None) is None
        if in_file or not hasattr(options, attribute):
            return problem
        return Problem(problem.code, f"--{option}", _REMEDIES.get(problem.code, problem.text))

    return InvalidRequest(list(dict.fromkeys(renamed(problem) for problem in error.problems)))


def lora_of(text: str) -> dict[str, Any]:
    """An item of `loras` or `extra_loras` from text such as `high=job/name.safetensors@0.8`."""
    lora: dict[str, Any] = {}
    side, _, rest = text.partition("=")
    if side in ("high", "low", "both"):
        lora["transformer"], text = side, rest
    path, at, scale = text.rpartition("@")
    try:
        return {"path": path, **lora, "network_multiplier": float(scale)} if at else {"path": text, **lora}
    except ValueError:
        return {"path": text, **lora}


def _training_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        _reject("--trained-with", f'is not JSON ({error}); write it as {{"quantize": true}}')


def _read(path: Path, stdin: Any) -> dict[str, Any]:
    try:
        job = json.loads(stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        _reject(str(path), f"cannot be read: {error.strerror}")
    except ValueError as error:
        _reject(str(path), f"is not JSON ({error})")
    return job if isinstance(job, dict) else _reject(str(path), "must be a JSON object")


def _reject(field: str, text: str) -> NoReturn:
    raise InvalidRequest([Problem(Code.INVALID_INPUT, field, text)])
