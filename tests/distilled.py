"""Distilled LoRAs for tiny models, with the keys of lightx2v's files, and what they add to each parameter.

Source of the keys: what LightX2V's tools/extract/lora_extractor.py writes. Large matrices are factors (`lora_down`, `lora_up`,
without an alpha); biases (`diff_b`), norms and small weights (`diff`) and modulations (`diff_m`) are differences.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from builder.tiny_checkpoints import IMAGE_DIM, TEXT_DIM, size_of
from pipelines.catalog import MODELS, DistilledLora

Tensors = dict[str, torch.Tensor]

RANK = 4
FREQUENCIES = 32


def distilled(
    model_id: str, seed: int, image_keys: bool = False, alpha: float | None = None, strength: float = 0.3
) -> tuple[Tensors, Tensors]:
    """(the file's tensors, what they add to the parameters of diffusers' transformer by their names).

    `image_keys`: with those of Wan 2.1 I2V. `alpha`: written beside every pair of factors.
    """
    size = size_of(MODELS[model_id])
    generator = torch.Generator().manual_seed(seed)
    file: Tensors = {}
    added: Tensors = {}

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * strength

    def linear(wan: str, diffusers: str, outputs: int, inputs: int) -> None:
        down, up = some(RANK, inputs) / inputs**0.5, some(outputs, RANK) / strength
        bias = some(outputs)
        file.update({f"{wan}.lora_down.weight": down, f"{wan}.lora_up.weight": up, f"{wan}.diff_b": bias})
        if alpha is not None:
            file[f"{wan}.alpha"] = torch.tensor(alpha)
        added.update({f"{diffusers}.weight": up @ down * ((alpha or RANK) / RANK), f"{diffusers}.bias": bias})

    def difference(wan: str, diffusers: str, *shape: int) -> None:
        file[wan] = added[diffusers] = some(*shape)

    def norm(wan: str, diffusers: str, width: int, has_bias: bool = False) -> None:
        difference(f"{wan}.diff", f"{diffusers}.weight", width)
        if has_bias:
            difference(f"{wan}.diff_b", f"{diffusers}.bias", width)

    width, embedder = size.dim, "condition_embedder"
    linear("text_embedding.0", f"{embedder}.text_embedder.linear_1", width, TEXT_DIM)
    linear("text_embedding.2", f"{embedder}.text_embedder.linear_2", width, width)
    linear("time_embedding.0", f"{embedder}.time_embedder.linear_1", width, FREQUENCIES)
    linear("time_embedding.2", f"{embedder}.time_embedder.linear_2", width, width)
    linear("time_projection.1", f"{embedder}.time_proj", 6 * width, width)
    difference("patch_embedding.diff", "patch_embedding.weight", width, size.in_channels, 1, 2, 2)
    difference("patch_embedding.diff_b", "patch_embedding.bias", width)
    linear("head.head", "proj_out", 4 * size.out_channels, width)
    difference("head.diff_m", "scale_shift_table", 1, 2, width)
    if image_keys:
        norm("img_emb.proj.0", f"{embedder}.image_embedder.norm1", IMAGE_DIM, has_bias=True)
        linear("img_emb.proj.1", f"{embedder}.image_embedder.ff.net.0.proj", IMAGE_DIM, IMAGE_DIM)
        linear("img_emb.proj.3", f"{embedder}.image_embedder.ff.net.2", width, IMAGE_DIM)
        norm("img_emb.proj.4", f"{embedder}.image_embedder.norm2", width, has_bias=True)
    for number in range(size.blocks):
        block = f"blocks.{number}"
        difference(f"{block}.diff_m", f"{block}.scale_shift_table", 1, 6, width)
        norm(f"{block}.norm3", f"{block}.norm2", width, has_bias=True)
        for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for short in "qkv":
                linear(f"{block}.{wan}.{short}", f"{block}.{diffusers}.to_{short}", width, width)
            linear(f"{block}.{wan}.o", f"{block}.{diffusers}.to_out.0", width, width)
            for short in "qk":
                norm(f"{block}.{wan}.norm_{short}", f"{block}.{diffusers}.norm_{short}", width)
        if image_keys:
            linear(f"{block}.cross_attn.k_img", f"{block}.attn2.add_k_proj", width, width)
            linear(f"{block}.cross_attn.v_img", f"{block}.attn2.add_v_proj", width, width)
            norm(f"{block}.cross_attn.norm_k_img", f"{block}.attn2.norm_added_k", width)
        linear(f"{block}.ffn.0", f"{block}.ffn.net.0.proj", size.ffn_dim, width)
        linear(f"{block}.ffn.2", f"{block}.ffn.net.2", width, size.ffn_dim)
    return {f"diffusion_model.{key}": value.contiguous() for key, value in file.items()}, added


def loras_of(model_id: str) -> tuple[DistilledLora, ...]:
    recipe = MODELS[model_id].draft
    assert recipe is not None
    return recipe.loras


def write_distilled(root: Path, model_id: str, alpha: float | None = None) -> dict[str, Tensors]:
    """Write the files of the model's recipe as `ORG/NAME/FILE` below `root`. Returns what each transformer gains.

    As the real ones do, a file of Wan 2.2 I2V's low side has the image keys of Wan 2.1, for which there is no place.
    """
    gained: dict[str, Tensors] = {}
    for seed, lora in enumerate(loras_of(model_id), 900):
        has_image_keys = bool(lora.without) or "image_encoder" in MODELS[model_id].sources
        tensors, added = distilled(model_id, seed, has_image_keys, alpha)
        file = root / lora.repo / lora.path
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
        gained["transformer_2" if lora.side == "low" else "transformer"] = added
    return gained
