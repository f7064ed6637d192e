"""Decides the cells of a sweep: a video for each prompt, LoRA, seed and scale, from a request or from a training's folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import urlsplit

from client.errors import InvalidRequest
from client.options import changed_request, in_terms_of_options, lora_of, request_of
from client.request import job_of
from pipelines.catalog import DEFAULT_SEED, MODELS
from worker.errors import Code, Problem
from worker.request import is_url

_SUFFIX = ".safetensors"
_OF_A_SIDE = re.compile(r"_(high|low)_noise(?=(?:\.safetensors)?(?:[?#]|$))")
"""What the trainer adds to the names of the two files of a Wan 2.2 14B LoRA."""

Item = Mapping[str, Any]
"""An item of a request's `loras`."""


@dataclass(frozen=True)
class Axis:
    """One way in which the cells differ."""

    name: str
    values: tuple[str, ...]
    """At least one; "" where there is only one, and it is not the same in all cells."""

    def in_words(self, place: int) -> str:
        """A value for people. A prompt and a LoRA need no name before them."""
        return f"{self.name} {self.values[place]}" if self.name in ("seed", "scale") else self.values[place]


@dataclass(frozen=True)
class Cell:
    """One video."""

    place: tuple[int, ...]
    """Its value on each axis, by number."""
    job: dict[str, Any]
    """What is sent."""
    title: str
    slug: str

    @cached_property
    def key(self) -> str:
        """The same for the same input; the token does not count."""
        return hashlib.sha256(json.dumps(self.shown_job()["input"], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return f"{self.slug}-{self.key[:6]}"

    @property
    def is_draft(self) -> bool:
        return bool(self.job["input"].get("draft"))

    def shown_job(self) -> dict[str, Any]:
        """The job to print: without the token."""
        return {**self.job, "input": {name: value for name, value in self.job["input"].items() if name != "hf_token"}}


@dataclass(frozen=True)
class Plan:
    model: str
    axes: tuple[Axis, ...]
    """Prompts, LoRAs, seeds and scales."""
    cells: tuple[Cell, ...]
    lines: tuple[str, ...]
    """What was found in the training's folder."""


@dataclass(frozen=True)
class TriedLora:
    """A LoRA to try: one file, or the two of a Wan 2.2 14B training."""

    title: str
    items: tuple[Item, ...]
    """Without `network_multiplier` where the prompt decides it."""


@dataclass(frozen=True)
class _Base:
    """A prompt, before LoRA, seed and scale are put in."""

    job: dict[str, Any]
    """With this prompt alone, and with images inside."""
    seed: int
    """The prompt's own."""
    scale: float | None = None
    """The scale of the training's sample; None in a request, where each file has its own."""

    @property
    def prompt(self) -> str:
        """With the trigger word filled in."""
        request, [prompt] = self.job["input"], self.job["input"]["prompts"]
        return str(prompt["prompt"]).replace(
            "[trigger]", prompt.get("trigger_word") or request.get("trigger_word") or "[trigger]"
        )

    def job_with(self, lora: TriedLora, seed: int | None, scale: float | None) -> dict[str, Any]:
        """The job of a cell. None is the prompt's own."""
        request, scale = self.job["input"], self.scale if scale is None else scale
        given = {} if scale is None else {"network_multiplier": scale}
        loras = [{"network_multiplier": 1.0, **item, **given} for item in lora.items]
        prompt = request["prompts"][0] | {"seed": self.seed if seed is None else seed}
        return {**self.job, "input": request | {"loras": loras, "prompts": [prompt]}}


def plan_of(options: argparse.Namespace, is_local: bool, stdin: Any) -> Plan:
    """The cells that the options ask for, each checked as the worker checks it. Raises InvalidRequest."""
    if options.concurrency < 1:
        _reject("--concurrency", "must be 1 or more")
    _check_scales(options.lora or (), options.scale)
    try:
        if options.training:
            bases, loras, lines = _of_training(options, is_local)
        else:
            bases, loras = _of_request(options, is_local, stdin)
            lines = []
        return _crossed(bases, loras, _axis(options.seed), _axis(options.scale), is_local, lines)
    except InvalidRequest as error:
        raise in_terms_of_options(error, options) from None


def _check_scales(loras: Iterable[str], scales: Sequence[float] | None) -> None:
    if scales and (scaled := [text for text in loras if "network_multiplier" in lora_of(text)]):
        _reject("--lora", f"{scaled[0]} has a scale after its @, and --scale gives others; use one of the two")


def _axis(values: Iterable[Any] | None) -> list[Any]:
    """Each value once; None is the prompt's own."""
    return list(dict.fromkeys(values or ())) or [None]


def _crossed(
    bases: Sequence[_Base],
    loras: Sequence[TriedLora],
    seeds: Sequence[int | None],
    scales: Sequence[float | None],
    is_local: bool,
    lines: Sequence[str],
) -> Plan:
    """Every prompt with every LoRA, seed and scale. None is the prompt's own."""
    places = list(product(*(range(len(axis)) for axis in (bases, loras, seeds, scales))))
    jobs = [bases[p].job_with(loras[n], seeds[s], scales[c]) for p, n, s, c in places]
    requests = [job["input"] for job in jobs]
    _check(jobs, is_local)
    axes = (
        Axis("prompt", tuple(base.prompt for base in bases)),
        Axis("LoRA", tuple(lora.title for lora in loras)),
        Axis("seed", _in_words(seeds, (request["prompts"][0]["seed"] for request in requests))),
        Axis("scale", _in_words(scales, (item["network_multiplier"] for request in requests for item in request["loras"]))),
    )
    cells = []
    for place, job in zip(places, jobs, strict=True):
        words = [axis.in_words(at) for axis, at in zip(axes, place, strict=True) if len(axis.values) > 1]
        lora, seed = loras[place[1]].title, job["input"]["prompts"][0]["seed"]
        slug = re.sub(r"[^\w.]+", "-", f"{lora}-{axes[3].values[place[3]]}-{seed}").strip("-")
        cells.append(Cell(place, job, ", ".join(words) or lora, slug[-80:]))
    return Plan(requests[0]["model"], axes, tuple(cells), tuple(lines))


def _check(jobs: Iterable[dict[str, Any]], is_local: bool) -> None:
    problems: list[Problem] = []
    for job in jobs:
        if job["input"]["prompts"][0]["seed"] == -1:
            _reject("--seed", "must be 0 or more: with a random seed, -1, no two cells would have the same one to compare")
        try:
            job_of(job, None, is_local)
        except InvalidRequest as error:
            problems += error.problems
    if problems:
        named = [
            Problem(problem.code, "--scale", problem.text) if problem.field.endswith("].network_multiplier") else problem
            for problem in problems
        ]
        raise InvalidRequest(list(dict.fromkeys(named)))


def _in_words(values: Sequence[float | None], own: Iterable[float]) -> tuple[str, ...]:
    """The values of an axis. One that was not given is the prompts' own, if they agree."""
    if values == [None]:
        different = set(own)
        return (_number(different.pop()) if len(different) == 1 else "",)
    return tuple(_number(value) for value in values)


def _number(value: float | None) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _single(job: dict[str, Any], is_local: bool, folder: Path | None, scale: float | None = None) -> list[_Base]:
    """A base for each prompt of a job, which is checked and gets its images. Raises InvalidRequest."""
    job = job_of(job, folder, is_local)
    request = job["input"] | {"output_format": "mp4", "contact_sheet": False}
    bases = []
    for index, prompt in enumerate(request["prompts"]):
        if (prompt.get("num_videos") or 1) > 1:
            _reject(f"prompts[{index}].num_videos", "has no place in a sweep, where each cell is one video: use --seed 42,43")
        seed = DEFAULT_SEED + index if prompt.get("seed") is None else prompt["seed"]
        bases.append(_Base({**job, "input": request | {"prompts": [prompt]}}, seed, scale))
    return bases


# From a request.


def sweep_of(
    request: dict[str, Any], loras: Sequence[str | TriedLora], scales: Sequence[float], seeds: Sequence[int], is_local: bool
) -> Plan:
    """The cells of a request. An axis without values has the request's own. Raises InvalidRequest.

    `loras`: texts as of `--lora`, or LoRAs. One that has no scale gets the request's, of the same side.
    """
    spec = MODELS.get(str(request.get("model")))
    texts = [lora for lora in loras if isinstance(lora, str)]
    _check_scales(texts, scales)
    tried = [*_loras(texts, spec is not None and spec.moe), *(lora for lora in loras if isinstance(lora, TriedLora))]
    own = {item.get("transformer"): item["network_multiplier"] for item in request["loras"] if "network_multiplier" in item}
    tried = [replace(lora, items=tuple(_with_scale(item, own) for item in lora.items)) for lora in tried]
    if tried:
        request = request | {"loras": list(tried[0].items)}
    bases = _single(request, is_local, None)
    return _crossed(bases, tried or [_own_lora(request)], _axis(seeds), _axis(scales), is_local, ())


def _with_scale(item: Item, scales: Mapping[Any, float]) -> Item:
    side = item.get("transformer")
    return {"network_multiplier": scales[side], **item} if side in scales else item


def _of_request(options: argparse.Namespace, is_local: bool, stdin: Any) -> tuple[list[_Base], list[TriedLora]]:
    job, folder = request_of(_without_axes(options), stdin)
    request = job["input"] if isinstance(job.get("input"), dict) else job
    spec = MODELS.get(str(request.get("model")))
    loras = _loras(options.lora, spec is not None and spec.moe) if options.lora else []
    if loras:
        request = request | {"loras": list(loras[0].items)}
    bases = _single({**job, "input": request} if "input" in job else request, is_local, folder)
    return bases, loras or [_own_lora(request)]


def _own_lora(request: Mapping[str, Any]) -> TriedLora:
    return TriedLora(_name(request["loras"]), tuple(request["loras"]))


def _without_axes(options: argparse.Namespace) -> argparse.Namespace:
    """The options that say the same of every cell."""
    return argparse.Namespace(**vars(options) | {"lora": None, "seed": None})


def _loras(texts: Iterable[str], is_moe: bool) -> list[TriedLora]:
    """The LoRAs of the command line. Two files of one name, for high and low noise, are one LoRA."""
    found: list[list[dict[str, Any]]] = []
    for text in dict.fromkeys(texts):
        items = [item for part in re.split(",(?=(?:high|low)=)", text) for item in _items(lora_of(part), is_moe)]
        for group in found:
            if len(items) == 1 and len(group) == 1 and _is_pair(group[0], items[0]):
                group += items
                break
        else:
            found.append(items)
    titles = [_name(items) + _scale_of(items) for items in found]
    several = {title for title, count in Counter(titles).items() if count > 1}
    paths = [_OF_A_SIDE.sub("", items[0]["path"]).removesuffix(_SUFFIX) + _scale_of(items) for items in found]
    return [
        TriedLora(path if title in several else title, tuple(items))
        for path, title, items in zip(paths, titles, found, strict=True)
    ]


def _items(item: dict[str, Any], is_moe: bool) -> list[dict[str, Any]]:
    """The files that an item of the command line names: its suffix and its sides can be left out."""
    path = item["path"]
    if not is_url(path) and not path.endswith(_SUFFIX):
        if is_moe and "transformer" not in item and not _OF_A_SIDE.search(path):
            return [{**item, "path": f"{path}_{side}_noise{_SUFFIX}", "transformer": side} for side in ("high", "low")]
        path += _SUFFIX
    side = _OF_A_SIDE.search(path) if is_moe else None
    return [{"transformer": side[1], **item, "path": path} if side else {**item, "path": path}]


def _is_pair(one: Item, other: Item) -> bool:
    sides = {item.get("transformer") for item in (one, other)}
    return sides == {"high", "low"} and _OF_A_SIDE.sub("", one["path"]) == _OF_A_SIDE.sub("", other["path"])


def _name(items: Sequence[Item]) -> str:
    """The name of a LoRA for people: `boat, step 1000` for `boat_000001000`."""
    path = items[0]["path"]
    name = PurePosixPath(urlsplit(path).path if is_url(path) else path).name
    name = _OF_A_SIDE.sub("", name).removesuffix(_SUFFIX)
    return re.sub(r"_(\d{9})$", lambda step: f", step {int(step[1])}", name)


def _scale_of(items: Sequence[Item]) -> str:
    """What was written after the @ of the files."""
    scales = dict.fromkeys(f"{item['network_multiplier']:g}" for item in items if "network_multiplier" in item)
    return f"@{'/'.join(scales)}" if scales else ""


# From a training's folder.


def _of_training(options: argparse.Namespace, is_local: bool) -> tuple[list[_Base], list[TriedLora], list[str]]:
    # These modules need PyYAML.
    from client.from_training import bad_input_as_invalid, checked_samples, found, requests_for
    from client.training.folder import read_folder

    for option, value in (("REQUEST.json", options.file), ("--lora", options.lora)):
        if value:
            _reject(option, "cannot be used with --training, which says which LoRAs and samples there are")
    if options.model and options.model not in MODELS:
        _reject("--model", f"is not a model id; there are {', '.join(MODELS)}")
    with bad_input_as_invalid():
        folder = read_folder(options.training)
        steps = dict.fromkeys(options.step or (checkpoint.step for checkpoint in folder.checkpoints))
        loras: list[TriedLora] = []
        warnings: dict[str, None] = {}
        requests: list[dict[str, Any]] = []
        for checkpoint in map(folder.checkpoint, steps):
            requests, _, warned = requests_for(folder, checkpoint, options.model, options.lora_folder)
            warnings |= dict.fromkeys(warned)
            items = [{name: item[name] for name in item if name != "network_multiplier"} for item in requests[0]["loras"]]
            loras.append(TriedLora(checkpoint.title, tuple(items)))
        bases = []
        for number in checked_samples(dict.fromkeys(options.sample or (0,)), requests):
            request = changed_request(requests[number], _without_axes(options))
            if folder.training.trigger_word and options.prompt:
                request.setdefault("trigger_word", folder.training.trigger_word)
            bases += _single(request, is_local, None, request["loras"][0]["network_multiplier"])
    lines = [*found(folder, requests[0]["model"]), *(f"warning: {text}" for text in warnings)]
    if not options.sample and len(requests) > 1:
        lines.append(f"sample 0 of {len(requests)} is made; --sample names others")
    return bases, loras, lines


def _reject(field: str, text: str) -> NoReturn:
    raise InvalidRequest([Problem(Code.INVALID_INPUT, field, text)])
