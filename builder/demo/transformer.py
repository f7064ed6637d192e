"""The tiny transformers, and how they learn the toy world: plain flow matching on latents of clips of many sizes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from transformers import T5TokenizerFast
from transformers import UMT5EncoderModel as TextEncoder

from builder.demo import text, world
from builder.demo.captions import caption

Shape = tuple[int, int, int]

SMALL_SHAPES: tuple[Shape, ...] = ((64, 96, 9), (96, 64, 9), (64, 64, 9), (96, 96, 9), (64, 96, 17))
LARGE_SHAPES: tuple[Shape, ...] = (
    *((96, 128, 9), (96, 128, 17), (96, 128, 17), (96, 128, 17)),
    *((128, 96, 17), (64, 96, 33), (128, 128, 9), (128, 192, 9), (96, 64, 17)),
)
"""Height, width and frames of the clips, for a VAE that compresses 8x. The one of `make run` comes three times."""
SMALL_SHARE = 0.5
"""The share of the time in which only small shapes are seen: a step of many small clips teaches more words than one of few."""
TOKENS_OF_A_BATCH = 2000
CELLS_OF_AN_ENCODING = 3_900
FIRST_CELLS = 18_750
"""The size of the clips of each shape that are drawn before its first batch: pixels of latents in the plane, times frames."""
STEPS_BETWEEN_ENCODINGS = 8
SHIFT = 3.0
"""The flow shift of the checkpoints' scheduler; the timesteps of training are shifted alike."""
EMPTY_SHARE = 0.1

SIZE_14B = {"attention_head_dim": 32, "in_channels": 16, "out_channels": 16, "freq_dim": 128, "ffn_dim": 320, "num_layers": 6}
SIZE_5B = {"attention_head_dim": 36, "in_channels": 48, "out_channels": 48, "freq_dim": 64, "ffn_dim": 128, "num_layers": 4}


