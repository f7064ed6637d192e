"""LoRA files in the formats that people bring, for wan21_1b's tiny transformer: name to (tensors, metadata)."""

from __future__ import annotations

import json
from typing import Any

import torch

from builder.tiny_checkpoints import SIZE_1B, lora_tensors

Tensors = dict[str, torch.Tensor]
File = tuple[Tensors, dict[str, str]]

WIDTH, RANK = 24, 4
TO_DIFFUSERS = {
    **{f"self_attn.{short}": f"attn1.to_{short}" for short in "qkv"},
    **{f"cross_attn.{short}": f"attn2.to_{short}" for short in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def plain(seed: int = 1, rank: int = RANK) -> Tensors:
    """As ai-toolkit writes it: `diffusion_model.blocks.N.self_attn.q.lora_A.weight`, …"""
    return {key: value.float() for key, value in lora_tensors(SIZE_1B, rank, seed).items()}


def renamed(tensors: Tensors, prefix: str, style: str = "wan", parts: dict[str, str] | None = None) -> Tensors:
    """Other spellings of the same tensors. `style`: wan, diffusers, or either with underscores."""
    made = {}
    for key, value in tensors.items():
        name = key.removeprefix("diffusion_model.")
        block, number, rest = name.split(".", 2)
        layer, _, part = rest.partition(".lora_")
        half = part[0]
        layer = TO_DIFFUSERS[layer] if "diffusers" in style else layer
        path = f"{block}.{number}.{layer}"
        if "_" in style:
            path = path.replace(".", "_")
        made[f"{prefix}{path}.{(parts or {'A': 'lora_A.weight', 'B': 'lora_B.weight'})[half]}"] = value
    return made


DOWN_UP = {"A": "lora_down.weight", "B": "lora_up.weight"}
DEFAULT = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}


def alphas(tensors: Tensors, value: float) -> Tensors:
    """An alpha beside every pair of factors."""
    ends = (".lora_down.weight", ".lora_A.weight")
    return {key.removesuffix(end) + ".alpha": torch.tensor(value) for end in ends for key in tensors if key.endswith(end)}


def header(**settings: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})}


def spellings() -> dict[str, File]:
    """The same LoRA in every spelling: each gives the frames of the first."""
    tensors = plain()
    return {
        "ai-toolkit": (tensors, {}),
        "diffusers": (renamed(tensors, "transformer.", "diffusers"), {}),
        "bare diffusers": (renamed(tensors, "", "diffusers"), {}),
        "bare wan": (renamed(tensors, ""), {}),
        "peft": (renamed(tensors, "base_model.model.", "diffusers"), {}),
        "peft, default": (renamed(tensors, "base_model.model.", "diffusers", DEFAULT), {}),
        "diffsynth": (renamed(tensors, "", "wan", DEFAULT), {}),
        "diffsynth, pipe.dit": (renamed(tensors, "pipe.dit.", "wan", DEFAULT), {}),
        "comfyui": (renamed(tensors, "model.diffusion_model."), {}),
        "onetrainer": (renamed(tensors, "transformer.", "diffusers", DOWN_UP), {}),
        "musubi": ((down := renamed(tensors, "lora_unet_", "wan_", DOWN_UP)) | alphas(down, RANK), {}),
        "musubi without alphas": (renamed(tensors, "lora_unet_", "wan_", DOWN_UP), {}),
        "videox-fun": (renamed(tensors, "lora_unet__", "wan_", DOWN_UP), {}),
        "kohya, diffusers' names": (renamed(tensors, "lora_unet_", "diffusers_", DOWN_UP), {}),
        "lora_transformer_": (renamed(tensors, "lora_transformer_", "diffusers_", DOWN_UP), {}),
        "alpha that is the rank": (tensors | alphas(tensors, RANK), {}),
        "header alpha that is the rank": (tensors, header(r=RANK, lora_alpha=RANK, lora_dropout=0.5)),
        "text encoder beside it": (tensors | {"lora_te_text_model.q.lora_down.weight": torch.ones(4, 4)}, {}),
    }


def strengths() -> dict[str, tuple[File, float]]:
    """Files that ask for another strength, and which."""
    tensors = plain()
    diffusers = renamed(tensors, "transformer.", "diffusers")
    return {
        "alphas": ((tensors | alphas(tensors, 1.0), {}), 1 / RANK),
        "header": ((diffusers, header(r=RANK, lora_alpha=1)), 1 / RANK),
        "header, over the rank": ((diffusers, header(r=RANK, lora_alpha=8)), 2.0),
        "header of ai-toolkit's names": ((tensors, header(r=RANK, lora_alpha=2)), 0.5),
        "header, rank-stabilised": ((diffusers, header(r=RANK, lora_alpha=1, use_rslora=True)), 0.5),
        "header without prefix": ((diffusers, {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 2})}), 0.5),
    }


