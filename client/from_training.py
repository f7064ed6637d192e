"""`from-training`: a training's folder → the videos of its own samples, from the LoRA of one step.

Each sample is a job of its own, as each can have another scale, and a long one must not take the others past their time limit.
Only requests leave this computer: the LoRA files must already lie where the worker finds them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.errors import BadInput, InvalidRequest
from client.training.folder import Checkpoint, TrainingFolder, read_folder, steps_in_words
from client.training.requests import how_trained, model_of, requests_of
from pipelines.catalog import MODELS
from worker.errors import Code, Problem


@dataclass(frozen=True)
class Planned:
    """A job to send, and the trainer's own video to compare it with."""

    request: dict[str, Any]
    sample: Path | None


def plan(options: argparse.Namespace) -> tuple[list[str], list[Planned]]:
    """(what was found, in lines; the jobs to send). Raises InvalidRequest."""
    with bad_input_as_invalid():
        folder = read_folder(options.folder)
        return _plan(folder, options)


@contextmanager
def bad_input_as_invalid() -> Iterator[None]:
    """Raise BadInput and OSError of the block as InvalidRequest."""
    try:
        yield
    except BadInput as error:
        raise InvalidRequest([Problem(Code.INVALID_INPUT, "", str(error))]) from None
    except OSError as error:
        raise InvalidRequest([Problem(Code.INVALID_INPUT, "", f"{error.filename}: {error.strerror}")]) from None


def requests_for(
    folder: TrainingFolder, checkpoint: Checkpoint, model: str | None, lora_folder: str | None, output_format: str | None = None
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """(the request of each sample, the LoRA's paths, warnings). Raises BadInput, OSError.

    `model`: None for the one of the config. `lora_folder`: where the worker finds the files; None for the training's name.
    """
    training = folder.training
    spec = MODELS[model or model_of(training.model)]
    where = (training.name if lora_folder is None else lora_folder.rstrip("/")) or ""
    paths = [f"{where}/{name}" if where else name for name in checkpoint.files]
    requests, warnings = requests_of(training, spec, paths, folder.path, output_format)
    return [request["input"] for request in requests], paths, warnings


def checked_samples(numbers: Iterable[int], requests: Sequence[object]) -> Iterable[int]:
    """The numbers, if the config has all of these samples. Raises BadInput."""
    if missing := [number for number in numbers if not 0 <= number < len(requests)]:
        raise BadInput(f"there is no sample {missing[0]}; the config has the samples 0 to {len(requests) - 1}")
    return numbers


def _plan(folder: TrainingFolder, options: argparse.Namespace) -> tuple[list[str], list[Planned]]:
    training, checkpoint = folder.training, folder.checkpoint(options.step)
    requests, paths, warnings = requests_for(folder, checkpoint, options.model, options.lora_folder, options.output_format)
    planned = []
    for number in checked_samples(options.sample or ([0] if options.prompt else range(len(requests))), requests):
        request, sample = requests[number], folder.samples.get((checkpoint.step or -1, number))
        if options.prompt:
            text = options.prompt.replace("[trigger]", training.trigger_word or "[trigger]")
            request["prompts"][0] |= {"prompt": text}
        planned.append(Planned(request, folder.path / sample if sample and not options.prompt else None))
    step = "the last one" if checkpoint.step is None else checkpoint.step
    others = "" if len(folder.checkpoints) == 1 else f"; the folder has {steps_in_words(folder.checkpoints)}"
    lines = [*found(folder, requests[0]["model"]), f"step: {step}{others}"]
    lines += [f"LoRA: the worker must find {path}" for path in paths]
    return lines + [f"warning: {text}" for text in warnings], planned


def found(folder: TrainingFolder, model: str) -> Iterator[str]:
    """Lines that say what the folder has. `model`: its id."""
    training = folder.training
    trigger = f", trigger word {training.trigger_word}" if training.trigger_word else ""
    yield f"{training.name}: {MODELS[model].title}{trigger}, trained {how_trained(training.trained_with)}"
    count = len(training.samples)
    yield f"samples: {count} prompt{'s' * (count != 1)} in the config, {len(folder.samples)} videos in the folder"
