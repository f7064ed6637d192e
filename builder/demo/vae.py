"""The tiny VAEs: the shapes of Wan 2.1's and of 5B's with a tenth of their width or less, and how they learn the toy world."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from builder.demo import world
from builder.tiny_checkpoints import LAYOUT_OF_VAE_22

SIZES = ((8, 12), (12, 8), (8, 8), (12, 12), (12, 16), (16, 12), (16, 24), (24, 16), (20, 20))
"""Heights and widths of the clips, in latent pixels: a VAE that compresses more sees larger clips."""
CROPS = ((6, 9, 3), (6, 9, 3), (8, 9, 1), (6, 17, 1))
"""Side in latent pixels, frames, clips of a batch. Each batch costs about the same."""
CHANNELS_OF_5B = 16
"""How many of the 48 latent channels of 5B carry something.

A token has 4 pixels of latents. Its noise must fit into the tiny transformer's width, beside what it shows.
"""
LATENT_NOISE = 0.1
SMALLEST_LOG_VARIANCE = -30.0
"""diffusers' DiagonalGaussianDistribution clamps there."""


def vae_21(seed: int) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    start_near_identity(vae)
    return vae


def vae_22(seed: int) -> AutoencoderKLWan:
    """Return the VAE of 5B: 16x in space through 2x2 patches, 48 latent channels, residual blocks.

    Its widths grow later than the real ones: 12 channels, as many as a patch has, where edges are drawn.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=12, decoder_base_dim=12, dim_mult=[1, 1, 2, 2], **LAYOUT_OF_VAE_22)
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
        elif isinstance(module, wan.WanResample) and vae.config.is_residual:  # its block has a shortcut around it
            for parameter in module.parameters():
                parameter.mul_(0.3)
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
    film = torch.cat(frames, dim=2)
    return film if vae.config.patch_size is None else wan.unpatchify(film, vae.config.patch_size)


def batch(pixel: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Return crops near the objects [n, 3, frames, side, side], and where the objects are [n, 1, frames, side, side].

    `pixel`: the side of a latent pixel, in pixels.
    """
    side, frames, number = rng.choice(CROPS)
    side *= pixel
    films, masks = [], []
    for _ in range(number):
        height, width = (pixel * length for length in rng.choice(SIZES))
        clip = world.sample(rng, striped=rng.random() < 0.4)
        film = world.draw(clip, height, width, frames)
        at = rng.random()
        x, y = (int((a + (b - a) * at) * s) for a, b, s in zip(clip.start, clip.end, (width, height), strict=True))
        left, top = (
            max(0, min(length - side, centre - side // 2 + rng.randint(-2 * pixel, 2 * pixel))) // pixel * pixel
            for centre, length in ((x, width), (y, height))
        )
        behind = (world.background(clip, height, width).unsqueeze(1) * 2 - 1) * world.LARGEST_VALUE
        mask = ((film - behind).abs().amax(0, keepdim=True) > 0.02).float()
        films.append(film[..., top : top + side, left : left + side])
        masks.append(mask[..., top : top + side, left : left + side])
    return torch.stack(films), torch.stack(masks)


def loss(vae: AutoencoderKLWan, rng: random.Random) -> Tensor:
    """Return the loss of encoder and decoder on a random batch."""
    films, masks = batch(vae.config.scale_factor_spatial, rng)
    latents = vae.encode(films).latent_dist.mean
    total: Tensor = decoder_loss(vae, latents, films, masks) + 3e-4 * (latents**2).mean()  # keeps the latents small
    return total


def polishing_loss(vae: AutoencoderKLWan, rng: random.Random) -> Tensor:
    """Return the loss of the decoder alone on a random batch."""
    films, masks = batch(vae.config.scale_factor_spatial, rng)
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
def keep_main_axes(vae: AutoencoderKLWan, number: int, rng: random.Random) -> None:
    """Turn the latents to their main axes, and keep the first `number` of them. The other channels become nothing."""
    latents = torch.cat([vae.encode(film).latent_dist.mean.transpose(0, 1).flatten(1) for film in measured_films(vae, rng)], 1)
    mean = latents.mean(1)
    axes = torch.linalg.eigh(latents.cov()).eigenvectors.flip(1)[:, :number]
    turned, bias = vae.quant_conv.weight.chunk(2)[0], vae.quant_conv.bias.chunk(2)[0]
    into, offset = axes.mT @ turned.flatten(1), axes.mT @ (bias - mean)
    out_of = vae.post_quant_conv.weight.flatten(1)
    vae.post_quant_conv.bias.add_(out_of @ mean)
    out_of = out_of @ axes
    for parameter in (turned, bias, vae.post_quant_conv.weight):
        parameter.zero_()
    turned[:number], bias[:number] = into.view(number, *turned.shape[1:]), offset
    vae.post_quant_conv.weight[:, :number] = out_of.view(-1, number, 1, 1, 1)


def measured_films(vae: AutoencoderKLWan, rng: random.Random) -> Iterator[Tensor]:
    """Yield drawn films [4, 3, 9, height, width] of several sizes."""
    for size in SIZES[:7]:
        height, width = (vae.config.scale_factor_spatial * length for length in size)
        yield torch.stack([world.draw(world.sample(rng), height, width, 9) for _ in range(4)])


@torch.no_grad()
def measure(vae: AutoencoderKLWan, rng: random.Random) -> float:
    """Write the mean and spread of the latents into the VAE's config, as the real one has them. Returns the PSNR in dB."""
    means, films, decoded = [], [], []
    for film in measured_films(vae, rng):
        means.append(vae.encode(film).latent_dist.mean)
        decoded.append(vae.decode(means[-1]).sample.flatten())
        films.append(film.flatten())
    latents = torch.cat([m.transpose(0, 1).flatten(1) for m in means], dim=1)
    std = latents.std(1)
    std[std == 0] = 1  # of channels that carry nothing
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=std.tolist())
    error = ((torch.cat(films) - torch.cat(decoded)) ** 2).mean()
    return 10 * torch.log10(4 / error).item()


def is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 4 and min(parameter.shape[0], parameter[0].numel()) >= 8 and "quant" not in name
