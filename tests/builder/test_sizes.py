"""The sizes in the documentation come from the real shapes."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from builder import sizes
from pipelines.catalog import MODELS
from pipelines.weights import STEM_OF

IMAGE_KEYS = {"image_dim": 1280, "added_kv_proj_dim": 5120}


def transformer(heads: int, ffn_dim: int, in_channels: int, out_channels: int = 16, **image: int) -> torch.nn.Module:
    blocks = 40 if heads == 40 else 30
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=128,
        ffn_dim=ffn_dim,
        num_layers=blocks,
        in_channels=in_channels,
        out_channels=out_channels,
        **image,
    )


def vae_22() -> torch.nn.Module:
    shape = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12}
    return AutoencoderKLWan(**shape, patch_size=2, is_residual=True, scale_factor_spatial=16)


def text_encoder() -> torch.nn.Module:
    shape = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return UMT5EncoderModel(UMT5Config(**shape))


def image_encoder() -> torch.nn.Module:
    shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    return CLIPVisionModel(CLIPVisionConfig(**shape, image_size=224, patch_size=14))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (text_encoder, sizes.TEXT_ENCODER),
        (image_encoder, sizes.IMAGE_ENCODER),
        (AutoencoderKLWan, sizes.VAE_21),
        (vae_22, sizes.VAE_22),
        (lambda: transformer(12, 8960, 16), sizes.TRANSFORMER_1B),
        (lambda: transformer(24, 14336, 48, 48), sizes.TRANSFORMER_5B),
        (lambda: transformer(40, 13824, 16), sizes.TRANSFORMER_14B),
        (lambda: transformer(40, 13824, 36), sizes.TRANSFORMER_14B_I2V_22),
        (lambda: transformer(40, 13824, 36, **IMAGE_KEYS), sizes.TRANSFORMER_14B_I2V_21),
    ],
)
def test_a_component_has_so_many_parameters(make: type[torch.nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == count


@pytest.mark.parametrize("model_id", MODELS)
def test_every_component_with_weights_is_counted(model_id: str) -> None:
    assert set(sizes.COMPONENTS[model_id]) == {part for part in MODELS[model_id].sources if part in STEM_OF}
