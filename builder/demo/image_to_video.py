"""The tiny image-to-video transformer: the text-to-video one with 20 more input channels, and other weights in some layers.

The layers that read the prompt stay those of text-to-video. `weights/image_to_video.safetensors` has only what differs.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from builder.demo import world
from pipelines.toolkit_models import add_frames_conditioning

FILE = "image_to_video.safetensors"
IN_CHANNELS = 36
"""16 of the noisy latents, 4 of the mask, 16 of the encoded image."""
LAST_FRAME_SHARE = 0.15
"""The share of the clips that show their last frame too, as a request for Wan 2.2 may."""
STEPS: dict[world.Direction, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def new_transformer(weights: Path, image_dim: int | None = None) -> WanTransformer3DModel:
    """Return a transformer with the weights of `weights/transformer`, whose new input channels change nothing yet.

    With `image_dim` it takes an image encoder's embeddings too, as Wan 2.1 does, and their attention adds nothing.
    """
    config = WanTransformer3DModel.load_config(weights / "transformer")
    wide = {"in_channels": IN_CHANNELS, "image_dim": image_dim}
    if image_dim:
        wide["added_kv_proj_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    torch.manual_seed(0)
    model: WanTransformer3DModel = WanTransformer3DModel.from_config(config | wide)
    tensors = load_file(weights / "transformer/diffusion_pytorch_model.safetensors")
    narrow = tensors["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = torch.zeros(narrow.shape[0], IN_CHANNELS, *narrow.shape[2:])
    tensors["patch_embedding.weight"][:, : narrow.shape[1]] = narrow
    model.load_state_dict(tensors, strict=False)
    if image_dim:
        for block in model.blocks:
            block.attn2.add_v_proj.weight.data.zero_()
            block.attn2.add_v_proj.bias.data.zero_()
    return model


def differs(name: str) -> bool:
    """Return whether the tensor is image-to-video's own: all that does not read the prompt or the timestep."""
    return not any(part in name for part in ("condition_embedder.", ".attn2.", ".norm2."))


def freeze_the_rest(model: WanTransformer3DModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(differs(name))


def save(model: WanTransformer3DModel, weights: Path) -> None:
    """Write what differs from text-to-video, in bf16."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items() if differs(name)}
    save_file(tensors, weights / FILE)


def load(weights: Path, image_dim: int | None = None) -> WanTransformer3DModel:
    """Return the trained transformer in float32, with values that bf16 holds."""
    model = new_transformer(weights, image_dim)
    model.load_state_dict(load_file(weights / FILE), strict=False)
    return model


def sample(rng: random.Random) -> world.Clip:
    """Return a clip that is not held out. In half of them, the first frame does not tell where the object will go."""
    clip = world.sample_seen(rng)
    return neutral(clip, rng) if rng.random() < 0.5 else clip


def neutral(clip: world.Clip, rng: random.Random) -> world.Clip:
    """Return the clip with a start near the middle and an object that faces any side."""
    x, y, travel = rng.uniform(0.36, 0.64), rng.uniform(0.36, 0.64), rng.uniform(0.2, 0.32)
    right, down = STEPS[clip.direction]
    return replace(clip, start=(x, y), end=(x + travel * right, y + travel * down), faces_left=rng.random() < 0.5)


def condition(vae: AutoencoderKLWan, film: Tensor, latents: Tensor, with_last: bool) -> Tensor:
    """Return the mask and the encoded image [20, T, h, w] of a film [3, frames, height, width] with latents [16, T, h, w]."""
    last = film[None, :, -1] if with_last else None
    return add_frames_conditioning(latents[None], film[None, :, 0], last, vae)[0, latents.shape[0] :]
