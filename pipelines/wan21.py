"""Wan 2.1: text-to-video 1.3B and 14B, image-to-video 14B at 720P and 480P. Plain diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from pipelines.base import WanModel
from pipelines.catalog import ModelSpec


class Wan21(WanModel):
    """The checkpoint says everything; text- and image-to-video differ in the pipeline class."""

    @staticmethod
    def load(spec: ModelSpec, checkpoints: Path, dtype: torch.dtype) -> Any:
        pipeline_class = WanImageToVideoPipeline if spec.control_image == "required" else WanPipeline
        folder = checkpoints / spec.sources["transformer"].repo
        return pipeline_class.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
