"""Offloading: which components wait in main memory, and how they come to the device. No mode changes a bit of the frames.

The modes are the table OFFLOAD of the catalog.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from pipelines import diffusers_privates as privates
from pipelines.catalog import BYTES_OF_THE_PROCESS, OFFLOAD, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.errors import DeviceUnavailable
from pipelines.safetensors_header import header_of
from pipelines.trained import Quantization, bytes_of_codes
from pipelines.weights import STEM_OF, file_names, is_linear

BLOCKS = "blocks."
"""How the names of what lies in a transformer's blocks begin."""


@dataclass(frozen=True)
class Memory:
    """Bytes of weights in one mode."""

    device: int
    host: int
    """What waits in main memory."""


def mode_for(
    asked: OffloadMode,
    spec: ModelSpec,
    needed: Mapping[OffloadMode, Memory],
    free: int,
    host: int | None = None,
    processes: int = 1,
) -> OffloadMode:
    """The mode in which the weights fit into `free` bytes of the device and `host` bytes of main memory (None: not known).

    `processes`: how many share the main memory. Each of them keeps its own weights there.

    `auto`: the quickest of the modes that stream or swap which leaves room for a job of up to 1280x720, 81 frames, else
    `group`. For a mode that is asked for, only what is certain is checked of the device: the weights themselves. Raises
    DeviceUnavailable.
    """
    room = float("inf") if host is None else host // processes - BYTES_OF_THE_PROCESS
    if asked == "auto":
        possible = [mode for mode in spec.offload_modes if OFFLOAD[mode].streamed is not None]
        asked = next((mode for mode in possible if needed[mode].device + spec.bytes_of_a_job(mode) <= free), "group")
    enough = {mode: needed[mode].device <= free and needed[mode].host <= room for mode in spec.offload_modes}
    if enough[asked]:
        return asked
    fitting = next((mode for mode in spec.offload_modes if enough[mode]), None)
    remedy = f"set OFFLOAD_MODE={fitting}, or " if fitting else ""
    if needed[asked].device > free:
        raise DeviceUnavailable(
            f"the weights of {spec.id} take {needed[asked].device / 1e9:.1f} GB with OFFLOAD_MODE={asked}, and the GPU has "
            f"{free / 1e9:.1f} GB free: {remedy}use a larger GPU"
        )
    each = f" for each of {processes} GPUs" if processes > 1 else ""
    remedy += "set GPUS to fewer, or " if processes > 1 else ""
    raise DeviceUnavailable(
        f"OFFLOAD_MODE={asked} keeps {needed[asked].host / 1e9:.1f} GB of {spec.id} in main memory, and the worker itself "
        f"needs {BYTES_OF_THE_PROCESS / 1e9:.0f} GB there; this machine or container has "
        f"{(host or 0) / processes / 1e9:.1f} GB{each}: {remedy}use a GPU that holds more of it, or a machine with more memory"
    )


def bytes_by_mode(
    checkpoints: Checkpoints, itemsize: int, quantization: Quantization | None = None
) -> dict[OffloadMode, Memory]:
    """The weights in each mode, in numbers of `itemsize` bytes, or as codes where they are quantized."""
    spec = checkpoints.spec
    sizes = {part: _bytes_of(part, checkpoints, itemsize, quantization) for part in spec.sources if part in STEM_OF}
    device = on_device(spec, sizes, _bytes_of("transformer", checkpoints, itemsize, quantization, outside_blocks=True))
    return {
        mode: Memory(device[mode], sum(sizes.get(part, 0) for part in spec.waits_in_memory(mode)))
        for mode in spec.offload_modes
    }


def on_device(spec: ModelSpec, sizes: Mapping[str, int], outside_blocks: int) -> dict[OffloadMode, int]:
    """Bytes of weights on the device in each mode, from the bytes of each component, and of a transformer outside its blocks.

    Two blocks of a streamed transformer are there at a time, and always what lies in no block.
    """

    transformers = [sizes[part] for part in spec.transformers]
    largest: dict[OffloadMode, int] = {"model": max(sizes.values()), "sequential": 0}  # accelerate's, which move everything
    for mode in spec.offload_modes:
        offload = OFFLOAD[mode]
        if offload.streamed is not None:
            there = sum(size for part, size in sizes.items() if part not in (*offload.streamed, *spec.transformers))
            if spec.transformers[0] in offload.streamed:
                there += 2 * (max(transformers) - outside_blocks) // spec.num_blocks + outside_blocks * len(transformers)
            else:
                there += max(transformers) if offload.swaps_transformers else sum(transformers)
            largest[mode] = there
    return {mode: largest[mode] for mode in spec.offload_modes}


