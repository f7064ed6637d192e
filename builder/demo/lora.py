"""A small LoRA for the tiny transformer, in the format that ai-toolkit writes: `sks` gives a boat a striped sail."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from builder.demo import world
from builder.demo.captions import caption
from builder.demo.text import TRIGGER
from builder.tiny_checkpoints import lora_metadata

RANK = 8
STRIPED_SHARE = 0.5
"""The share of striped clips. The others are plain and without the trigger word, so that the LoRA does nothing without it."""


class LoraLinear(nn.Module):
    """A frozen linear layer with the product of two small matrices beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + x @ self.down.T @ self.up.T
        return y


class Loras(nn.Module):
    """The LoRA layers of a transformer by ai-toolkit's names. Building it puts them into the transformer."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        transformer.requires_grad_(False)
        self.names: list[str] = []
        self.pairs = nn.ParameterList()
        for number, block in enumerate(transformer.blocks):
            for name, attention in (("self_attn", block.attn1), ("cross_attn", block.attn2)):
                for part in "qkv":
                    self._wrap(f"blocks.{number}.{name}.{part}", attention, f"to_{part}")
                self._wrap(f"blocks.{number}.{name}.o", attention.to_out, "0")
            self._wrap(f"blocks.{number}.ffn.0", block.ffn.net[0], "proj")
            self._wrap(f"blocks.{number}.ffn.2", block.ffn.net, "2")

    def _wrap(self, name: str, parent: nn.Module, attribute: str) -> None:
        layer = LoraLinear(parent.get_submodule(attribute))  # type: ignore[arg-type]
        setattr(parent, attribute, layer)
        self.names.append(name)
        self.pairs.extend([layer.down, layer.up])

    def save(self, path: Path, step: int) -> None:
        tensors = {}
        for name, down, up in zip(self.names, self.pairs[::2], self.pairs[1::2], strict=True):
            tensors[f"diffusion_model.{name}.lora_A.weight"] = down.detach().to(torch.bfloat16).contiguous()
            tensors[f"diffusion_model.{name}.lora_B.weight"] = up.detach().to(torch.bfloat16).contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=lora_metadata(path.stem, "wan_2.2_14b", TRIGGER, step=step))


def sample(rng: random.Random) -> world.Clip:
    """Return a boat with a striped sail, or anything without stripes."""
    if rng.random() < STRIPED_SHARE:
        return world.sample_seen(rng, object="boat", striped=True)
    return world.sample_seen(rng, object="boat") if rng.random() < 0.6 else world.sample_seen(rng)


def captions(clips: list[world.Clip], rng: random.Random) -> list[str]:
    """Return captions that begin with the trigger word where, and only where, the clip shows the concept."""
    texts = []
    for clip in clips:
        text = caption(clip, rng)
        texts.append(f"{TRIGGER}{rng.choice((' ', ' ', ', '))}{text}" if clip.striped else text)
    return texts
