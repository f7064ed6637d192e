"""Reads the samples in an ai-toolkit training config, with every value that the trainer would use.

It follows the trainer's rules and does not know the worker; `client.training.requests` makes requests from the samples. Source:
ai-toolkit 0.12.26, `toolkit/config.py`, `toolkit/config_modules.py` (SampleConfig, SampleItem, GenerateImageConfig) and
`BaseSDTrainProcess.sample`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from client.errors import BadInput
from pipelines.trained import MULTIPLIER_FLAGS, TrainedWith, trained_with

RANDOM_SEED = -1
"""The trainer draws a random seed."""

_DEFAULTS: dict[str, Any] = {
    "width": 512,
    "height": 512,
    "neg": False,
    "seed": 0,
    "walk_seed": False,
    "guidance_scale": 7,
    "sample_steps": 20,
    "network_multiplier": 1,
    "num_frames": 1,
    "fps": 16,
}
"""The defaults of SampleConfig."""

_SAMPLE_VALUES = tuple(name for name in _DEFAULTS if name not in ("seed", "walk_seed"))
"""Values that a sample can override. The seed is not among them, since it depends on the samples before."""

_FLAGS: dict[str, tuple[str, type]] = {
    "n": ("neg", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "seed": ("seed", int),
    "l": ("guidance_scale", float),
    "cfg": ("guidance_scale", float),
    "s": ("sample_steps", int),
    "steps": ("sample_steps", int),
    **dict.fromkeys(MULTIPLIER_FLAGS, ("network_multiplier", float)),
    "frames": ("num_frames", int),
    "num_frames": ("num_frames", int),
    "fps": ("fps", int),
    "ctrl_img": ("ctrl_img", str),
}
"""A flag in the prompt → the value that it replaces, and its type."""

_FLAGS_WITHOUT_EFFECT = ("p2", "n2", "gr", "a", "ref", "ev", "extra_values", "ctrl_idx")
"""Flags that the trainer reads, but its Wan models ignore."""

_KEYS_WITHOUT_EFFECT = ("ctrl_idx", "ctrl_img_2", "ctrl_img_3")


@dataclass(frozen=True)
class Sample:
    """One preview of the trainer."""

    prompt: str
    """With the trigger word filled in, and without flags."""
    neg: str
    width: int
    height: int
    """Width and height in pixels: multiples of 8, at least 64. The model may round them down further."""
    sample_steps: int
    guidance_scale: float
    seed: int
    """0 to 2**64 - 1, or RANDOM_SEED."""
    num_frames: int
    """Before the model rounds it to 4n+1."""
    fps: int
    network_multiplier: float
    ctrl_img: str | None
    """The control image's path, as in the config."""
    warnings: tuple[str, ...] = ()
    """Parts of the sample that the trainer ignores."""


@dataclass(frozen=True)
class TrainingConfig:
    """The part of a training config that determines its samples."""

    name: str | None
    """The job's name, which is also that of the LoRA files; None for a config without a job."""
    model: Mapping[str, Any]
    samples: tuple[Sample, ...]
    trained_with: TrainedWith
    """How the training ran."""
    splits_sides: bool = True
    """Whether a LoRA of Wan 2.2 14B is saved as two files."""
    warnings: tuple[str, ...] = field(default=())
    trigger_word: str | None = None
    steps: int | None = None
    """`train.steps`: the step of the LoRA that is saved at the end."""


