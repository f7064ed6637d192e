"""Finds out how the training of a job's LoRAs ran: from the request, or from the trainer's config.yaml beside a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from pipelines.trained import NOT_SAID, QTYPES, TrainedWith, trained_with
from worker.files import below
from worker.request import Request, is_url
from worker.settings import Settings

_MAX_BYTES = 1_000_000
"""A config has a few kB."""


@dataclass(frozen=True)
class KnownTraining:
    """What is known about the training, and from where."""

    trained: TrainedWith = NOT_SAID
    why: str | None = None
    warning: str | None = None


NOT_KNOWN = KnownTraining()


def training_of(request: Request, settings: Settings) -> KnownTraining:
    """Return what the request says or, without that, a config.yaml. A file that cannot be read gives a warning."""
    if request.trained_with is not None:
        return KnownTraining(request.trained_with.as_trained_with(), "the request says so")
    for lora in request.loras:
        if is_url(lora.path):
            continue
        root = settings.lora_dir
        file = below(root, lora.path)
        if file and (config := below(root, str(file.with_name("config.yaml")))):
            return read_config(config, file)
    return NOT_KNOWN


def read_config(config: Path, lora: Path) -> KnownTraining:
    """Return what a config.yaml says about the training that made this LoRA; nothing, if the config is of another job."""
    try:
        process = _process_of(config, lora)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return KnownTraining(warning="the config.yaml beside the LoRA is not a readable training config; it is ignored")
    if process is None:
        return NOT_KNOWN
    trained = trained_with(process)
    if trained.qtype and trained.format not in QTYPES:
        known = f"which this worker cannot rebuild; it knows {', '.join(QTYPES)}"
        return KnownTraining(warning=f"the config.yaml beside the LoRA has the qtype {trained.format}, {known}")
    return KnownTraining(trained, "the config.yaml beside the LoRA says so")


def _process_of(config: Path, lora: Path) -> dict[str, Any] | None:
    """Return the process of the job that made this LoRA; None if the config is of another job. Raises ValueError."""
    with config.open("rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError
    document = yaml.safe_load(text.decode("utf-8-sig"))
    section = document.get("config") if isinstance(document, dict) else None
    process = section.get("process") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(process, list) or not process or not isinstance(process[0], dict):
        raise ValueError
    name = section.get("name")
    return process[0] if isinstance(name, str) and lora.name.startswith(name) else None
