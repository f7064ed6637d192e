"""The tiny transformer, and how it is trained on the toy world: plain flow matching on latents of clips of many sizes."""

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
"""Height, width and frames of the clips. The one of `make run` comes three times."""
SMALL_SHARE = 0.5
"""The share of the time in which only small shapes are seen: a step of many small clips teaches more words than one of few."""
TOKENS_OF_A_BATCH = 2000
PIXELS_OF_AN_ENCODING = 250_000
FIRST_PIXELS = 1_200_000
"""The pixels of the clips of each shape that are drawn before its first batch."""
STEPS_BETWEEN_ENCODINGS = 8
SHIFT = 3.0
"""The flow shift of the checkpoints' scheduler; the timesteps of training are shifted alike."""
EMPTY_SHARE = 0.1


def new_transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=text.WIDTH,
        freq_dim=128,
        ffn_dim=320,
        num_layers=6,
    )
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
        self.mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        self.clips: dict[Shape, list[tuple[world.Clip, Tensor, Tensor]]] = {}

    @torch.no_grad()
    def add(self, shape: Shape) -> None:
        """Draw and encode some clips of this shape."""
        height, width, frames = shape
        number = max(1, PIXELS_OF_AN_ENCODING // (height * width * frames))
        clips = [self.sample(self.rng) for _ in range(number)]
        latents, conditions = self.encode(clips, shape)
        self.clips.setdefault(shape, []).extend(zip(clips, latents, conditions, strict=True))

    @torch.no_grad()
    def encode(self, clips: list[world.Clip], shape: Shape) -> tuple[Tensor, Tensor]:
        """Return the latents [n, 16, frames, height, width] of clips, and their conditions [n, 0 or 20, …]."""
        films = torch.stack([world.draw(clip, *shape) for clip in clips])
        latents = (self.vae.encode(films).latent_dist.mean - self.mean) / self.std
        return latents, torch.stack([self.condition(*both) for both in zip(films, latents, strict=True)])

    def batch(self, shape: Shape) -> tuple[list[world.Clip], Tensor, Tensor]:
        """Return clips of this shape, their latents and their conditions, as `encode` does."""
        height, width, frames = shape
        while len(self.clips.get(shape, ())) * height * width * frames < FIRST_PIXELS:
            self.add(shape)
        tokens = (height // 16) * (width // 16) * (frames // 4 + 1)
        chosen = self.rng.choices(self.clips[shape], k=max(2, TOKENS_OF_A_BATCH // tokens))
        clips, latents, conditions = zip(*chosen, strict=True)
        return list(clips), torch.stack(latents), torch.stack(conditions)

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

    def condition(self, texts: list[str], pad_share: float = 1.0) -> Tensor:
        """Set the bias of the cross-attention and return the embeddings. `pad_share`: how much of the pads' number counts."""
        hidden, bias = text.embed(self.tokenizer, self.encoder, texts)
        bias[..., -1] *= pad_share
        self.attention.bias = bias
        return hidden

    def loss(self, texts: list[str], latents: Tensor, conditions: Tensor, pad_share: float = 1.0) -> Tensor:
        """Return the flow-matching loss of the latents [n, 16, …] at random shifted timesteps."""
        hidden = self.condition(texts, pad_share)
        sigma = torch.rand(len(texts))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        flow = self.model(torch.cat([noisy, conditions], dim=1), sigma * 1000, hidden, return_dict=False)[0]
        loss: Tensor = ((flow - (noise - latents)) ** 2).mean()
        return loss

    def sample(
        self, texts: list[str], like: Tensor, conditions: Tensor, steps: int = 20, guidance: float = 4.0, seed: int = 0
    ) -> Tensor:
        """Return latents of the shape of `like`, made by Euler's method, one for each text."""
        latents = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        sigmas = torch.linspace(1, 0, steps + 1)
        return self.denoise(texts, latents, conditions, SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas), guidance)

    @torch.no_grad()
    def denoise(self, texts: list[str], latents: Tensor, conditions: Tensor, sigmas: Tensor, guidance: float) -> Tensor:
        """Return the latents after a step of Euler's method from each noise level to the next."""
        hidden = self.condition([*texts, *[""] * len(texts)])
        for now, then in itertools.pairwise(sigmas):
            noisy = torch.cat([latents, conditions], dim=1).repeat(2, 1, 1, 1, 1)
            wanted, unwanted = self.model(noisy, (now * 1000).expand(len(noisy)), hidden, return_dict=False)[0].chunk(2)
            latents = latents + (then - now) * (unwanted + guidance * (wanted - unwanted))
        return latents


def shapes_at(progress: float) -> tuple[Shape, ...]:
    """Return the shapes of this part of the training, from 0 to 1."""
    return SMALL_SHAPES if progress < SMALL_SHARE else SMALL_SHAPES + LARGE_SHAPES


def captions(clips: list[world.Clip], rng: random.Random) -> list[str]:
    return ["" if rng.random() < EMPTY_SHARE else caption(clip, rng) for clip in clips]


def is_matrix(name: str, parameter: Tensor) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2
