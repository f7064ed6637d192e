"""Wan 2.2 TI2V 5B: ai-toolkit's pipeline, text-to-video, or image-to-video when there is a control image."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.base import Sampling
from pipelines.wan22_toolkit import Wan22Toolkit


class Wan22TextImageToVideo(Wan22Toolkit):
    """The first latent frame is the image itself; a noise mask keeps it through the denoising."""

    def _conditioning(self, sampling: Sampling, generator: torch.Generator) -> dict[str, Any]:
        if sampling.control_image is None:
            return {}
        latents, first_frame = self._noise_and_first_frame(sampling, generator)
        latents, noise_mask = self._toolkit.add_first_frame_conditioning_v22(latents, first_frame, self._pipe.vae)
        return {"latents": latents, "noise_mask": noise_mask}
