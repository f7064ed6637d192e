"""A training's folder that was dropped on the page: its config and the names of its files → requests for the form.

The page reads the folder. Here come the text of the config, the names, and the control images that the config names; the LoRA
files and the samples stay in the browser.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from client.errors import BadInput
from client.training.folder import Checkpoint, checkpoints_of, samples_of
from client.training.requests import how_trained, model_named_by, requests_of
from client.training.samples import TrainingConfig, read_training
from pipelines.catalog import MODELS


def read_dropped(body: Any, served: str | None, loras: Path | None) -> dict[str, Any]:
    """What the form needs: the model, how the training ran, the LoRAs by step, and a request for each sample.

    `body`: `config` (its `name` and `text`), `names` (paths in the folder) and `images` (base64 by file name). `served`: the
    worker's model, for a config that does not say which. `loras`: the worker's LORA_DIR, if it is known. Raises BadInput.
    """
    name, text, names, images = _parts(body)
    with TemporaryDirectory(prefix="training-") as temporary:
        folder = Path(temporary)
        config = folder / ("config.json" if name.endswith((".json", ".jsonc")) else "config.yaml")
        config.write_text(text, encoding="utf-8")
        for image, data in images.items():
            (folder / PurePosixPath(image).name).write_bytes(data)
        try:
            training = read_training(config)
            return _found(training, names, folder, served, loras)
        except BadInput as error:
            raise BadInput(str(error).replace(str(config), name)) from None


def _parts(body: Any) -> tuple[str, str, list[str], dict[str, bytes]]:
    try:
        name, text, names = body["config"]["name"], body["config"]["text"], body["names"]
        images = {str(name): base64.b64decode(data) for name, data in body.get("images", {}).items()}
        if not (isinstance(name, str) and isinstance(text, str) and all(isinstance(one, str) for one in names)):
            raise TypeError
    except (KeyError, TypeError, AttributeError, binascii.Error):
        raise BadInput("a dropped folder is `config`, `names` and `images`") from None
    return name, text, list(names), images


def _found(training: TrainingConfig, names: list[str], folder: Path, served: str | None, loras: Path | None) -> dict[str, Any]:
    model = model_named_by(training.model) or served
    if model is None:
        raise BadInput("its config does not say which model it is, and neither does the worker")
    spec, checkpoints = MODELS[model], checkpoints_of(names, training)
    by_step = [requests_of(training, spec, _paths(training, one, loras), folder) for one in checkpoints]
    requests, warnings = by_step[-1]
    return {
        "name": training.name,
        "model": spec.id,
        "trigger_word": training.trigger_word,
        "how_trained": how_trained(training.trained_with),
        "warnings": warnings,
        "checkpoints": [
            {"step": one.step, "title": one.title, "is_final": one.is_final, "loras": made[0]["input"]["loras"]}
            for one, (made, _) in zip(checkpoints, by_step, strict=True)
        ],
        "requests": [request["input"] for request in requests],
        "samples": [{"step": step, "number": number, "name": name} for (step, number), name in samples_of(names).items()],
    }


def _paths(training: TrainingConfig, checkpoint: Checkpoint, loras: Path | None) -> list[str]:
    """The files' paths below LORA_DIR: where they lie there, or else where the trainer's folder would lie."""
    return [_below(loras, name) or f"{training.name}/{name}" for name in checkpoint.files]


def _below(loras: Path | None, name: str) -> str | None:
    found: Iterable[Path] = loras.rglob(name) if loras else ()
    return next((path.relative_to(loras).as_posix() for path in found if loras), None)
