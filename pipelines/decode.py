"""Decode latents into frames, one latent frame at a time, so that frames can be encoded, or the job stopped, in between.

The VAE is causal: diffusers' own decode goes through it frame by frame with a cache, and puts the pieces together at the end.
Yielding the pieces gives the same values to the bit, and keeps one piece in memory instead of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.device import free, is_out_of_memory
from pipelines.diffusers_privates import can_decode_in_pieces, decode_pieces, decode_whole
from pipelines.errors import DeviceLost

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3], RGB."""


class Decoder:
    """Decodes with one VAE. Where the memory does not do, it decodes again with the rest of the model out of the way.

    The arithmetic is the same, and so are the frames; tiles, the usual remedy, would change them.
    """

    def __init__(self, vae: Any, device: torch.device, rest_of_the_model: Callable[[], list[torch.nn.Module]]) -> None:
        """`rest_of_the_model`: what a decode does not need and another memory could hold, in the order in which it goes."""
        self._vae = vae
        self._device = device
        self._rest_of_the_model = rest_of_the_model
        self._pieces_of = decode_pieces if can_decode_in_pieces(vae) else decode_whole
        self._parts_out: dict[tuple[int, ...], int] = {}
        """How many parts of the model had to leave the device for a decode, by the shape of its latents."""

    def frames_of(self, latents: torch.Tensor, in_tiles: bool) -> Iterator[Frames]:
        """Denoised latents [1, z, T, H, W] → frames, a few at a time. `in_tiles`: as the trainer does to save memory.

        Raises DeviceLost, and what the device raises when nothing more can be moved away.
        """
        waiting, number = self._rest_of_the_model(), 0
        known = self._parts_out.get(latents.shape, 0)  # as the last decode of this size needed it
        out_of_the_way, waiting = waiting[:known], waiting[known:]
        pieces_of = decode_whole if in_tiles else self._pieces_of
        try:
            if in_tiles:
                self._vae.enable_tiling()
            for module in out_of_the_way:
                module.to("cpu")
            while True:
                try:
                    for frames in itertools.islice(decode(self._vae, latents, self._device, pieces_of), number, None):
                        yield frames
                        number += 1
                    return
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    free(error, self._device)  # before anything comes back to the device
                    if not waiting:
                        raise
                out_of_the_way.append(waiting.pop(0))
                out_of_the_way[-1].to("cpu")
                self._parts_out[latents.shape] = len(out_of_the_way)
        finally:
            self._vae.disable_tiling()
            self._bring_back(out_of_the_way)

    def _bring_back(self, modules: Iterable[torch.nn.Module]) -> None:
        """Raises DeviceLost when the device has no room for what was on it before: nothing heals half a model."""
        try:
            for module in modules:
                module.to(self._device)
        except (RuntimeError, MemoryError) as error:
            raise DeviceLost("the model does not fit back onto the device") from error


@torch.no_grad()
def decode(
    vae: Any, latents: torch.Tensor, device: torch.device, pieces_of: Callable[..., Iterator[torch.Tensor]] = decode_pieces
) -> Iterator[Frames]:
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
