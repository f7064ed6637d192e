"""The models in their real size, from the published configs: on `meta`, for arithmetic; nothing is read or computed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_IMAGE_21 = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "wan22_14b_i2v": _14B | {"in_channels": 36},
    "wan22_14b_t2v": _14B,
    "wan22_5b": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    "wan21_i2v_14b": _14B | _IMAGE_21,
    "wan21_i2v_14b480p": _14B | _IMAGE_21,
    "wan21_14b": _14B,
    "wan21_1b": _1B,
}

_VAE_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def transformer(model_id: str, **changes: Any) -> WanTransformer3DModel:
    """`changes`: such as `num_layers`, where one block is as good as all."""
    return WanTransformer3DModel(**TRANSFORMERS[model_id] | changes)


def vae(model_id: str) -> AutoencoderKLWan:
    return AutoencoderKLWan(**_VAE_22) if model_id == "wan22_5b" else AutoencoderKLWan()


def latents_of(model_id: str, width: int, height: int, num_frames: int) -> tuple[int, ...]:
    """[1, z, T, H, W] of the VAE for a video in pixels and frames."""
    scale, channels = (16, 48) if model_id == "wan22_5b" else (8, 16)
    return (1, channels, (num_frames - 1) // 4 + 1, height // scale, width // scale)


def bytes_of_parts(model_id: str) -> dict[str, int]:
    """What each component's weights take in bf16."""
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "text_encoder": UMT5EncoderModel(
                UMT5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, vocab_size=256384)
            ),
            "vae": vae(model_id),
            "transformer": transformer(model_id),
        }
        if "image_dim" in TRANSFORMERS[model_id]:
            shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
            parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**shape, patch_size=14, image_size=224))
    sizes = {name: 2 * sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    return sizes | ({"transformer_2": sizes["transformer"]} if model_id.startswith("wan22_14b") else {})
