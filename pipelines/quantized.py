"""Weights as a quantized training has them: decode(encode(w)), in place, and back to the bit.

The formats are those of the trainer (optimum-quanto's qfloat8, torchao's uintN and float8), rebuilt in plain torch. A worker
needs neither library: the samples depend on the values alone, and on one thing more: quanto adds the bias of a layer in an
operation of its own, which rounds once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from pipelines.pristine import CheckpointFile

GROUP = 64
"""Inputs that share a scale in the uintN formats."""
_FLOAT8_MAX = 448.0
"""The largest number of float8_e4m3fn."""


@dataclass(frozen=True)
class Format:
    """How a weight is rounded. `decoded` returns the rounded weight in the weight's dtype, or the weight itself."""

    decoded: Callable[[torch.Tensor], torch.Tensor]
    adds_bias_apart: bool = False


def _scale_of(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale of each row, [rows, 1], which brings its largest number to `largest`; 1 for a row of zeros."""
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _qfloat8(weight: torch.Tensor) -> torch.Tensor:
    scale = _scale_of(weight, _FLOAT8_MAX)
    codes = (weight / scale).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)
    return scale * codes.to(weight.dtype)


def _float8(weight: torch.Tensor) -> torch.Tensor:
    scale = _scale_of(weight, _FLOAT8_MAX)
    codes = (weight * (1 / scale)).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)
    return codes.to(weight.dtype) * scale


def _int8(weight: torch.Tensor) -> torch.Tensor:
    scale = _scale_of(weight, 127.5)
    codes = (weight / scale).round().clamp(-128, 127)
    return codes * scale


def _uint(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def decoded(weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[1] % GROUP:
            return weight
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        top = 2**bits - 1
        scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).eps)
        zero = (-(low / scale).round()).clamp(0, top)
        codes = ((groups * (1 / scale)).round() + zero).clamp(0, top)
        rounded: torch.Tensor = (codes - zero) * scale
        return rounded.reshape(weight.shape)

    return decoded


FORMATS: dict[str, Format] = {
    "qfloat8": Format(_qfloat8, adds_bias_apart=True),
    "float8": Format(_float8),
    "int8": Format(_int8),
    **{f"uint{bits}": Format(_uint(bits)) for bits in range(2, 8)},
    "uint8": Format(lambda weight: weight),
}
"""uint8 changes nothing in the trainer: its own check for that format skips every layer."""


class Quantized:
    """The quantized weights of one component; its parameters are rounded in place."""

    def __init__(self, component: torch.nn.Module, file: CheckpointFile) -> None:
        self._component = component
        self._file = file
        self._changed: set[str] = set()
        """Parameters whose values are not, or may not be, what the file says."""
        self._hooks: list[RemovableHandle] = []
        self._biases: dict[str, torch.nn.Parameter] = {}
        self._active: tuple[object, ...] = ()

    @property
    def active(self) -> tuple[object, ...]:
        """Tells one state from another; () for the weights of the file."""
        return self._active

    @torch.no_grad()
    def apply(self, format: str | None, excluded: tuple[str, ...] = (), only: frozenset[str] | None = None) -> bool:
        """Round the weights of all linear layers to `format`, or restore them with None. Whether there was anything to do.

        `excluded`: starts of the names of layers that are left out; `only`: the layers to round, None for all. After an
        exception weights may be half rounded: call it with None then.
        """
        wanted = (format, excluded, only) if format else ()
        if wanted == self._active:
            return False
        self._restore()
        if format:
            self._round(FORMATS[format], excluded, only)
        self._active = wanted
        return True

    def _round(self, format: Format, excluded: tuple[str, ...], only: frozenset[str] | None) -> None:
        for name, layer in self._layers():
            if name.startswith(excluded) or (only is not None and name not in only):
                continue
            self._changed.add(f"{name}.weight")
            layer.weight.copy_(format.decoded(layer.weight))
            if format.adds_bias_apart and layer.bias is not None:
                self._biases[name] = bias = layer.bias
                layer.register_parameter("bias", None)
                self._hooks.append(layer.register_forward_hook(_adding(bias)))

    def _restore(self) -> None:
        self._active = (object(),)  # neither plain nor rounded, until all is done
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, bias in self._biases.items():
            self._component.get_submodule(name).bias = bias
        self._biases.clear()
        self._file.restore(self._component, self._changed)
        self._active = ()

    def _layers(self) -> Iterator[tuple[str, torch.nn.Linear]]:
        for name, module in self._component.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield name, module


def _adding(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + bias.to(output.device)

    return hook
