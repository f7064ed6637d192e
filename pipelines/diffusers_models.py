"""The models on diffusers' own pipelines: all of Wan 2.1, and Wan 2.2 T2V A14B."""

from __future__ import annotations

from typing import Any

from diffusers import WanImageToVideoPipeline, WanPipeline

from pipelines.base import Parts, WanModel
from pipelines.catalog import ModelSpec
from pipelines.checkpoints import Checkpoints
from pipelines.weights import STEM_OF


class DiffusersModel(WanModel):
    """The base checkpoint decides scheduler and boundary_ratio; text- and image-to-video differ in the pipeline class."""

    @staticmethod
    def load(spec: ModelSpec, checkpoints: Checkpoints, parts: Parts) -> Any:
        """The pipeline, with every component that has weights read from its own source."""
        pipeline_class = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}[spec.family]
        loaded = parts.load(name for name in spec.sources if name in STEM_OF)
        return pipeline_class.from_pretrained(checkpoints.base, **loaded, local_files_only=True)
