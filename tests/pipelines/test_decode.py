"""Frames handed out one latent frame at a time are those of decoding at once."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from pipelines.decode import decode

VAES = ["ai-toolkit/wan2.1-vae", "Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae"]


@pytest.fixture(params=VAES, ids=["2.1", "2.2"])
def path(request: pytest.FixtureRequest, tiny: Path) -> Path:
    return tiny / request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent_frames", [1, 2, 5])
def test_the_pieces_are_equal_to_the_bit_to_the_whole(path: Path, dtype: torch.dtype, latent_frames: int) -> None:
    vae = AutoencoderKLWan.from_pretrained(path, dtype=dtype)
    latents = torch.randn(1, vae.config.z_dim, latent_frames, 4, 6, generator=torch.manual_seed(1))
    pieces = list(decode(vae, latents, torch.device("cpu")))

    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1, 1) for numbers in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        video = vae.decode(latents.to(dtype) / (1.0 / std.to(dtype)).to(dtype) + mean.to(dtype)).sample
    whole = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="pil")[0]
    assert [len(piece) for piece in pieces] == [1] + [4] * (latent_frames - 1)
    assert np.array_equal(np.concatenate(pieces), np.stack([np.asarray(frame) for frame in whole]))


def test_a_stream_that_is_left_halfway_leaves_nothing_for_the_next(path: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(path)
    latents = torch.randn(1, vae.config.z_dim, 3, 4, 6, generator=torch.manual_seed(1))
    before = np.concatenate(list(decode(vae, latents, torch.device("cpu"))))
    half = decode(vae, latents, torch.device("cpu"))
    list(islice(half, 2))
    half.close()
    assert all(kept is None for kept in vae._feat_map)
    assert np.array_equal(np.concatenate(list(decode(vae, latents, torch.device("cpu")))), before)
