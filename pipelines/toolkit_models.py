"""The two models on ai-toolkit's `Wan22Pipeline`: Wan 2.2 I2V A14B and Wan 2.2 TI2V 5B."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from pipelines.base import WanModel
from pipelines.parts import Parts
from pipelines.recipes import Sampling
from pipelines.schedulers import UNIPC
from pipelines.toolkit import Toolkit


class ToolkitModel(WanModel):
    """The toolkit's functions make the conditioning before its pipeline is called."""

    _toolkit: Toolkit

    @classmethod
    def load(cls, parts: Parts, toolkit: Toolkit | None) -> WanModel:
        assert toolkit is not None  # `load_pipeline` loads it for every family that needs it
        spec, loaded = parts.spec, parts.load(parts.spec.sources)
        # 5B has one transformer, which the toolkit puts in both slots.
        loaded.setdefault("transformer_2", loaded["transformer"])
        pipe = toolkit.Wan22Pipeline(
            **loaded,
            scheduler=UniPCMultistepScheduler(**UNIPC, flow_shift=spec.flow_shift),
            boundary_ratio=spec.boundary_ratio,
            expand_timesteps=spec.expand_timesteps,
            device=parts.device,
            aggressive_offload=False,
        )
        model = cls(pipe, parts)
        model._toolkit = toolkit
        return model

    @abstractmethod
    def _conditioning(self, sampling: Sampling, generator: torch.Generator) -> dict[str, Any]:
        """The pipeline arguments that carry the control image; {} without one."""

    def _denoise(self, sampling: Sampling, generator: torch.Generator, on_step_end: Any) -> torch.Tensor:
        arguments = self._call_arguments(sampling, generator, on_step_end)
        latents: torch.Tensor = self._pipe(**arguments, **self._conditioning(sampling, generator)).frames
        return latents

    def _noise_and_first_frame(self, sampling: Sampling, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise [1, z, T, H/s, W/s], first frame [1, 3, H, W] in -1..1), both in the model's dtype.

        The noise is drawn first: the toolkit's functions then draw the VAE's posterior from the same generators.
        """
        dtype = self._pipe.transformer.dtype
        noise = self._pipe.prepare_latents(
            1,
            self._pipe.vae.config.z_dim,
            sampling.height,
            sampling.width,
            sampling.num_frames,
            torch.float32,
            self.device,
            generator,
            None,
        )
        assert sampling.control_image is not None  # `_fit` has checked it
        return noise.to(dtype), _image_to_tensor(sampling.control_image, self.device, dtype)


class Wan22ImageToVideo(ToolkitModel):
    """Wan 2.2 I2V A14B: 20 extra latent channels carry the first frame. The control image is required."""

    def _conditioning(self, sampling: Sampling, generator: torch.Generator) -> dict[str, Any]:
        latents, first_frame = self._noise_and_first_frame(sampling, generator)
        if sampling.last_image is None:
            return {"latents": self._toolkit.add_first_frame_conditioning(latents, first_frame, self._pipe.vae)}
        last_frame = _image_to_tensor(sampling.last_image, self.device, latents.dtype)
        return {"latents": add_frames_conditioning(latents, first_frame, last_frame, self._pipe.vae)}


class Wan22TextImageToVideo(ToolkitModel):
    """Wan 2.2 TI2V 5B: the first latent frame is the control image itself, and a noise mask keeps it while denoising."""

    def _conditioning(self, sampling: Sampling, generator: torch.Generator) -> dict[str, Any]:
        if sampling.control_image is None:
            return {}
        latents, first_frame = self._noise_and_first_frame(sampling, generator)
        latents, noise_mask = self._toolkit.add_first_frame_conditioning_v22(latents, first_frame, self._pipe.vae)
        return {"latents": latents, "noise_mask": noise_mask}


def add_frames_conditioning(
    latents: torch.Tensor, first_frame: torch.Tensor, last_frame: torch.Tensor | None, vae: Any
) -> torch.Tensor:
    """Noise [1, 16, T, h, w] and frames [1, 3, H, W] in -1..1 → conditioned latents [1, 36, T, h, w].

    What the toolkit's `add_first_frame_conditioning` makes, with a last frame too: behind the noise lie a mask of 4 channels,
    one for each of the frames that a latent frame packs, and the encoded video whose unknown frames are 0. The mask is that of
    diffusers' WanImageToVideoPipeline with a `last_image`.
    """
    packed = vae.config.scale_factor_temporal
    count = packed * (latents.shape[2] - 1) + 1
    video = first_frame.new_zeros(1, 3, count, *first_frame.shape[2:])
    mask = latents.new_zeros(1, packed, *latents.shape[2:])
    video[:, :, 0], mask[:, :, 0] = first_frame, 1
    if last_frame is not None:
        video[:, :, -1], mask[:, -1, -1] = last_frame, 1
    encoded = vae.encode(video.to(latents)).latent_dist.sample().to(latents)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return torch.cat([latents, mask, (encoded - mean) * (1.0 / std)], dim=1)


def _image_to_tensor(image: Image.Image, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """RGB image → [1, 3, H, W] in -1..1, cast before it is scaled, as the trainer does."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).contiguous()
    return (pixels.float() / 255).to(device, dtype) * 2.0 - 1.0
