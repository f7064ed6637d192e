"""Weights as a quantized training has them: decode(encode(w)), in place for a job and back to the bit, or as codes in memory.

The formats are those of the trainer (optimum-quanto's qfloat8, torchao's uintN and float8), rebuilt in plain torch. A worker
needs neither library: the samples depend on the values and on how a layer computes with them. quanto adds the bias in an
operation of its own, which rounds once more; torchao's int8 multiplies by the codes and scales the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.hooks import RemovableHandle

from pipelines.pristine import CheckpointFile
from pipelines.trained import GROUP
from pipelines.weights import Stored

_FLOAT8_MAX = 448.0
"""The largest number of float8_e4m3fn."""
_SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""In torchao's formats."""


Codes = tuple[torch.Tensor, ...]
"""The codes of a weight, and the scales that decode them, in the weight's dtype."""


@dataclass(frozen=True)
class Format:
    """How a weight [outputs, inputs] is kept."""

    encode: Callable[[torch.Tensor], Codes | None]
    """None for a weight that the format leaves as it is."""
    decode: Callable[..., torch.Tensor]
    """The rounded weight from its codes, in the dtype of the scales."""
    adds_bias_apart: bool = False
    scales_products: bool = False
    """A layer multiplies by the codes, and the product by the scales; only in formats that add the bias apart."""

    def factor(self, codes: Codes) -> torch.Tensor:
        """What a layer multiplies by, in the dtype of the scales."""
        return codes[0].to(codes[1].dtype) if self.scales_products else self.decode(*codes)

    def finish(self, product: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output of a layer from what it multiplied, in a format that adds the bias apart."""
        if self.scales_products:
            product = product * scale.flatten()
        return product if bias is None else product + bias


def _scale_of(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale of each row, [rows, 1], which brings its largest number to `largest`."""
    return weight.abs().amax(dim=1, keepdim=True) / largest


def _as_float8(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to float8, as its bytes: a tensor of float8 would be cast with the rest of a model."""
    return weight.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _qfloat8(weight: torch.Tensor) -> Codes:
    scale = _scale_of(weight, _FLOAT8_MAX)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return _as_float8(weight / scale), scale


def _float8(weight: torch.Tensor) -> Codes:
    scale = _scale_of(weight, _FLOAT8_MAX).clamp(min=_SMALLEST_SCALE)
    return _as_float8(weight * (1 / scale)), scale


def _from_float8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e4m3fn).to(scale.dtype) * scale


def _int8(weight: torch.Tensor) -> Codes:
    scale = _scale_of(weight, 127.5).clamp(min=_SMALLEST_SCALE)
    return (weight * (1 / scale)).round().clamp(-128, 127).to(torch.int8), scale


def _from_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.to(scale.dtype) * scale


def _uint(bits: int) -> Format:
    top = 2**bits - 1

    def encode(weight: torch.Tensor) -> Codes | None:
        if weight.shape[1] % GROUP:
            return None
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        scale = ((high - low) / top).clamp(min=_SMALLEST_SCALE)
        zero = (-(low / scale).round()).clamp(0, top)
        codes = ((groups * (1 / scale)).round() + zero).clamp(0, top)
        return _packed(codes.to(torch.uint8), bits), scale, zero

    def decode(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        codes = _unpacked(packed, bits).to(scale.dtype)
        weight: torch.Tensor = (codes - zero) * scale
        return weight.flatten(1)

    return Format(encode, decode)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, groups, 64] of `bits` bits → [rows, groups, bits, 8]: of eight codes, a byte for each of their bits."""
    eights = codes.reshape(*codes.shape[:2], 8, 8)
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)
    planes = [(((eights >> bit) & 1) << places).sum(3, dtype=torch.uint8) for bit in range(bits)]
    return torch.stack(planes, 2)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    codes = torch.zeros((*packed.shape[:2], 8, 8), dtype=torch.uint8, device=packed.device)
    for bit in range(bits):
        codes |= ((packed[:, :, bit, :, None] >> places) & 1) << bit
    return codes.flatten(2)


FORMATS: dict[str, Format] = {
    "qfloat8": Format(_qfloat8, _from_float8, adds_bias_apart=True),
    "float8": Format(_float8, _from_float8),
    "int8": Format(_int8, _from_int8, adds_bias_apart=True, scales_products=True),
    **{f"uint{bits}": _uint(bits) for bits in range(2, 8)},
    "uint8": Format(lambda _: None, lambda: torch.empty(0)),
}
"""uint8 changes nothing in the trainer: its own check for that format skips every layer."""


class CodedLinear(torch.nn.Linear):
    """A linear layer whose weight is in memory as codes, and is decoded whenever it is asked for."""

    def __init__(self, layer: torch.nn.Linear, format: Format, codes: Codes) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._format = format
        self._names = [f"code_{number}" for number in range(len(codes))]
        for name, part in zip(self._names, codes, strict=True):
            self.register_buffer(name, part)
        self.register_parameter("bias", layer.bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self._format.decode(*self._codes)

    @property
    def _codes(self) -> Codes:
        return tuple(getattr(self, name) for name in self._names)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._format.adds_bias_apart:
            return torch.nn.functional.linear(inputs, self.weight, self.bias)
        codes = self._codes
        return self._format.finish(torch.nn.functional.linear(inputs, self._format.factor(codes)), codes[1], self.bias)


@torch.no_grad()
def encode_layers(
    component: torch.nn.Module, format_of: Callable[[str], str | None], device: torch.device, dtype: torch.dtype
) -> None:
    """Replace the linear layers of a component by coded ones, one after the other, so that few weights are there twice.

    `format_of`: the format of a layer, by its name. `device` computes the codes, `dtype` is the model's.
    """
    for name, layer in list(component.named_modules()):
        if isinstance(layer, torch.nn.Linear) and (format := format_of(name)):
            codes = FORMATS[format].encode(layer.weight.to(device, dtype))
            if codes is not None:
                home = layer.weight.device
                coded = CodedLinear(layer, FORMATS[format], tuple(part.to(home) for part in codes))
                parent, _, own = name.rpartition(".")
                setattr(component.get_submodule(parent), own, coded)


@torch.no_grad()
def fill_with_codes(component: torch.nn.Module, files: Iterable[Path], stored: Stored, dtype: torch.dtype) -> None:
    """Give a component without contents (on the device `meta`) its weights, from files with codes. Its buffers stay.

    Other numbers than codes get `dtype`, the model's. Codes that need no cast stay mapped. Raises ValueError where the files
    lack a weight, or have one too many.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    for name in [key.removesuffix(".code_0") for key in tensors if key.endswith(".code_0")]:
        count = sum(f"{name}.code_{number}" in tensors for number in range(3))
        codes = tuple(tensors.pop(f"{name}.code_{number}") for number in range(count))
        parent, _, own = name.rpartition(".")
        layer = component.get_submodule(name)
        if not isinstance(layer, torch.nn.Linear):
            raise ValueError(f"the files do not fit the model's config: {name} is no linear layer")
        coded = CodedLinear(layer, FORMATS[stored.format], codes)
        setattr(component.get_submodule(parent), own, coded)
    _, unexpected = component.load_state_dict(tensors, strict=False, assign=True)
    if callable(tie_weights := getattr(component, "tie_weights", None)):
        tie_weights()
    missing = [name for name, value in component.named_parameters() if value.is_meta]
    if unexpected or missing:
        raise ValueError(f"the files do not fit the model's config: {', '.join([*unexpected, *missing][:3])}")


class Quantized:
    """The quantized weights of one component; its parameters are rounded in place."""

    def __init__(self, component: torch.nn.Module, file: CheckpointFile, device: torch.device) -> None:
        """`device` computes the codes, wherever the weights wait."""
        self._component = component
        self._file = file
        self._device = device
        self._changed: set[str] = set()
        """Parameters whose values are not, or may not be, what the file says."""
        self._hooks: list[RemovableHandle] = []
        self._biases: dict[str, torch.nn.Parameter] = {}
        self._active: tuple[object, ...] = ()

    @property
    def active(self) -> tuple[object, ...]:
        """Tells one state from another; () for the weights of the file."""
        return self._active

    @property
    def layers(self) -> set[str]:
        """The layers whose weights are rounded."""
        return {name.removesuffix(".weight") for name in self._changed}

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
            codes = format.encode(layer.weight.to(self._device))
            if codes is None:
                continue
            self._changed.add(f"{name}.weight")
            layer.weight.copy_(format.factor(codes))
            if format.adds_bias_apart:
                bias = layer.bias
                self._hooks.append(layer.register_forward_hook(_finishing(format, codes[1], bias)))
                if bias is not None:
                    self._biases[name] = bias
                    layer.register_parameter("bias", None)

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


def _finishing(format: Format, scale: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return format.finish(output, scale.to(output.device), bias if bias is None else bias.to(output.device))

    return hook
