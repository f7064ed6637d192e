"""Latents → frames, one latent frame at a time, so that whoever takes the frames can work, or stop, in between.

The VAE is causal: diffusers' own decode goes through it frame by frame with a cache and puts the pieces together at the end.
Handing the pieces out instead gives the same values to the bit, and keeps one piece in memory rather than all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, device: torch.device) -> Iterator[npt.NDArray[np.uint8]]:
    """Denoised latents [1, z, T, H, W] → uint8 arrays [n, height, width, 3]: first one frame, then four at a time.

    By the arithmetic of diffusers' pipelines and their PIL output: the video is brought to 0..1 in the VAE's dtype and to
    0..255 in float32. The other order differs by one grey level on a quarter of the values in bf16.
    """
    latents = latents.to(device, vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    for video in _decoded(vae, latents / inverse_std + mean):
        video = (video[0] * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        yield video.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def _decoded(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The pieces that `vae.decode` puts together: [1, 3, n, height, width] in -1..1."""
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)  # brings an offloaded VAE to its device, as its `decode` would
    vae.clear_cache()
    try:
        latents = vae.post_quant_conv(latents)
        for number in range(latents.shape[2]):
            vae._conv_idx = [0]
            piece = vae.decoder(
                latents[:, :, number : number + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=number == 0,
            )
            if vae.config.patch_size is not None:
                piece = unpatchify(piece, patch_size=vae.config.patch_size)
            yield piece.clamp(-1.0, 1.0)
    finally:
        vae.clear_cache()
