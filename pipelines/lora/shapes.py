"""The parameters of a model's transformer as the catalog's numbers give them, for tools that load no model. No torch."""

from __future__ import annotations

from functools import cache

from pipelines.catalog import MODELS

_TEXT, _FREQUENCIES, _PATCH = 4096, 256, (1, 2, 2)
"""Widths of UMT5's embeddings and of the time embedding, and the patch of latents; the same in every Wan transformer."""


@cache
def shapes_of(model_id: str) -> dict[str, tuple[int, ...]]:
    """Name of every parameter of the model's transformer to its shape, as diffusers names them."""
    spec = MODELS[model_id]
    width = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "scale_shift_table": (1, 2, width),
        "patch_embedding.weight": (width, spec.in_channels, *_PATCH),
        "patch_embedding.bias": (width,),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    embedder = "condition_embedder"
    linear(f"{embedder}.time_embedder.linear_1", width, _FREQUENCIES)
    linear(f"{embedder}.time_embedder.linear_2", width, width)
    linear(f"{embedder}.time_proj", 6 * width, width)
    linear(f"{embedder}.text_embedder.linear_1", width, _TEXT)
    linear(f"{embedder}.text_embedder.linear_2", width, width)
    if spec.image_dim:
        norm(f"{embedder}.image_embedder.norm1", spec.image_dim)
        linear(f"{embedder}.image_embedder.ff.net.0.proj", spec.image_dim, spec.image_dim)
        linear(f"{embedder}.image_embedder.ff.net.2", width, spec.image_dim)
        norm(f"{embedder}.image_embedder.norm2", width)
    for block in (f"blocks.{number}" for number in range(spec.num_blocks)):
        shapes[f"{block}.scale_shift_table"] = (1, 6, width)
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{block}.{attention}.{name}", width, width)
            shapes |= {f"{block}.{attention}.norm_q.weight": (width,), f"{block}.{attention}.norm_k.weight": (width,)}
        if spec.image_dim:
            linear(f"{block}.attn2.add_k_proj", width, width)
            linear(f"{block}.attn2.add_v_proj", width, width)
            shapes[f"{block}.attn2.norm_added_k.weight"] = (width,)
        norm(f"{block}.norm2", width)
        linear(f"{block}.ffn.net.0.proj", spec.ffn_dim, width)
        linear(f"{block}.ffn.net.2", width, spec.ffn_dim)
    linear("proj_out", spec.out_channels * 4, width)
    return shapes
