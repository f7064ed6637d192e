"""Loads the model of the settings, in the worker's process and in those of its other GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pipelines import WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.cfg_parallel import PASSES, CfgParallel
from pipelines.checkpoints import Checkpoints
from pipelines.clock import timed
from worker.settings import Settings, SettingsError


def ranks_of(settings: Settings) -> int:
    """How many processes make one video: 1, 2 or 4. Raises SettingsError when the machine has fewer GPUs than GPUS says."""
    there = gpus_of(settings)
    wanted = there if settings.gpus == "auto" else int(settings.gpus)
    if settings.device == "cuda" and wanted > there:
        raise SettingsError(f"GPUS={wanted}, but this machine has {there}; rent a worker with {wanted}, or set GPUS=auto")
    if settings.exact:
        wanted = min(wanted, PASSES)
    return 4 if wanted >= 4 else max(1, min(wanted, PASSES))


def gpus_of(settings: Settings) -> int:
    """How many GPUs this machine has; a CPU counts as one."""
    return torch.cuda.device_count() if settings.device == "cuda" else 1


def load_model(
    settings: Settings,
    memory: int,
    rank: int = 0,
    took: dict[str, float] | None = None,
    checkpoints: Checkpoints | None = None,
) -> WanModel:
    """Load the model of `settings` onto the GPU of this rank.

    `memory`: bytes of main memory for all ranks, read before any of them loads. `took`: gets the seconds of each component.

    Raises what `load_pipeline` raises, and SettingsError.
    """
    took = {} if took is None else took
    processes = ranks_of(settings)
    device = f"cuda:{rank}" if settings.device == "cuda" and processes > 1 else settings.device
    if device.startswith("cuda:"):
        torch.cuda.set_device(rank)
    model = load_pipeline(
        settings.model_id,
        checkpoints or Checkpoints(MODELS[settings.model_id], settings.checkpoint_places),
        device,
        settings.offload_mode,
        settings.ai_toolkit_path,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        toolkit_commit=settings.ai_toolkit_commit,
        took=took,
        attention="native" if settings.exact else settings.attention,
        quantize=settings.quantize,
        processes=processes,
        memory=memory,
    )
    if settings.compiles:
        with timed(took, "compiler"):
            model.compile_blocks(settings.compile_cache_dir)
    return model


def meet(model: WanModel, settings: Settings, rank: int, store: Path) -> None:
    """Wait for the other ranks, and share the passes with them. Raises DeviceLost, and LibraryMoved with more than two."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # the ranks are on one machine, and nobody else may connect to them
    model.share_passes(CfgParallel(rank, model.device, store, ranks_of(settings)))
