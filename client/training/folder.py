"""What lies in a training's folder, by the names that ai-toolkit gives: its config, the LoRA of each saved step, the samples.

Source of the names: ai-toolkit 0.12.26, `BaseSDTrainProcess.save` and `GenerateImageConfig.get_image_path`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from client.errors import BadInput
from client.training.samples import TrainingConfig, read_training

CONFIGS = ("config.yaml", "config.yml", ".job_config.json", "config.json")
"""The names of a config, the trainer's own first."""


@dataclass(frozen=True)
class Checkpoint:
    """The LoRA of one step. Wan 2.2 14B has a file for each side that was trained."""

    step: int | None
    """None: the step of the last save, where the config does not say it."""
    is_final: bool
    """Whether it was saved at the end, and so has no step in its name."""
    files: tuple[str, ...]
    """Names in the folder; the high side first."""

    @property
    def title(self) -> str:
        return "the last step" if self.step is None else f"step {self.step}"


@dataclass(frozen=True)
class TrainingFolder:
    """A folder as the trainer left it."""

    path: Path
    training: TrainingConfig
    checkpoints: tuple[Checkpoint, ...]
    """By step, the newest last. At least one."""
    samples: dict[tuple[int, int], str]
    """(step, number of the sample) → its file, relative to the folder."""

    def checkpoint(self, step: int | None) -> Checkpoint:
        """That of a step, or the newest. Raises BadInput."""
        return chosen(self.checkpoints, step)


def read_folder(path: Path) -> TrainingFolder:
    """Raises BadInput, OSError."""
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; give the training's output folder, with its config.yaml and LoRA files")
    config = next((path / name for name in CONFIGS if (path / name).is_file()), None)
    if config is None:
        raise BadInput(f"{path} has no config.yaml; give the folder that ai-toolkit wrote, usually output/NAME")
    training = read_training(config)
    names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    return TrainingFolder(path, training, checkpoints_of(names, training), samples_of(names))


def checkpoints_of(names: Iterable[str], training: TrainingConfig) -> tuple[Checkpoint, ...]:
    """The LoRAs among the files of a folder, by step. Raises BadInput if there is none."""
    found: dict[tuple[bool, int | None], list[str]] = {}
    for name in names:
        if "/" not in name and (match := re.fullmatch(rf"{re.escape(training.name or '')}{_AFTER_THE_NAME}", name)):
            step = int(match["step"]) if match["step"] else training.steps
            found.setdefault((not match["step"], step), []).append(name)
    if not found:
        wanted = f"{training.name or 'NAME'}.safetensors or {training.name or 'NAME'}_000001000.safetensors"
        raise BadInput(f"the folder has no LoRA that belongs to its config, such as {wanted}; put the files beside config.yaml")
    in_order = sorted(found, key=lambda key: (key[0], key[1] or 0))
    return tuple(Checkpoint(step, final, tuple(sorted(found[final, step]))) for final, step in in_order)


_AFTER_THE_NAME = r"(?:_(?P<step>\d{9}))?(?:_(?:high|low)_noise)?\.safetensors"


def chosen(checkpoints: Sequence[Checkpoint], step: int | None) -> Checkpoint:
    """The newest of a step, or of all. Raises BadInput."""
    fitting = [checkpoint for checkpoint in checkpoints if step in (None, checkpoint.step)]
    if not fitting:
        raise BadInput(f"there is no LoRA of step {step}; there are {steps_in_words(checkpoints)}")
    return fitting[-1]


def steps_in_words(checkpoints: Sequence[Checkpoint]) -> str:
    return ", ".join(
        f"{'the last one' if one.step is None else one.step}{' (the end)' if one.is_final and one.step else ''}"
        for one in checkpoints
    )


def samples_of(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """The samples among the files of a folder. Of several of one step and number, the last counts, as it was made last."""
    found = {}
    for name in sorted(names):
        if match := re.fullmatch(r"\d+__(\d{9})_(\d+)\.(?:webp|mp4|gif|png|jpe?g)", PurePosixPath(name).name):
            found[int(match[1]), int(match[2])] = name
    return found
