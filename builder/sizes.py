"""How large the models' weights are on the Hub: for the disk of an image, a network volume or a container. No torch.

Nothing here is measured. A test counts the parameters again, from the real shapes. How many bytes a number has on the Hub is
what the Hub's listings say or, for repos of ai-toolkit, their names; `python -m builder.fetch_checkpoints --dry-run` asks it.
What the weights take of a GPU is in benchmarks/memory.py.
"""

from __future__ import annotations

TEXT_ENCODER = 5_680_910_336
IMAGE_ENCODER = 630_766_080
VAE_21 = 126_892_531
VAE_22 = 704_688_668
TRANSFORMER_1B = 1_418_996_800
TRANSFORMER_5B = 4_999_787_712
TRANSFORMER_14B = 14_288_491_584
TRANSFORMER_14B_I2V_22 = 14_288_901_184
TRANSFORMER_14B_I2V_21 = 16_394_878_784

BF16, FP32 = 2, 4
"""Bytes per number."""

_IMAGE = {"image_encoder": (IMAGE_ENCODER, FP32)}

COMPONENTS: dict[str, dict[str, tuple[int, int]]] = {
    "wan22_14b_i2v": {
        "text_encoder": (TEXT_ENCODER, BF16),
        "vae": (VAE_21, FP32),
        "transformer": (TRANSFORMER_14B_I2V_22, BF16),
        "transformer_2": (TRANSFORMER_14B_I2V_22, BF16),
    },
    "wan22_14b_t2v": {
        "text_encoder": (TEXT_ENCODER, BF16),
        "vae": (VAE_21, FP32),
        "transformer": (TRANSFORMER_14B, BF16),
        "transformer_2": (TRANSFORMER_14B, BF16),
    },
    "wan22_5b": {"text_encoder": (TEXT_ENCODER, BF16), "vae": (VAE_22, FP32), "transformer": (TRANSFORMER_5B, FP32)},
    "wan21_i2v_14b": {"transformer": (TRANSFORMER_14B_I2V_21, FP32), **_IMAGE},
    "wan21_i2v_14b480p": {"transformer": (TRANSFORMER_14B_I2V_21, FP32), **_IMAGE},
    "wan21_14b": {"transformer": (TRANSFORMER_14B, FP32)},
    "wan21_1b": {"transformer": (TRANSFORMER_1B, FP32)},
}
"""Model id to component to (parameters, bytes per number on the Hub)."""

for _id in ("wan21_i2v_14b", "wan21_i2v_14b480p", "wan21_14b", "wan21_1b"):
    COMPONENTS[_id] |= {"text_encoder": (TEXT_ENCODER, FP32), "vae": (VAE_21, FP32)}


def on_disk(model_id: str) -> int:
    """Bytes of the weights as they are on the Hub."""
    return sum(count * size for count, size in COMPONENTS[model_id].values())
