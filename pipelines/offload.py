"""Where the components of a model wait while they are not needed: on the device, or in main memory. No mode changes a bit.

`none`          everything on the device
`text_encoder`  the text encoder in main memory, brought layer by layer for a text that is new
`group`         the transformers too, brought block by block while the block before computes
`model`         one component at a time on the device
`sequential`    one layer at a time on the device
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from safetensors import safe_open

from pipelines.catalog import BYTES_OF_A_JOB, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.errors import DeviceUnavailable
from pipelines.weights import STEM_OF, file_names

STREAMED: dict[OffloadMode, tuple[str, ...]] = {
    "none": (),
    "text_encoder": ("text_encoder",),
    "group": ("text_encoder", "transformer", "transformer_2"),
}
"""Components that are brought piece by piece. The other modes move all of them, in accelerate's way."""


def mode_for(asked: OffloadMode, checkpoints: Checkpoints, itemsize: int, free: int) -> OffloadMode:
    """The mode in which the weights, in numbers of `itemsize` bytes, fit into `free` bytes of the device.

    `auto`: the quickest of `none`, `text_encoder` and `group` that leaves room for a job of the default size, else `group`.
    For a mode that is asked for, only what is certain is checked: the weights themselves. Raises DeviceUnavailable.
    """
    spec = checkpoints.spec
    needed = on_device(spec, _bytes_of_parts(checkpoints, itemsize))
    if asked == "auto":
        asked = next((mode for mode in STREAMED if needed[mode] + BYTES_OF_A_JOB <= free), "group")
    if needed[asked] <= free:
        return asked
    fitting = next((mode for mode in spec.offload_modes if needed[mode] <= free), None)
    remedy = f"set OFFLOAD_MODE={fitting}, or use a larger GPU" if fitting else "use a larger GPU"
    raise DeviceUnavailable(
        f"the weights of {spec.id} take {needed[asked] / 1e9:.1f} GB with OFFLOAD_MODE={asked}, and the GPU has "
        f"{free / 1e9:.1f} GB free: {remedy}"
    )


def on_device(spec: ModelSpec, sizes: Mapping[str, int]) -> dict[OffloadMode, int]:
    """The weights on the device in each mode, from the bytes of each component.

    Of what comes piece by piece, two blocks of a transformer.
    """

    def without(*streamed: str) -> int:
        there = sum(size for part, size in sizes.items() if part not in streamed)
        transformers = [sizes[part] for part in spec.transformers if part in streamed]
        return there + 2 * max(transformers, default=0) // spec.num_blocks

    return {mode: without(*parts) for mode, parts in STREAMED.items()} | {"model": max(sizes.values()), "sequential": 0}


def place(pipe: Any, device: torch.device, mode: OffloadMode) -> None:
    """Have the pipeline's components brought to the device when they are needed; what is not streamed is there already."""
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        for part, component in _distinct(pipe, STREAMED[mode]).items():
            pieces: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
            if part == "text_encoder":
                pieces = {"offload_type": "leaf_level"}
            apply_group_offloading(component, onload_device=device, use_stream=device.type == "cuda", **pieces)


def refresh(pipe: Any, names: tuple[str, ...]) -> None:
    """To be called when tensors of these components were replaced: what is streamed is listed anew."""
    for component in _distinct(pipe, names).values():
        _maybe_remove_and_reapply_group_offloading(component)


def stays_on_device(component: Any) -> bool:
    """Whether no mode moves the component."""
    return not hasattr(component, "_hf_hook") and not hasattr(component, "_diffusers_hook")


def _distinct(pipe: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The components by name, each once: ai-toolkit's pipeline has the one transformer of 5B in both slots."""
    found = {id(component): name for name in reversed(names) if (component := getattr(pipe, name, None)) is not None}
    return {name: getattr(pipe, name) for name in reversed(found.values())}


def _bytes_of_parts(checkpoints: Checkpoints, itemsize: int) -> dict[str, int]:
    """What the weights of each component take in numbers of `itemsize` bytes."""
    sizes = {}
    for part in checkpoints.spec.sources:
        if part in STEM_OF:
            folder = checkpoints.folder_of(part)
            sizes[part] = sum(_count(folder / name) for name in file_names(folder, part)) * itemsize
    return sizes


def _count(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