def place(pipe: Any, device: torch.device, mode: OffloadMode) -> AbstractContextManager[None]:
    """Set up the offloading of `mode`, and return what to enter for each video that is denoised.

    Components that the mode does not move are on the device already.
    """
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    streamed = _distinct(pipe, OFFLOAD[mode].streamed or ())
    for part, component in streamed.items():
        pieces: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        if part == "text_encoder":
            pieces = {"offload_type": "leaf_level"}
        apply_group_offloading(component, onload_device=device, use_stream=device.type == "cuda", **pieces)
    if OFFLOAD[mode].swaps_transformers:
        return Swap([pipe.transformer, pipe.transformer_2], device)
    return Streamed([component for part, component in streamed.items() if part != "text_encoder"], device)


class Streamed:
    """Transformers whose blocks come to the device one by one. What lies in none of the blocks stays there.

    A transformer of 14B has 0.46 GB there, which diffusers alone would bring and take back, both pageable, in every pass. It is
    brought at the start of a video, since `refresh`, and diffusers with every adapter, take it back to main memory.
    """

    def __init__(self, transformers: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._transformers = transformers
        self._device = device

    def __enter__(self) -> None:
        for transformer in self._transformers:
            for tensor in privates.take_unmatched(transformer):
                tensor.data = copy_to(tensor.data, self._device)

    def __exit__(self, *_: object) -> None: ...


class Swap:
    """Models of which only the one that computes is on the device; the weights of all wait in main memory, pinned.

    What is on the device is a copy, and is thrown away at the end of a `with` block: between videos everything is in main
    memory, where LoRAs are applied.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._device = device
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The tensors of the model that is on the device, and what they are in main memory."""
        self._present: torch.nn.Module | None = None
        for model in models:
            if device.type == "cuda":
                for tensor in _tensors(model):
                    tensor.data = pinned(tensor.data)
            model.register_forward_pre_hook(lambda model, _inputs: self._bring(model))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._release()

    def _bring(self, model: torch.nn.Module) -> None:
        if model is self._present:
            return
        self._release()
        self._present = model
        for tensor in _tensors(model):
            in_memory = tensor.data
            tensor.data = copy_to(in_memory, self._device)
            self._waiting.append((tensor, in_memory))

    def _release(self) -> None:
        self._present = None
        while self._waiting:
            tensor, in_memory = self._waiting.pop()
            tensor.data = in_memory


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory()


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


def refresh(pipe: Any, names: tuple[str, ...]) -> None:
    """Tell the offloading that tensors of these components were replaced."""
    for component in _distinct(pipe, names).values():
        privates.refresh_group_offloading(component)


def _distinct(pipe: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The components by name, each once: ai-toolkit's pipeline has the one transformer of 5B in both slots."""
    found = {id(component): name for name in reversed(names) if (component := getattr(pipe, name, None)) is not None}
    return {name: getattr(pipe, name) for name in reversed(found.values())}


def _bytes_of(
    part: str, checkpoints: Checkpoints, itemsize: int, quantization: Quantization | None, outside_blocks: bool = False
) -> int:
    """Bytes of a component's weights, or of those outside its blocks."""
    folder = checkpoints.folder_of(part)
    headers = [header_of(folder / name) for name in file_names(folder, part)]
    return sum(
        math.prod(shape) if header.dtypes[key] in ("U8", "I8") else bytes_of_tensor(part, key, shape, itemsize, quantization)
        for header in headers
        for key, shape in header.shapes.items()
        if not (outside_blocks and key.startswith(BLOCKS))
    )  # codes have a byte for each number


def bytes_of_tensor(part: str, key: str, shape: Sequence[int], itemsize: int, quantization: Quantization | None) -> int:
    """Bytes of one tensor of a component, by its name in the file and its shape."""
    format = quantization.format_of(part, key) if quantization else None
    if format and is_linear(key, shape):
        return bytes_of_codes(format, shape[0], shape[1], itemsize)
    return math.prod(shape) * itemsize