def read_training(path: Path) -> TrainingConfig:
    """Read a YAML or JSON config as the trainer does, with its environment variables and `[name]`. Raises BadInput, OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text, which the trainer needs too; save it as UTF-8") from error
    document = _parsed(path, _with_environment(text))
    if not isinstance(document, dict):
        raise BadInput(f"{path} is not a training config; it should have `job` and `config`")
    config = document.get("config", document)
    name = config.get("name") if isinstance(config, dict) else None
    if isinstance(name, str):
        config = _with_name(config, name)
    process = _process_of(config, path)
    section = process.get("sample")
    if not isinstance(section, dict):
        raise BadInput(f"{path}: its process has no `sample` section, so the trainer makes no previews")
    warnings = ["`first_sample` describes a preview from before the training; it is not converted"] * (
        process.get("first_sample") is not None
    )
    model = process.get("model")
    trigger_word = process.get("trigger_word")
    return TrainingConfig(
        name=name if isinstance(name, str) else None,
        model=model if isinstance(model, dict) else {},
        samples=tuple(resolve(section, None if trigger_word is None else str(trigger_word))),
        trained_with=trained_with(process),
        splits_sides=_splits_sides(process),
        warnings=tuple(warnings),
        trigger_word=None if trigger_word is None else str(trigger_word),
        steps=_steps(process),
    )


def _steps(process: Mapping[str, Any]) -> int | None:
    train = process.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if type(steps) is int else None


def _splits_sides(process: Mapping[str, Any]) -> bool:
    network = process.get("network")
    return not isinstance(network, dict) or bool(network.get("split_multistage_loras", True))


def _with_environment(text: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise BadInput(f"the config uses ${{{match[1]}}}, which is not set in the environment; set it as for training")
        return os.environ[match[1]]

    return re.sub(r"\$\{([^}]+)\}", value_of, text)


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text) if path.suffix.lower() in (".json", ".jsonc") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: cannot be read as YAML or JSON ({' '.join(str(error).split())})") from error


def _with_name(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, list):
        return [_with_name(item, name) for item in value]
    return {key: _with_name(item, name) for key, item in value.items()} if isinstance(value, dict) else value


def _process_of(config: Any, path: Path) -> dict[str, Any]:
    process = config.get("process", config) if isinstance(config, dict) else config
    if isinstance(process, list) and process:
        process = process[0]
    if not isinstance(process, dict):
        raise BadInput(f"{path} is not a training config; it should have `config.process` with a `sample` section")
    return process


def resolve(section: Mapping[str, Any], trigger_word: str | None) -> list[Sample]:
    """Return the samples of a `sample` section, in the trainer's order. Raises BadInput."""
    items = section.get("samples")
    if items is None:
        items = [{"prompt": prompt} for prompt in section.get("prompts") or []]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadInput("`sample.samples` must be a list of objects such as {prompt: …}")
    # The trainer skips items without a prompt, but takes the nth prompt's other values from the nth of all items.
    prompts = [item["prompt"] for item in items if item.get("prompt") is not None]
    if not prompts:
        raise BadInput("the `sample` section has no prompts, so the trainer makes no previews")
    seeds = _seeds(section, items, len(prompts))
    return [
        _sample(f"sample {number}", prompt, item, section, seed, trigger_word)
        for number, (prompt, item, seed) in enumerate(zip(prompts, items, seeds, strict=False))
    ]


def _seeds(section: Mapping[str, Any], items: list[dict[str, Any]], count: int) -> list[int]:
    """Return one seed per sample. Without walk_seed, a sample's own seed applies to the next samples too, until another one."""
    start = _number(_given(section, "seed", "sample"), int, "sample.seed")
    current, seeds = start, []
    for number, item in enumerate(items[:count]):
        if _given(section, "walk_seed", "sample"):
            current = start + number
        if item.get("seed") is not None:
            current = _number(item["seed"], int, f"the seed of sample {number}")
        seeds.append(current)
    return seeds


