"""The models on diffusers' own pipelines: all of Wan 2.1, and Wan 2.2 T2V A14B."""

from __future__ import annotations

from diffusers import WanImageToVideoPipeline, WanPipeline

from pipelines.base import WanModel
from pipelines.parts import Parts
from pipelines.toolkit import Toolkit
from pipelines.weights import STEM_OF


class DiffusersModel(WanModel):
    """The base checkpoint decides scheduler and boundary_ratio; text- and image-to-video differ in the pipeline class."""

    @classmethod
    def load(cls, parts: Parts, toolkit: Toolkit | None) -> WanModel:
        pipeline_class = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}[parts.spec.family]
        loaded = parts.load(name for name in parts.spec.sources if name in STEM_OF)
        return cls(pipeline_class.from_pretrained(parts.checkpoints.base, **loaded, local_files_only=True), parts)
