"""Measures what the values of a LoRA change: how strongly, in which layers, and compared with the model's own weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipelines.errors import LoraError
from pipelines.lora.arithmetic import Tensors, change_bias, change_weight, load_tensors
from pipelines.lora.file import LoraFile
from pipelines.lora.layers import BIAS_PARTS, Layer, read
from pipelines.lora.values import zero_keys
from pipelines.pristine import CheckpointFile
from tools.cli import BadInput

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Change:
    """The change of one layer at network_multiplier 1. Norms are Frobenius norms."""

    layer: str
    norm: float | None
    """The norm of the change; None for a DoRA without the checkpoint, since its change depends on the weight."""
    strength: float | None
    """The same divided by the norm of the model's weight or bias; None without the checkpoint."""

    @property
    def is_dead(self) -> bool:
        return self.norm == 0


def changes_of(file: LoraFile, checkpoint: Path | None = None) -> list[Change]:
    """Return the change of every layer, in the file's order.

    `checkpoint`: the model's folder, or that of one transformer. Raises BadInput for values that are not finite, and for a
    checkpoint that lacks a layer.
    """
    try:
        zero_keys(file)
    except LoraError as error:
        raise BadInput(f"{file.path}: {error}") from error
    tensors = load_tensors(file)
    found = []
    for side, layers in read(file).sides.items():
        weights = _weights_of(checkpoint, side) if checkpoint else None
        for name, layer in layers.items():
            shown = f"{side} {name}" if side else name
            found.append(_change_of(shown, layer, tensors, weights))
    return found


def _change_of(shown: str, layer: Layer, tensors: Tensors, weights: CheckpointFile | None) -> Change:
    parts = [("weight", change_weight)] * layer.changes_weight + [("bias", change_bias)] * layer.changes_bias
    squares, of_model = 0.0, 0.0
    for part, change in parts:
        if weights:
            base = _base(weights, layer.name, part).float()
        elif "magnitude" in layer.keys:
            return Change(shown, None, None)
        else:
            base = torch.zeros(_shape_of(layer, part))
        squares += float((change(layer, tensors, base, 1.0, _CPU) - base).square().sum())
        of_model += float(base.square().sum())
    norm = squares**0.5
    return Change(shown, norm, norm / of_model**0.5 if weights and of_model else None)


def _shape_of(layer: Layer, part: str) -> tuple[int, ...]:
    if part == "bias":
        return next(layer.shapes[name] for name in BIAS_PARTS if name in layer.shapes)
    return layer.shapes[layer.difference] if layer.kind == "full" else (layer.outputs, layer.inputs)


def _weights_of(checkpoint: Path, side: str | None) -> CheckpointFile:
    name = "transformer_2" if side == "low" else "transformer"
    folder = checkpoint / name if (checkpoint / name).is_dir() else checkpoint
    return CheckpointFile(folder, "transformer")


def _base(weights: CheckpointFile, layer: str, part: str) -> torch.Tensor:
    for key in (f"{layer}.{part}", layer):  # a table, such as scale_shift_table, is a parameter by its own name
        try:
            return weights.read(key)
        except (KeyError, SafetensorError):
            continue
        except OSError as error:
            raise BadInput("the checkpoint has no transformer weights; give the folder that has `transformer` in it") from error
    raise BadInput(f"the checkpoint has no layer {layer}; give that of the model that the LoRA was trained on")
