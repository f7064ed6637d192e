"""From a model id and folders on disk to a loaded model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from pipelines.base import Parts, WanModel
from pipelines.catalog import MODELS, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.errors import CheckpointNotFound, DeviceUnavailable
from pipelines.facts import facts_of
from pipelines.toolkit import Toolkit, load_toolkit
from pipelines.wan21 import Wan21
from pipelines.wan22_5b import Wan22TextImageToVideo
from pipelines.wan22_i2v import Wan22ImageToVideo
from pipelines.wan22_t2v import Wan22TextToVideo
from pipelines.wan22_toolkit import Wan22Toolkit
from pipelines.weights import STEM_OF, file_names


def load_pipeline(
    model_id: str,
    checkpoints: Path | Checkpoints,
    device: str = "cuda",
    offload_mode: OffloadMode = "none",
    toolkit_path: Path | None = None,
    dtype: torch.dtype | None = None,
    toolkit_commit: str | None = None,
    took: dict[str, float] | None = None,
) -> WanModel:
    """Load one model of the catalog, by default in bf16 on CUDA and in float32 on a CPU.

    `checkpoints` is a folder with an `ORG/NAME` per Hub repo id in diffusers layout, or what was found in several places.
    Nothing is fetched from a network.
    `toolkit_commit`: the commit that the checkout at `toolkit_path` must be at, where it has one; None: any.
    `took` is given the seconds of each component.
    Raises KeyError (unknown id), DeviceUnavailable, ToolkitRequired, CheckpointNotFound, OutOfMemory.
    """
    _quiet_libraries()
    spec = MODELS[model_id]
    target = _check_device(spec, device, offload_mode)
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    toolkit = load_toolkit(toolkit_path, toolkit_commit) if spec.needs_toolkit else None
    try:
        checkpoints = Checkpoints.of(spec, checkpoints)
        checkpoints.check()
        if target.type == "cuda":
            check_memory(spec, checkpoints, offload_mode, dtype.itemsize, torch.cuda.mem_get_info(target)[0])
        parts = Parts(spec, checkpoints, dtype, target if offload_mode == "none" else None, {} if took is None else took)
        model = _load(spec, checkpoints, target, parts, offload_mode, toolkit)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointNotFound(f"{spec.id} cannot be loaded, a file is damaged or missing: {reason}") from error
    model.facts = facts_of(checkpoints, toolkit_path, target, dtype) | {"offload_mode": offload_mode}
    return model


def _load(
    spec: ModelSpec,
    checkpoints: Checkpoints,
    target: torch.device,
    parts: Parts,
    offload_mode: OffloadMode,
    toolkit: Toolkit | None,
) -> WanModel:
    if toolkit is not None:
        toolkit_class: type[Wan22Toolkit] = Wan22ImageToVideo if spec.moe else Wan22TextImageToVideo
        pipe = toolkit_class.load(spec, parts, target, toolkit)
        _place(pipe, target, offload_mode)
        return toolkit_class(spec, pipe, target, checkpoints, toolkit)
    model_class = Wan22TextToVideo if spec.moe else Wan21
    pipe = model_class.load(spec, checkpoints, parts)
    _place(pipe, target, offload_mode)
    return model_class(spec, pipe, target, checkpoints)


def _quiet_libraries() -> None:
    """Their loading bars and hints would fill a worker's log; what matters comes as an error."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _check_device(spec: ModelSpec, device: str, offload_mode: OffloadMode) -> torch.device:
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable("DEVICE is cuda, but no CUDA device can be used here; use DEVICE=cpu or a GPU machine")
    if offload_mode not in spec.offload_modes or (offload_mode != "none" and target.type != "cuda"):
        raise DeviceUnavailable(f"{spec.id} cannot run with OFFLOAD_MODE={offload_mode} on {device}")
    return target


def _place(pipe: Any, device: torch.device, offload_mode: OffloadMode) -> None:
    if offload_mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload_mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def check_memory(spec: ModelSpec, checkpoints: Path | Checkpoints, offload_mode: OffloadMode, itemsize: int, free: int) -> None:
    """Whether the weights, in numbers of `itemsize` bytes, fit into `free` bytes of the device.

    Only a lower bound of what a job needs, but one that is certain. Raises DeviceUnavailable.
    """
    sizes = _bytes_of_parts(Checkpoints.of(spec, checkpoints), itemsize)
    on_device: dict[OffloadMode, int] = {"none": sum(sizes), "model": max(sizes), "sequential": 0}  # one layer is nothing
    needed = {mode: on_device[mode] for mode in spec.offload_modes}
    if needed[offload_mode] <= free:
        return
    fitting = next((mode for mode, size in needed.items() if size <= free), None)
    remedy = f"set OFFLOAD_MODE={fitting}, or use a larger GPU" if fitting else "use a larger GPU"
    raise DeviceUnavailable(
        f"the weights of {spec.id} take {needed[offload_mode] / 1e9:.1f} GB with OFFLOAD_MODE={offload_mode}, and the GPU has "
        f"{free / 1e9:.1f} GB free: {remedy}"
    )


def _bytes_of_parts(checkpoints: Checkpoints, itemsize: int) -> list[int]:
    """What the weights of each component take in numbers of `itemsize` bytes."""
    sizes = []
    for part in checkpoints.spec.sources:
        if part in STEM_OF:
            folder = checkpoints.folder_of(part)
            sizes.append(sum(_count(folder / name) for name in file_names(folder, part)) * itemsize)
    return sizes


def _count(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
