"""From a model id and folders on disk to a loaded model."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from pipelines.attention import set_attention
from pipelines.base import Parts, WanModel
from pipelines.catalog import MODELS, Attention, Family, ModelSpec, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.diffusers_models import DiffusersModel
from pipelines.errors import CheckpointNotFound, DeviceUnavailable
from pipelines.facts import facts_of
from pipelines.offload import mode_for, place
from pipelines.toolkit import Toolkit, load_toolkit
from pipelines.toolkit_models import ToolkitModel, Wan22ImageToVideo, Wan22TextImageToVideo

_TOOLKIT_CLASS: dict[Family, type[ToolkitModel]] = {
    "toolkit_i2v": Wan22ImageToVideo,
    "toolkit_ti2v": Wan22TextImageToVideo,
}


def load_pipeline(
    model_id: str,
    checkpoints: Path | Checkpoints,
    device: str = "cuda",
    offload_mode: OffloadMode = "auto",
    toolkit_path: Path | None = None,
    dtype: torch.dtype | None = None,
    toolkit_commit: str | None = None,
    took: dict[str, float] | None = None,
    attention: Attention = "native",
) -> WanModel:
    """Load one model of the catalog, by default in bf16 on CUDA and in float32 on a CPU.

    `checkpoints` is a folder with an `ORG/NAME` per Hub repo id in diffusers layout, or what was found in several places.
    Nothing is fetched from a network.
    `toolkit_commit`: the commit that the checkout at `toolkit_path` must be at, where it has one; None: any.
    `took` is given the seconds of each component. `attention`: see `attention.set_attention`.
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
        mode: OffloadMode = "none"
        if target.type == "cuda":
            mode = mode_for(offload_mode, checkpoints, dtype.itemsize, torch.cuda.mem_get_info(target)[0])
        parts = Parts(spec, checkpoints, dtype, target, mode, {} if took is None else took)
        model = _load(spec, checkpoints, target, parts, mode, toolkit)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointNotFound(f"{spec.id} cannot be loaded, a file is damaged or missing: {reason}") from error
    set_attention([getattr(model._pipe, name) for name in spec.transformers], attention, target)
    model.facts = facts_of(checkpoints, toolkit_path, target, dtype) | {"offload_mode": mode}
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
        toolkit_class = _TOOLKIT_CLASS[spec.family]
        pipe = toolkit_class.load(spec, parts, target, toolkit)
        place(pipe, target, offload_mode)
        return toolkit_class(spec, pipe, target, checkpoints, toolkit)
    pipe = DiffusersModel.load(spec, checkpoints, parts)
    place(pipe, target, offload_mode)
    return DiffusersModel(spec, pipe, target, checkpoints)


def _quiet_libraries() -> None:
    """Their loading bars and hints would fill a worker's log; what matters comes as an error."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _check_device(spec: ModelSpec, device: str, offload_mode: OffloadMode) -> torch.device:
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable("DEVICE is cuda, but no CUDA device can be used here; use DEVICE=cpu or a GPU machine")
    if offload_mode != "auto" and (
        offload_mode not in spec.offload_modes or (offload_mode != "none" and target.type != "cuda")
    ):
        raise DeviceUnavailable(f"{spec.id} cannot run with OFFLOAD_MODE={offload_mode} on {device}")
    return target
