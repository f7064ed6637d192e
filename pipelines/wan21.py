"""Wan 2.1: text-to-video 1.3B and 14B, image-to-video 14B at 720P and 480P. Plain diffusers pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import WanImageToVideoPipeline, WanPipeline

from pipelines.base import Parts, WanModel
from pipelines.catalog import ModelSpec
from pipelines.checkpoints import Checkpoints
from pipelines.weights import STEM_OF


class Wan21(WanModel):
    """The checkpoint says everything; text- and image-to-video differ in the pipeline class."""

    @staticmethod
    def load(spec: ModelSpec, checkpoints: Checkpoints, parts: Parts) -> Any:
        pipeline_class = WanImageToVideoPipeline if spec.control_image == "required" else WanPipeline
        loaded = parts.load(name for name in spec.sources if name in STEM_OF)
        return pipeline_class.from_pretrained(checkpoints.base, **loaded, local_files_only=True)
