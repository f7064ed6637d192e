"""What a LoRA file's layers compute, from its tensors: changes of weights and biases, and the factors of an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipelines.errors import LoraInvalid
from pipelines.lora.file import REPLACED, LoraFile, identity_of
from pipelines.lora.layers import Layer
from pipelines.reading import DTYPES, read_into

Tensors = Mapping[str, torch.Tensor]


def load_tensors(file: LoraFile) -> Tensors:
    """All tensors of the file, by their key, in the file's dtypes. Raises LoraInvalid, OSError.

    The file is read and not mapped: a mapped file that its trainer saves anew kills the process.
    """
    header = file.header
    tensors = {
        key: torch.empty(shape, dtype=DTYPES[dtype])
        for key, shape in header.shapes.items()
        if (dtype := header.dtypes[key]) in DTYPES
    }
    try:
        read_into((file.path, header.bytes + header.places[key][0], tensor) for key, tensor in tensors.items())
    finally:  # a file that is cut short ends too soon
        if identity_of(file.path.stat()) != file.identity:
            raise LoraInvalid(REPLACED)
    return tensors


def part(layer: Layer, name: str, tensors: Tensors) -> torch.Tensor:
    """A part of the layer. An fp8 tensor comes as float32, times its scale: one number, or one for each row."""
    tensor = tensors[layer.keys[name]]
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
        if scale := layer.keys.get(f"{name}.scale"):
            tensor = tensor * tensors[scale].float().view(-1, *[1] * (tensor.ndim - 1))
    return tensor


def alpha_scale(layer: Layer, tensors: Tensors) -> float:
    """alpha / rank, from a tensor or from the header; 1 without either."""
    if not layer.uses_alpha:
        return layer.header_scale
    assert layer.rank is not None
    return float(tensors[layer.keys["alpha"]]) / layer.rank


def factors(layer: Layer, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A, lora_B) of a plain layer, with the alpha that is a tensor multiplied in, as diffusers does it.

    diffusers splits the scale into two factors that are powers of two apart from one, so that neither becomes small.
    """
    down, up = part(layer, "A", tensors), part(layer, "B", tensors)
    if not layer.uses_alpha:
        return down, up
    scale_down, scale_up = alpha_scale(layer, tensors), 1.0
    while 0 < scale_down * 2 < scale_up:
        scale_down, scale_up = scale_down * 2, scale_up / 2
    return down * scale_down, up * scale_up


def change_weight(layer: Layer, tensors: Tensors, pristine: torch.Tensor, scale: float, device: torch.device) -> torch.Tensor:
    """The layer's weight with the LoRA at `scale`, float32 on `device`; `pristine` is the weight of the model.

    The trainer's arithmetic: factors in float32, times alpha / rank and the scale, added to the float32 value of the weight.
    """
    delta = _delta(layer, tensors, device).mul_(scale)
    merged = delta.view(pristine.shape).add_(pristine.to(device))
    if "magnitude" not in layer.keys:
        return merged
    # DoRA: the rows keep the learned lengths. Source: DoRA (arXiv 2402.09353), section 4.
    magnitude = part(layer, "magnitude", tensors).to(device, torch.float32).flatten()
    merged *= (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    return merged


def add_difference(layer: Layer, tensors: Tensors, pristine: torch.Tensor, scale: float, device: torch.device) -> torch.Tensor:
    """The weight with a difference at `scale`, on `device`, as the trainer has it where it does not merge."""
    return _add_rounded(part(layer, layer.difference, tensors), pristine, scale, device)


def add_difference_of_bias(
    layer: Layer, tensors: Tensors, pristine: torch.Tensor, scale: float, device: torch.device
) -> torch.Tensor:
    """The same for the bias."""
    return _add_rounded(part(layer, "diff_b", tensors), pristine, scale, device)


def _add_rounded(difference: torch.Tensor, pristine: torch.Tensor, scale: float, device: torch.device) -> torch.Tensor:
    """The sum in the dtype of `pristine`, to which the difference is rounded before it is added."""
    delta = difference.to(device, torch.float32) * scale
    return pristine.to(device) + delta.to(pristine.dtype).view(pristine.shape)


def change_bias(layer: Layer, tensors: Tensors, pristine: torch.Tensor, scale: float, device: torch.device) -> torch.Tensor:
    """The layer's bias with the LoRA at `scale`, float32 on `device`."""
    bias = pristine.to(device, torch.float32)
    if "diff_b" in layer.keys:
        bias = bias + scale * part(layer, "diff_b", tensors).to(device, torch.float32)
    if "B.bias" in layer.keys:
        bias = bias + scale * alpha_scale(layer, tensors) * part(layer, "B.bias", tensors).to(device, torch.float32)
    return bias


def _delta(layer: Layer, tensors: Tensors, device: torch.device) -> torch.Tensor:
    """What the layer adds to the weight at scale 1, as a matrix or in the weight's own shape: float32 on `device`."""
    parts = {name: part(layer, name, tensors).to(device, torch.float32) for name in layer.keys if not name.endswith(".scale")}
    if layer.kind == "full":
        return parts[layer.difference].clone()
    if layer.kind == "lokr":
        return torch.kron(lokr_factor(parts, "w1"), lokr_factor(parts, "w2")) * alpha_scale(layer, tensors)
    product = parts["B"].flatten(1) @ parts["A"].flatten(1)
    scale = alpha_scale(layer, tensors)
    return product if scale == 1 else product * scale


def lokr_factor(parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The factor w1 or w2 of a LoKr as a whole."""
    whole = parts.get(f"lokr_{name}")
    return whole if whole is not None else parts[f"lokr_{name}_a"] @ parts[f"lokr_{name}_b"]
