"""The tiny VAE: the shape of Wan 2.1's with an eighth of its width or less, and how it is trained on the toy world."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from builder.demo import world

SIZES = ((64, 96), (96, 64), (64, 64), (96, 96), (96, 128), (128, 96), (128, 192), (192, 128), (160, 160))
"""Heights and widths of the clips, in pixels."""
CROPS = ((48, 9, 3), (48, 9, 3), (64, 9, 1), (48, 17, 1))
"""Side in pixels, frames, clips of a batch. Each batch costs about the same."""
LATENT_NOISE = 0.1
SMALLEST_LOG_VARIANCE = -30.0
"""diffusers' DiagonalGaussianDistribution clamps there."""


def new_vae(seed: int) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    start_near_identity(vae)
    return vae


@torch.no_grad()
def start_near_identity(vae: AutoencoderKLWan) -> None:
    """Make the VAE a blur that keeps colours: shortcuts and resamplers are identities, and what is added to them is near zero.

    From the usual random start, the training needs its first minutes to find this.
    """
    for module in vae.modules():
        if isinstance(module, wan.WanResidualBlock):
            module.conv2.weight.mul_(0.2)
            module.conv2.bias.zero_()
            if not isinstance(module.conv_shortcut, nn.Identity):
                add_identity(module.conv_shortcut.weight, [(0, 0, 0)])
        elif isinstance(module, wan.WanAttentionBlock):
            module.proj.weight.mul_(0.1)
            module.proj.bias.zero_()
        elif isinstance(module, wan.WanResample):
            down = module.mode.startswith("down")
            add_identity(module.resample[1].weight, [(0, 0), (0, 1), (1, 0), (1, 1)] if down else [(1, 1)])
            if module.mode == "downsample3d":
                add_identity(module.time_conv.weight, [(0, 0, 0), (1, 0, 0), (2, 0, 0)])
            elif module.mode == "upsample3d":  # one latent frame becomes two: both halves of the channels
                for half in module.time_conv.weight.chunk(2):
                    add_identity(half, [(2, 0, 0)])
    for part in (vae.encoder, vae.decoder):
        add_identity(part.conv_in.weight, [(2, 1, 1)], keep=0.7)
    add_identity(vae.encoder.conv_out.weight, [(2, 1, 1)], keep=0.5)
    add_identity(vae.quant_conv.weight, [(0, 0, 0)])
    without_variance(vae)
    add_identity(vae.post_quant_conv.weight, [(0, 0, 0)])


def without_variance(vae: AutoencoderKLWan) -> None:
    """Set the variance of the latents to nothing: no loss here trains it, and ai-toolkit trains on samples, not on means."""
    _, log_variance = vae.quant_conv.weight.chunk(2)
    log_variance.zero_()
    vae.quant_conv.bias.chunk(2)[1].fill_(SMALLEST_LOG_VARIANCE)


def add_identity(weight: Tensor, taps: list[tuple[int, ...]], keep: float = 0.3) -> None:
    """Shrink a convolution's weight [out, in, *kernel] to `keep` of it and add an identity, shared among the taps."""
    weight.mul_(keep)
    channels = torch.arange(min(weight.shape[:2]))
    for tap in taps:
        weight[(channels, channels, *tap)] += 1 / len(taps)  # type: ignore[index]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode as `vae.decode` does, frame by frame, without the clamp at the end, which stops gradients."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        frame = hidden[:, :, i : i + 1]
        frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return torch.cat(frames, dim=2)


def batch(rng: random.Random) -> tuple[Tensor, Tensor]:
    """Return crops near the objects [n, 3, frames, side, side], and where the objects are [n, 1, frames, side, side]."""
    side, frames, number = rng.choice(CROPS)
    films, masks = [], []
    for _ in range(number):
        height, width = rng.choice(SIZES)
        clip = world.sample(rng, striped=rng.random() < 0.4)
        film = world.draw(clip, height, width, frames)
        at = rng.random()
        x, y = (int((a + (b - a) * at) * s) for a, b, s in zip(clip.start, clip.end, (width, height), strict=True))
        left, top = (max(0, min(s - side, c - side // 2 + rng.randint(-16, 16))) // 8 * 8 for c, s in ((x, width), (y, height)))
        behind = (world.background(clip, height, width).unsqueeze(1) * 2 - 1) * world.LARGEST_VALUE
        mask = ((film - behind).abs().amax(0, keepdim=True) > 0.02).float()
        films.append(film[..., top : top + side, left : left + side])
        masks.append(mask[..., top : top + side, left : left + side])
    return torch.stack(films), torch.stack(masks)


def loss(vae: AutoencoderKLWan, rng: random.Random) -> Tensor:
    """Return the loss of encoder and decoder on a random batch."""
    films, masks = batch(rng)
    latents = vae.encode(films).latent_dist.mean
    total: Tensor = decoder_loss(vae, latents, films, masks) + 3e-4 * (latents**2).mean()  # keeps the latents small
    return total


def polishing_loss(vae: AutoencoderKLWan, rng: random.Random) -> Tensor:
    """Return the loss of the decoder alone on a random batch."""
    films, masks = batch(rng)
    with torch.no_grad():
        latents = vae.encode(films).latent_dist.mean
    return decoder_loss(vae, latents, films, masks)


def decoder_loss(vae: AutoencoderKLWan, latents: Tensor, films: Tensor, masks: Tensor) -> Tensor:
    """Return L1 and L2 of what is decoded, objects four times as much, and L1 of its edges in space and time."""
    decoded = decode(vae, latents + LATENT_NOISE * torch.randn_like(latents))
    error, weight = (decoded - films).abs(), 1 + 3 * masks
    edges = torch.stack([(decoded.diff(dim=dim) - films.diff(dim=dim)).abs().mean() for dim in (2, 3, 4)]).sum()
    return (error * weight).mean() + (error**2 * weight).mean() + 0.5 * edges


@torch.no_grad()
def measure(vae: AutoencoderKLWan, rng: random.Random) -> float:
    """Write the mean and spread of the latents into the VAE's config, as the real one has them. Returns the PSNR in dB."""
    means, films, decoded = [], [], []
    for height, width in SIZES[:7]:
        film = torch.stack([world.draw(world.sample(rng), height, width, 9) for _ in range(4)])
        means.append(vae.encode(film).latent_dist.mean)
        decoded.append(vae.decode(means[-1]).sample.flatten())
        films.append(film.flatten())
    latents = torch.cat([m.transpose(0, 1).flatten(1) for m in means], dim=1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    error = ((torch.cat(films) - torch.cat(decoded)) ** 2).mean()
    return 10 * torch.log10(4 / error).item()


def is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 4 and min(parameter.shape[0], parameter[0].numel()) >= 8 and "quant" not in name
