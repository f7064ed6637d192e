"""From a model id and folders on disk to a loaded model."""

from __future__ import annotations

import logging
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from pipelines import diffusers_privates as privates
from pipelines.attention import set_attention
from pipelines.base import WanModel
from pipelines.catalog import MODELS, Attention, Family, ModelSpec, OffloadMode, Quantize
from pipelines.checkpoints import Checkpoints
from pipelines.device import is_out_of_memory
from pipelines.diffusers_models import DiffusersModel
from pipelines.errors import CheckpointNotFound, DeviceUnavailable, OutOfMemory
from pipelines.facts import facts_of
from pipelines.host_memory import available
from pipelines.offload import Memory, bytes_by_mode, mode_for
from pipelines.parts import Parts
from pipelines.toolkit import load_toolkit
from pipelines.toolkit_models import Wan22ImageToVideo, Wan22TextImageToVideo
from pipelines.trained import Quantization, quantization_in

_MODEL_CLASS: dict[Family, type[WanModel]] = {
    "t2v": DiffusersModel,
    "i2v": DiffusersModel,
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
    quantize: Quantize = "none",
    processes: int = 1,
    memory: int | None = None,
) -> WanModel:
    """Load one model of the catalog, by default in bf16 on CUDA and in float32 on a CPU. Downloads nothing.

    `checkpoints` is a folder with an `ORG/NAME` per Hub repo id in diffusers layout, or what was found in several places.
    `toolkit_commit`: the commit that the checkout at `toolkit_path` must be at, if it has one; None: any.
    `took` gets the seconds of each component. `attention`: see `attention.set_attention`. `quantize`: the format in which the
    weights of the transformers and the text encoder are kept; `auto`: the first of none, qfloat8 and uint4 that leaves room
    for a job without streaming a transformer. `processes`: how many load the model on this machine, each to a device of its
    own: what waits in main memory waits there once for each. `memory`: bytes of main memory that they have together, from
    before the first of them loads; None: what is free now.
    Raises KeyError (unknown id), DeviceUnavailable, ToolkitRequired, CheckpointNotFound, OutOfMemory, LibraryMoved.
    """
    _quiet_libraries()
    spec = MODELS[model_id]
    target = _check_device(spec, device, offload_mode)
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    toolkit = load_toolkit(toolkit_path, toolkit_commit) if spec.needs_toolkit else None
    sizes: dict[OffloadMode, Memory] = {}
    mode: OffloadMode = "none"
    quantization = quantization_in(spec, "none" if quantize == "auto" else quantize)
    try:
        checkpoints = Checkpoints.of(spec, checkpoints)
        checkpoints.check()
        free = torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else 0
        if quantize == "auto" and target.type == "cuda":
            quantization = choose_quantization(spec, checkpoints, dtype.itemsize, free)
        _check_codes(checkpoints, quantization, quantize, dtype)
        if target.type == "cuda":
            sizes = bytes_by_mode(checkpoints, dtype.itemsize, quantization)
            mode = mode_for(offload_mode, spec, sizes, free, memory or available() or None, processes)
        parts = Parts(spec, checkpoints, dtype, target, mode, {} if took is None else took, quantization)
        model = _MODEL_CLASS[spec.family].load(parts, toolkit)
        model.place(mode)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointNotFound(f"{spec.id} cannot be loaded, a file is damaged or missing: {reason}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "use a larger GPU, or another OFFLOAD_MODE" if target.type == "cuda" else "use a machine with more memory"
        raise OutOfMemory(f"the memory ran out while {spec.id} was loaded; {remedy}") from error
    set_attention([getattr(model._pipe, name) for name in spec.transformers], attention, target)
    model.bytes_by_mode = {name: memory.device for name, memory in sizes.items()}
    model.facts |= facts_of(checkpoints, toolkit_path, target, dtype)
    model.facts["quantize"] = quantization.transformer if quantization else None
    if dtype == torch.float32 and checkpoints.are_converted:
        logging.getLogger(__name__).warning(
            "the weights were converted to bf16 when they were fetched; the worker runs in float32"
        )
    for warning in privates.check(model._pipe, mode):
        logging.getLogger(__name__).warning("%s", warning)
    return model


def choose_quantization(spec: ModelSpec, checkpoints: Checkpoints, itemsize: int, free: int) -> Quantization | None:
    """What `auto` takes for a device with `free` bytes: the finest with which no transformer has to be streamed."""
    for quantize in ("none", "qfloat8", "uint4"):
        quantization = quantization_in(spec, quantize)
        needed = bytes_by_mode(checkpoints, itemsize, quantization)
        if any(needed[mode].device + spec.bytes_of_a_job(mode) <= free for mode in ("none", "text_encoder")):
            return quantization
    return quantization_in(spec, "uint4")


def _check_codes(checkpoints: Checkpoints, quantization: Quantization | None, quantize: str, dtype: torch.dtype) -> None:
    """Raises CheckpointNotFound for files with other codes than this worker would make of the weights."""
    runs_in = str(dtype).removeprefix("torch.")
    for part, stored in checkpoints.stored().items():
        wanted = quantization.stored_as(part) if quantization else None
        if stored == wanted and stored.dtype == runs_in:
            continue
        repo, option = checkpoints.spec.sources[part].repo, f"--quantize {stored.format}"
        text = f"the {part} of {repo} was stored as {stored.format}, by fetch_checkpoints {option}, and "
        if not wanted or stored.format != wanted.format:
            remedy = f"QUANTIZE is {quantize}: set QUANTIZE={stored.format}, or fetch the weights again without {option}"
        elif stored == wanted:
            remedy = f"the worker runs in {runs_in}: set DTYPE={stored.dtype}, or fetch the weights again without {option}"
        else:
            remedy = f"not for the layers that this version quantizes: fetch it again, with {option}"
        raise CheckpointNotFound(text + remedy)


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
