"""Offloading: which components wait in main memory, and how they come to the device. No mode changes a bit of the frames.

The modes are the table OFFLOAD of the catalog.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from safetensors import safe_open

from pipelines import diffusers_privates as privates
from pipelines.catalog import BYTES_OF_A_JOB, OFFLOAD, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.errors import DeviceUnavailable
from pipelines.trained import Quantization, bytes_of_codes
from pipelines.weights import STEM_OF, file_names


def mode_for(asked: OffloadMode, spec: ModelSpec, needed: Mapping[OffloadMode, int], free: int) -> OffloadMode:
    """The mode in which the weights fit into `free` bytes of the device; `needed` is what they take in each.

    `auto`: the quickest of the modes that stream which leaves room for a job of the default size, else `group`.
    For a mode that is asked for, only what is certain is checked: the weights themselves. Raises DeviceUnavailable.
    """
    if asked == "auto":
        streaming = (mode for mode, offload in OFFLOAD.items() if offload.streamed is not None)
        asked = next((mode for mode in streaming if needed[mode] + BYTES_OF_A_JOB <= free), "group")
    if needed[asked] <= free:
        return asked
    fitting = next((mode for mode in spec.offload_modes if needed[mode] <= free), None)
    remedy = f"set OFFLOAD_MODE={fitting}, or use a larger GPU" if fitting else "use a larger GPU"
    raise DeviceUnavailable(
        f"the weights of {spec.id} take {needed[asked] / 1e9:.1f} GB with OFFLOAD_MODE={asked}, and the GPU has "
        f"{free / 1e9:.1f} GB free: {remedy}"
    )


def bytes_by_mode(checkpoints: Checkpoints, itemsize: int, quantization: Quantization | None = None) -> dict[OffloadMode, int]:
    """Bytes of weights on the device in each mode, in numbers of `itemsize` bytes, or as codes where they are quantized."""
    return on_device(checkpoints.spec, _bytes_of_parts(checkpoints, itemsize, quantization))


def on_device(spec: ModelSpec, sizes: Mapping[str, int]) -> dict[OffloadMode, int]:
    """Bytes of weights on the device in each mode, from the bytes of each component.

    A streamed transformer has two of its blocks there.
    """

    def without(*streamed: str) -> int:
        there = sum(size for part, size in sizes.items() if part not in streamed)
        transformers = [sizes[part] for part in spec.transformers if part in streamed]
        return there + 2 * max(transformers, default=0) // spec.num_blocks

    streamed = {mode: without(*offload.streamed) for mode, offload in OFFLOAD.items() if offload.streamed is not None}
    return {**streamed, "model": max(sizes.values()), "sequential": 0}


def place(pipe: Any, device: torch.device, mode: OffloadMode) -> None:
    """Set up the offloading of `mode`. Components that it does not move are on the device already."""
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    for part, component in _distinct(pipe, OFFLOAD[mode].streamed or ()).items():
        pieces: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        if part == "text_encoder":
            pieces = {"offload_type": "leaf_level"}
        apply_group_offloading(component, onload_device=device, use_stream=device.type == "cuda", **pieces)


def refresh(pipe: Any, names: tuple[str, ...]) -> None:
    """Tell the offloading that tensors of these components were replaced."""
    for component in _distinct(pipe, names).values():
        privates.refresh_group_offloading(component)


def stays_on_device(component: Any) -> bool:
    """Whether no mode moves the component."""
    return not privates.is_offloaded(component)


def _distinct(pipe: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The components by name, each once: ai-toolkit's pipeline has the one transformer of 5B in both slots."""
    found = {id(component): name for name in reversed(names) if (component := getattr(pipe, name, None)) is not None}
    return {name: getattr(pipe, name) for name in reversed(found.values())}


def _bytes_of_parts(checkpoints: Checkpoints, itemsize: int, quantization: Quantization | None) -> dict[str, int]:
    """Bytes of each component's weights."""
    sizes = {}
    for part in checkpoints.spec.sources:
        if part in STEM_OF:
            folder = checkpoints.folder_of(part)
            shapes = (item for name in file_names(folder, part) for item in _shapes(folder / name))
            sizes[part] = sum(bytes_of_tensor(part, key, shape, itemsize, quantization) for key, shape in shapes)
    return sizes


_EMBEDDINGS = ("shared", "embed_tokens", "relative_attention_bias")
"""Modules of the text encoder whose weights are tables, and no linear layers'."""


def bytes_of_tensor(part: str, key: str, shape: Sequence[int], itemsize: int, quantization: Quantization | None) -> int:
    """Bytes of one tensor of a component, by its name in the file and its shape."""
    format = quantization.format_of(part, key) if quantization else None
    is_linear = len(shape) == 2 and key.endswith(".weight") and not any(name in key for name in _EMBEDDINGS)
    if format and is_linear:
        return bytes_of_codes(format, shape[0], shape[1], itemsize)
    return math.prod(shape) * itemsize


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    with safe_open(file, framework="pt") as tensors:
        return [(key, tensors.get_slice(key).get_shape()) for key in tensors.keys()]  # noqa: SIM118