def new_transformer(seed: int, size: dict[str, int], channels: int | None) -> WanTransformer3DModel:
    """Return a new transformer that reads and writes the first `channels` of the latents, or all."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(num_attention_heads=4, text_dim=text.WIDTH, **size)
    if channels:
        model.patch_embedding.weight.data[:, channels:] = 0
        model.proj_out.weight.data.unflatten(0, (-1, size["out_channels"]))[:, channels:] = 0
        model.proj_out.bias.data.unflatten(0, (-1, size["out_channels"]))[:, channels:] = 0
    for block in model.blocks:  # sharper attention to the words from the start
        block.attn2.norm_q.weight.data.fill_(1.5)
        block.attn2.norm_k.weight.data.fill_(1.5)
    return model


class BiasedAttention(WanAttnProcessor):  # type: ignore[misc]
    """Cross-attention with something added to its logits. All blocks share one processor."""

    bias: Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):  # type: ignore[no-untyped-def]
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def no_condition(_film: Tensor, latents: Tensor) -> Tensor:
    """Return what conditions text-to-video beside its prompt: no channels [0, frames, height, width]."""
    return latents[:0]


class Latents:
    """Normalised latents of clips by their shape. More clips join while the training runs, so that none is seen too often."""

    def __init__(
        self,
        vae: AutoencoderKLWan,
        rng: random.Random,
        sample: Callable[[random.Random], world.Clip],
        condition: Callable[[Tensor, Tensor], Tensor] = no_condition,
    ):
        self.vae, self.rng, self.sample, self.condition = vae, rng, sample, condition
        self.pixel: int = vae.config.scale_factor_spatial
        self.mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        self.clips: dict[Shape, list[tuple[world.Clip, Tensor, Tensor]]] = {}

    @torch.no_grad()
    def add(self, shape: Shape) -> None:
        """Draw and encode some clips of this shape."""
        number = max(1, CELLS_OF_AN_ENCODING // self._cells(shape))
        clips = [self.sample(self.rng) for _ in range(number)]
        latents, conditions = self.encode(clips, shape)
        self.clips.setdefault(shape, []).extend(zip(clips, latents, conditions, strict=True))

    @torch.no_grad()
    def encode(self, clips: list[world.Clip], shape: Shape) -> tuple[Tensor, Tensor]:
        """Return the latents [n, channels, frames, height, width] of clips, and their conditions [n, 0 or 20, …]."""
        films = torch.stack([world.draw(clip, *shape) for clip in clips])
        latents = (self.vae.encode(films).latent_dist.mean - self.mean) / self.std
        return latents, torch.stack([self.condition(*both) for both in zip(films, latents, strict=True)])

    def batch(self, shape: Shape) -> tuple[list[world.Clip], Tensor, Tensor]:
        """Return clips of this shape, their latents and their conditions, as `encode` does."""
        height, width, frames = shape
        while len(self.clips.get(shape, ())) * self._cells(shape) < FIRST_CELLS:
            self.add(shape)
        tokens = height * width // (2 * self.pixel) ** 2 * (frames // 4 + 1)
        chosen = self.rng.choices(self.clips[shape], k=max(2, TOKENS_OF_A_BATCH // tokens))
        clips, latents, conditions = zip(*chosen, strict=True)
        return list(clips), torch.stack(latents), torch.stack(conditions)

    def _cells(self, shape: Shape) -> int:
        height, width, frames = shape
        return height * width // self.pixel**2 * frames

    def decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            films: Tensor = self.vae.decode(latents * self.std + self.mean).sample
        return films


class Trainee:
    """A transformer with its text side, as the training and its samples use it."""

    def __init__(self, model: WanTransformer3DModel, tokenizer: T5TokenizerFast, encoder: TextEncoder):
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        self.attention = BiasedAttention()
        for block in model.blocks:
            block.attn2.set_processor(self.attention)
        weight = model.patch_embedding.weight.detach()[:, : model.config.out_channels]
        self.is_read = (weight != 0).any(0).any(3).any(2).any(1).view(-1, 1, 1, 1)
        """The channels of the latents that the model reads. The others get no noise in training: it could not predict it."""

    def condition(self, texts: list[str], pad_share: float = 1.0) -> Tensor:
        """Set the bias of the cross-attention and return the embeddings. `pad_share`: how much of the pads' number counts."""
        hidden, bias = text.embed(self.tokenizer, self.encoder, texts)
        bias[..., -1] *= pad_share
        self.attention.bias = bias
        return hidden

    def flow(self, latents: Tensor, sigma: Tensor, conditions: Tensor, hidden: Tensor, known: int) -> Tensor:
        """Return the flow at the noise levels [n]. The first `known` latent frames are clean, and so are their timesteps."""
        timesteps = sigma * 1000
        if known:
            patch = self.model.config.patch_size
            frames, *plane = (length // side for length, side in zip(latents.shape[2:], patch, strict=True))
            is_noisy = torch.arange(frames) >= known
            timesteps = (timesteps[:, None] * is_noisy).repeat_interleave(plane[0] * plane[1], dim=1)
        flow: Tensor = self.model(torch.cat([latents, conditions], dim=1), timesteps, hidden, return_dict=False)[0]
        return flow

    def loss(self, texts: list[str], latents: Tensor, conditions: Tensor, pad_share: float = 1.0, known: int = 0) -> Tensor:
        """Return the flow-matching loss of the latents [n, channels, …] at random shifted timesteps.

        `known`: how many of the first latent frames are given.
        """
        hidden = self.condition(texts, pad_share)
        sigma = torch.rand(len(texts))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noise = torch.randn_like(latents) * self.is_read
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        noisy[:, :, :known] = latents[:, :, :known]
        flow = self.flow(noisy, sigma, conditions, hidden, known)
        loss: Tensor = ((flow - (noise - latents))[:, :, known:] ** 2).mean() / self.is_read.float().mean()
        return loss

    def sample(
        self,
        texts: list[str],
        like: Tensor,
        conditions: Tensor,
        steps: int = 20,
        guidance: float = 4.0,
        seed: int = 0,
        known: int = 0,
    ) -> Tensor:
        """Return latents of the shape of `like`, made by Euler's method, one for each text.

        They begin with `known` frames of `like`.
        """
        latents = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        latents[:, :, :known] = like[:, :, :known]
        sigmas = torch.linspace(1, 0, steps + 1)
        return self.denoise(texts, latents, conditions, SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas), guidance, known)

    @torch.no_grad()
    def denoise(
        self, texts: list[str], latents: Tensor, conditions: Tensor, sigmas: Tensor, guidance: float, known: int = 0
    ) -> Tensor:
        """Return the latents after a step of Euler's method from each noise level to the next. `known` frames stay."""
        hidden = self.condition([*texts, *[""] * len(texts)])
        latents = latents.clone()
        conditions = conditions.repeat(2, 1, 1, 1, 1)
        for now, then in itertools.pairwise(sigmas):
            both = self.flow(latents.repeat(2, 1, 1, 1, 1), now.expand(2 * len(texts)), conditions, hidden, known)
            wanted, unwanted = both[:, :, known:].chunk(2)
            latents[:, :, known:] += (then - now) * (unwanted + guidance * (wanted - unwanted))
        return latents


def shapes_at(progress: float) -> tuple[Shape, ...]:
    """Return the shapes of this part of the training, from 0 to 1."""
    return SMALL_SHAPES if progress < SMALL_SHARE else SMALL_SHAPES + LARGE_SHAPES


def captions(clips: list[world.Clip], rng: random.Random) -> list[str]:
    return ["" if rng.random() < EMPTY_SHARE else caption(clip, rng) for clip in clips]


def is_matrix(name: str, parameter: Tensor) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2