def _sample(
    where: str, prompt: Any, item: Mapping[str, Any], section: Mapping[str, Any], seed: int, trigger_word: str | None
) -> Sample:
    if not isinstance(prompt, str):
        raise BadInput(f"{where}: its prompt is {prompt!r}, which is not a text; put it in quotes")
    if trigger_word is not None:
        prompt = prompt.replace("[name]", trigger_word).replace("[trigger]", trigger_word)
    values: dict[str, Any] = {name: _given({**section, **item}, name, where) for name in _SAMPLE_VALUES} | {
        "seed": seed if seed == RANDOM_SEED else _torch_seed(seed, where),
        "ctrl_img": item.get("ctrl_img") or None,
    }
    prompt, flags, warnings = split_flags(prompt, where)
    if "seed" in flags:
        flags["seed"] = _torch_seed(flags["seed"], where)  # in a flag, -1 does not mean random
    values |= flags
    warnings += [f"{where}: `{key}` has no effect on the trainer's Wan models" for key in _KEYS_WITHOUT_EFFECT if item.get(key)]
    if item.get("ctrl_img_1") not in (None, item.get("ctrl_img")):
        warnings.append(f"{where}: `ctrl_img_1` has no effect on the trainer's Wan models, which use `ctrl_img`")
    return Sample(
        prompt=prompt,
        neg=str(values["neg"]) if values["neg"] not in (None, False) else "",
        width=_floored(_number(values["width"], int, f"the width of {where}")),
        height=_floored(_number(values["height"], int, f"the height of {where}")),
        sample_steps=_number(values["sample_steps"], int, f"sample_steps of {where}"),
        guidance_scale=_number(values["guidance_scale"], float, f"guidance_scale of {where}"),
        seed=values["seed"],
        num_frames=_number(values["num_frames"], int, f"num_frames of {where}"),
        fps=_number(values["fps"], int, f"fps of {where}"),
        network_multiplier=_multiplier(values["network_multiplier"], where),
        ctrl_img=values["ctrl_img"],
        warnings=tuple(warnings),
    )


def split_flags(prompt: str, where: str) -> tuple[str, dict[str, Any], list[str]]:
    """Return (prompt before the first `--`, values of its flags, warnings about ignored flags), as the trainer splits it.

    A flag ends at the first space, and its value at the next `--`. Of several flags with one name, the last counts. The trainer
    drops unknown flags, together with the text after them.
    """
    text, *pieces = prompt.strip().split("--")
    values: dict[str, Any] = {}
    warnings = []
    for piece in pieces:
        flag = piece.split(" ")[0].strip()
        content = piece[len(flag) :].strip()
        if flag in _FLAGS:
            name, kind = _FLAGS[flag]
            values[name] = content if kind is str else _flag_number(content, kind, f"--{flag} in the prompt of {where}")
        elif flag in _FLAGS_WITHOUT_EFFECT:
            warnings.append(f"{where}: --{flag} has no effect on the trainer's Wan models")
        else:
            warnings.append(f"{where}: --{flag} is not a flag of the trainer, which drops `--{piece.rstrip()}`")
    return text.strip(), values, warnings


def _flag_number(content: str, kind: Callable[[str], Any], where: str) -> Any:
    try:
        return kind(content)
    except ValueError:
        raise BadInput(f"{where} should be a number, not {content!r}; the trainer fails there") from None


def _given(section: Mapping[str, Any], name: str, where: str) -> Any:
    value = section.get(name, _DEFAULTS[name])
    if value is None and name != "neg":
        raise BadInput(f"{where}: `{name}` is empty; the trainer fails there. Remove the line to use {_DEFAULTS[name]}")
    return value


def _number(value: Any, kind: type, where: str) -> Any:
    """Convert a value to `kind`. YAML reads `1e0` as a text, but the trainer's own loader reads a number."""
    try:
        number = float("nan") if isinstance(value, bool) else kind(value) if isinstance(value, str) else value
        if math.isfinite(number) and number == kind(number):
            return kind(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadInput(f"{where} is {value!r}; it should be a {'whole ' * (kind is int)}number")


def _multiplier(value: Any, where: str) -> float:
    try:
        return float(_number(value, float, f"network_multiplier of {where}"))
    except BadInput:
        if isinstance(value, str):
            return 1.0  # as the trainer does
        raise


def _floored(side: int) -> int:
    return max(64, side - side % 8)


def _torch_seed(seed: int, where: str) -> int:
    """Return the seed as torch uses it: it adds 2**64 to negative ones."""
    if not -(2**63) <= seed < 2**64:
        raise BadInput(f"the seed of {where} is {seed}; torch accepts at most 64 bits, and the trainer fails there")
    return seed % 2**64
