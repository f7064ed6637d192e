"""Decode latents into frames, one latent frame at a time, so that frames can be encoded, or the job stopped, in between.

The VAE is causal: diffusers' own decode goes through it frame by frame with a cache, and puts the pieces together at the end.
Yielding the pieces gives the same values to the bit, and keeps one piece in memory instead of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.diffusers_privates import decode_pieces


@torch.no_grad()
def decode(
    vae: Any, latents: torch.Tensor, device: torch.device, pieces_of: Callable[..., Iterator[torch.Tensor]] = decode_pieces
) -> Iterator[npt.NDArray[np.uint8]]:
    """Denoised latents [1, z, T, H, W] → uint8 arrays [n, height, width, 3]: first one frame, then four at a time.

    By the arithmetic of diffusers' pipelines and their PIL output: the video is brought to 0..1 in the VAE's dtype and to
    0..255 in float32. The other order differs by one grey level on a quarter of the values in bf16.
    """
    latents = latents.to(device, vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    for video in pieces_of(vae, latents / inverse_std + mean):
        video = (video[0] * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        yield video.permute(1, 2, 3, 0).contiguous().cpu().numpy()
