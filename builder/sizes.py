"""Sizes of the models' weights on the Hub: how much disk an image, a network volume or a container needs. No torch.

Nothing here is measured. A test counts the parameters again, from the real shapes. The bytes per number are those in the Hub's
listings; for a new repo, compare with `python -m builder.fetch_checkpoints --dry-run`. benchmarks/memory.py measures how much
memory of a GPU the weights need.
"""

from __future__ import annotations

from pipelines.catalog import MODELS, Family, ModelSpec, Source

TEXT_ENCODER = 5_680_910_336
IMAGE_ENCODER = 630_766_080
VAE_21 = 126_892_531
VAE_22 = 704_688_668
TRANSFORMERS: dict[tuple[Family, int], int] = {
    ("t2v", 1536): 1_418_996_800,
    ("t2v", 5120): 14_288_491_584,
    ("i2v", 5120): 16_394_878_784,
    ("toolkit_i2v", 5120): 14_288_901_184,
    ("toolkit_ti2v", 3072): 4_999_787_712,
}
"""Parameters of one transformer, by the model's family and hidden size."""

BF16, FP32 = 2, 4
"""Bytes per number."""


def parameters(spec: ModelSpec) -> dict[str, int]:
    """Return the number of parameters of each component that has weights."""
    transformer = TRANSFORMERS[spec.family, spec.hidden_size]
    counts = {
        "text_encoder": TEXT_ENCODER,
        "image_encoder": IMAGE_ENCODER,
        "vae": VAE_22 if spec.family == "toolkit_ti2v" else VAE_21,
        "transformer": transformer,
        "transformer_2": transformer,
    }
    return {part: count for part, count in counts.items() if part in spec.sources}


def bytes_per_number(part: str, source: Source) -> int:
    """Return 2 for ai-toolkit's bf16 transformers and all text encoders but those of Wan 2.1, 4 for everything else."""
    is_bf16 = source.repo.endswith("-bf16") or (part == "text_encoder" and "/Wan2.1-" not in source.repo)
    return BF16 if is_bf16 else FP32


def on_disk(model_id: str) -> int:
    """Return the bytes of a model's weights on the Hub."""
    spec = MODELS[model_id]
    return sum(count * bytes_per_number(part, spec.sources[part]) for part, count in parameters(spec).items())
