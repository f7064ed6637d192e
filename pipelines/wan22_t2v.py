"""Wan 2.2 T2V A14B: diffusers' pipeline from the base repo, with the two transformers of the ai-toolkit repo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from pipelines.base import WanModel, load_part
from pipelines.catalog import ModelSpec


class Wan22TextToVideo(WanModel):
    """Scheduler and boundary_ratio are those of the base repo; its own transformers are never read."""

    @staticmethod
    def load(spec: ModelSpec, checkpoints: Path, dtype: torch.dtype) -> Any:
        transformers = {name: load_part(spec, name, checkpoints, dtype) for name in spec.transformers}
        folder = checkpoints / spec.sources["vae"].repo
        return WanPipeline.from_pretrained(folder, **transformers, dtype=dtype, local_files_only=True, use_safetensors=True)