def merged() -> dict[str, File]:
    """Files that an adapter cannot carry."""
    generator = torch.Generator().manual_seed(5)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 8

    block = "diffusion_model.blocks.0"
    q = f"{block}.self_attn.q"
    lokr = {f"{q}.lokr_w1": some(4, 6), f"{q}.lokr_w2": some(6, 4)}
    return {
        "LoKr": (lokr | {f"{q}.alpha": torch.tensor(1.0)}, {}),
        "LoKr, full rank in float16": (
            {key: value.half() for key, value in lokr.items()} | {f"{q}.alpha": torch.tensor(9999999999.0).half()},
            {},
        ),
        "LoKr, lycoris": ({key.replace(q, "lycoris_blocks_0_attn1_to_q"): value for key, value in lokr.items()}, {}),
        "LoKr, lora_unet": ({key.replace(q, "lora_unet_blocks_0_self_attn_q"): value for key, value in lokr.items()}, {}),
        "fullrank": ({f"{q}.lora_A.weight": some(WIDTH, WIDTH)}, {}),
        "differences": ({f"{q}.diff": some(WIDTH, WIDTH), f"{q}.diff_b": some(WIDTH), f"{block}.norm3.diff": some(WIDTH)}, {}),
        "lightx2v": (plain() | {f"{q}.diff_b": some(WIDTH), f"{block}.self_attn.norm_k.diff": some(WIDTH)}, {}),
        "bias": (plain() | {f"{q}.lora_B.bias": some(WIDTH)}, {}),
        "dora": (plain() | {f"{q}.magnitude": 1 + some(WIDTH).abs()}, {}),
        "modulation": ({f"{block}.modulation.diff": some(1, 6, WIDTH)}, {}),
        "modulation, lightx2v": ({f"{block}.diff_m": some(1, 6, WIDTH)}, {}),
        "outside the blocks": (
            plain()
            | {
                "diffusion_model.condition_embedder.time_proj.lora_A.weight": some(RANK, WIDTH),
                "diffusion_model.condition_embedder.time_proj.lora_B.weight": some(6 * WIDTH, RANK),
                "diffusion_model.patch_embedding.lora_A.weight": some(RANK, 16, 1, 2, 2),
                "diffusion_model.patch_embedding.lora_B.weight": some(WIDTH, RANK, 1, 1, 1),
            },
            {},
        ),
    }


def bad() -> dict[str, File]:
    """Files that are refused, before or while they are loaded."""
    tensors = plain()
    diffusers = renamed(tensors, "transformer.", "diffusers")
    key = next(iter(tensors))
    return {
        "use_dora": (diffusers, header(r=RANK, lora_alpha=1, use_dora=True)),
        "lora_bias": (diffusers, header(r=RANK, lora_alpha=1, lora_bias=True)),
        "unknown setting": (diffusers, header(r=RANK, shine=True)),
        "text for a number": (diffusers, header(r=RANK, lora_alpha="4")),
        "another rank": (diffusers, header(r=8, lora_alpha=4)),
        "regular expressions": (diffusers, header(r=RANK, lora_alpha=4, alpha_pattern={"(a+)+$": 1})),
        "a list": (diffusers, {"lora_adapter_metadata": "[]"}),
        "not JSON": (diffusers, {"lora_adapter_metadata": "{"}),
        "alphas twice": (tensors | alphas(tensors, 1.0), header(r=RANK, lora_alpha=1)),
        "half a pair": ({name: value for name, value in tensors.items() if name != key}, {}),
        "NaN": (tensors | {key: tensors[key] * torch.nan}, {}),
        "another width": ({f"diffusion_model.blocks.0.self_attn.q.lora_{h}.weight": torch.ones(7, 7) for h in "AB"}, {}),
        "LoHa": ({"diffusion_model.blocks.0.self_attn.q.hada_w1_a": torch.ones(4, 4)}, {}),
        "a difference beside factors": (tensors | {"diffusion_model.blocks.0.ffn.0.diff": torch.ones(48, WIDTH)}, {}),
        "scales of no rows": (tensors | {key.replace(".weight", ".scale_weight"): torch.ones(3)}, {}),
    }
