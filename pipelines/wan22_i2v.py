"""Wan 2.2 I2V A14B: ai-toolkit's pipeline, conditioned on the first frame through 20 extra latent channels."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.base import Sampling
from pipelines.wan22_toolkit import Wan22Toolkit


class Wan22ImageToVideo(Wan22Toolkit):
    """The control image is required, so every video is conditioned."""

    def _conditioning(self, sampling: Sampling, generator: torch.Generator) -> dict[str, Any]:
        latents, first_frame = self._noise_and_first_frame(sampling, generator)
        return {"latents": self._toolkit.add_first_frame_conditioning(latents, first_frame, self._pipe.vae)}
