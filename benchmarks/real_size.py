"""The models in their real size, from the published configs: on `meta`, for arithmetic; nothing is read or computed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from pipelines.catalog import MODELS, Family
from pipelines.offload import BLOCKS, bytes_of_tensor
from pipelines.trained import Quantization

_FFN_DIM = {1536: 8960, 3072: 14336, 5120: 13824}
"""By the hidden size."""

_OF_THE_FAMILY: dict[Family, dict[str, int]] = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "toolkit_i2v": {"in_channels": 36},
    "toolkit_ti2v": {"in_channels": 48, "out_channels": 48},
}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    spec.id: {
        "num_attention_heads": spec.hidden_size // 128,
        "ffn_dim": _FFN_DIM[spec.hidden_size],
        "num_layers": spec.num_blocks,
        **_OF_THE_FAMILY[spec.family],
    }
    for spec in MODELS.values()
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


def has_vae_22(model_id: str) -> bool:
    return MODELS[model_id].family == "toolkit_ti2v"


def vae(model_id: str) -> AutoencoderKLWan:
    return AutoencoderKLWan(**_VAE_22) if has_vae_22(model_id) else AutoencoderKLWan()


def latents_of(model_id: str, width: int, height: int, num_frames: int) -> tuple[int, ...]:
    """[1, z, T, H, W] of the VAE for a video in pixels and frames."""
    scale, channels = (16, 48) if has_vae_22(model_id) else (8, 16)
    return (1, channels, (num_frames - 1) // 4 + 1, height // scale, width // scale)


def bytes_of_parts(model_id: str, quantization: Quantization | None = None) -> dict[str, int]:
    """What each component's weights take in bf16, or as codes where they are quantized."""
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
    sizes = {name: sum(_bytes(name, part, quantization).values()) for name, part in parts.items()}
    return sizes | ({"transformer_2": sizes["transformer"]} if MODELS[model_id].moe else {})


def bytes_outside_blocks(model_id: str, quantization: Quantization | None = None) -> int:
    """The same of what lies in none of a transformer's blocks."""
    with torch.device("meta"):
        sizes = _bytes("transformer", transformer(model_id, num_layers=1), quantization)
    return sum(size for key, size in sizes.items() if not key.startswith(BLOCKS))


def _bytes(part: str, module: torch.nn.Module, quantization: Quantization | None) -> dict[str, int]:
    return {key: bytes_of_tensor(part, key, value.shape, 2, quantization) for key, value in module.named_parameters()}
