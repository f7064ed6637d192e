"""Write checkpoints and LoRAs with random weights, in the real layout, small enough for the CPU of a laptop.

    python builder/tiny_checkpoints.py ROOT

The result is `ROOT/ORG/NAME` for every Hub repo that the models of pipelines/catalog.py read, and `ROOT/loras` with LoRAs in
ai-toolkit's format. The folders, file names, configs and tensor names are those of the real repos; only the widths are small,
so that the real loading code runs on them. The weights come from fixed seeds: every run writes the same files.

The sizes keep the relations that matter: Wan 2.1 and 2.2 14B share a shape, 1.3B and 5B have shapes of their own, Wan 2.1
I2V has image keys, and the 5B VAE has its own compression (16x, patched). The transformers in the base repo of 14B T2V
differ from those in the ai-toolkit repo, so that a test fails when the wrong ones are loaded.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, T5TokenizerFast, UMT5Config
from transformers import UMT5EncoderModel as TextEncoder

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python builder/tiny_checkpoints.py`
from pipelines.catalog import MODELS, ModelSpec

TEXT_DIM = 32
IMAGE_DIM = 32
HEAD_DIM = 12  # RoPE splits it into 4 (time) + 4 (height) + 4 (width)

T2V_BASE = MODELS["wan22_14b_t2v"].sources["vae"].repo
T2V_1B = MODELS["wan21_1b"].sources["vae"].repo


@dataclass(frozen=True)
class Size:
    """The shapes of one transformer."""

    heads: int
    ffn_dim: int
    blocks: int
    in_channels: int = 16
    out_channels: int = 16
    image_keys: bool = False

    @property
    def dim(self) -> int:
        return self.heads * HEAD_DIM


SIZE_1B = Size(heads=2, ffn_dim=48, blocks=2)
SIZE_5B = Size(heads=3, ffn_dim=64, blocks=2, in_channels=48, out_channels=48)
SIZE_14B = Size(heads=4, ffn_dim=80, blocks=3)

_SIZE_OF = {1536: SIZE_1B, 3072: SIZE_5B, 5120: SIZE_14B}
"""By the real hidden size."""

_SEED_OF = {
    "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16": 10,
    "ai-toolkit/Wan2.2-I2V-A14B-Diffusers-bf16": 20,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 30,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": 40,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 50,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 60,
    T2V_1B: 70,
}
"""Seeds of the first transformers. A repo that is not listed gets a seed from its name."""


def size_of(spec: ModelSpec) -> Size:
    """Return the tiny shapes of the model's transformers."""
    size = _SIZE_OF[spec.hidden_size]
    if spec.family in ("i2v", "toolkit_i2v"):  # the latents of the first frame and its mask come in 20 more channels
        return replace(size, in_channels=36, image_keys="image_encoder" in spec.sources)
    return size


def transformer(size: Size, seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=HEAD_DIM,
        in_channels=size.in_channels,
        out_channels=size.out_channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=size.ffn_dim,
        num_layers=size.blocks,
        image_dim=IMAGE_DIM if size.image_keys else None,
        added_kv_proj_dim=size.dim if size.image_keys else None,
    )
    return liven(model, seed)


def vae_21(seed: int) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    return liven(AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1), seed)


LAYOUT_OF_VAE_22 = {
    "z_dim": 48,
    "num_res_blocks": 1,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
}
"""What the VAE of 5B has beside its widths: 16x in space through 2x2 patches, 48 latent channels, residual blocks."""


def vae_22(seed: int) -> AutoencoderKLWan:
    """Return the VAE of 5B."""
    torch.manual_seed(seed)
    model = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        **LAYOUT_OF_VAE_22,
        latents_mean=[round(0.1 * ((i % 5) - 2), 2) for i in range(48)],
        latents_std=[round(0.8 + 0.05 * (i % 7), 2) for i in range(48)],
    )
    return liven(model, seed)


def liven(model: torch.nn.Module, seed: int) -> Any:
    """Draw the weights again, so that every input changes the output.

    New modules have zero biases and, in places, near-zero gates: a swapped prompt or a missing LoRA would change the frames by
    less than one grey level, and a test could not see it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "scale_shift_table" not in name and "gamma" not in name:
            fan_in = parameter[0].numel()
            parameter.data = noise * (1.2 / fan_in**0.5)
        elif "gamma" in name or name.endswith(("norm_q.weight", "norm_k.weight")):
            parameter.data = 1.0 + 0.1 * noise
        else:
            parameter.data = 0.1 * noise
    return model.eval().requires_grad_(False)


def text_encoder(seed: int) -> TextEncoder:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(vocabulary()), d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = TextEncoder(config).eval()
    model.shared.weight.data.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(seed))
    return model


def vocabulary() -> list[tuple[str, float]]:
    """Return unigram pieces: the special tokens, printable ASCII, and single bytes for everything else."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = ["▁", *(c for c in string.printable if c.isprintable() and c != " ")]
    return [(piece, 0.0) for piece in [*special, *(f"<0x{b:02X}>" for b in range(256)), *letters]]


def tokenizer() -> T5TokenizerFast:
    core = Tokenizer(models.Unigram(vocabulary(), unk_id=2, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return T5TokenizerFast(
        tokenizer_object=core, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def image_encoder(seed: int) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config).eval()


def image_processor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def scheduler(flow_shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
    )


def write_index(folder: Path, class_name: str, **config: Any) -> None:
    """Write model_index.json for the parts in the folder, as `DiffusionPipeline.save_pretrained` does."""
    library = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.35.0.dev0"}
    index |= {name: library[name] for name in library if (folder / name).is_dir()}
    (folder / "model_index.json").write_text(json.dumps(index | config, indent=2) + "\n")


def write_checkpoints(root: Path, seed: int = 0) -> None:
    """Write every repo of the catalog below `root`. Another `seed` gives other weights of the same shapes."""
    shared = {
        "text_encoder": text_encoder(seed + 1),
        "tokenizer": tokenizer(),
        "image_encoder": image_encoder(seed + 4),
        "image_processor": image_processor(),
    }
    vae, vae_5b = vae_21(seed + 2), vae_22(seed + 3)
    for spec in MODELS.values():
        is_5b = spec.family == "toolkit_ti2v"
        for part, source in spec.sources.items():
            if part in spec.transformers:
                first = _SEED_OF.get(source.repo) or zlib.crc32(source.repo.encode())
                made = transformer(size_of(spec), seed + first + spec.transformers.index(part))
            elif part == "scheduler":
                made = scheduler(5.0 if "720P" in source.repo else 3.0)
            else:
                made = (vae_5b if is_5b else vae) if part == "vae" else shared[part]
            made.save_pretrained(root / source.repo / source.subfolder)
        base = root / spec.sources["vae"].repo
        if spec.id == "wan22_14b_t2v":  # in the real repo too, in another precision; the worker must not read these
            for number, part in enumerate(spec.transformers):
                transformer(SIZE_14B, seed + 90 + number).save_pretrained(base / part)
            write_index(base, "WanPipeline", boundary_ratio=0.875)
        elif is_5b:  # in the real repo too; the worker reads neither, but plain diffusers does
            scheduler(5.0).save_pretrained(base / "scheduler")
            write_index(base, "WanPipeline", boundary_ratio=None, expand_timesteps=True, transformer_2=[None, None])
        elif not spec.needs_toolkit:
            write_index(base, "WanImageToVideoPipeline" if spec.family == "i2v" else "WanPipeline")


def lora_tensors(size: Size, rank: int, seed: int, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the tensors of an ai-toolkit LoRA: `lora_A` [rank, in] and `lora_B` [out, rank] of every linear layer, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    dim, ffn = size.dim, size.ffn_dim
    linears = {f"{attn}.{p}": (dim, dim) for attn in ("self_attn", "cross_attn") for p in "qkvo"}
    linears |= {"ffn.0": (dim, ffn), "ffn.2": (ffn, dim)}
    if size.image_keys:
        linears |= {"cross_attn.k_img": (dim, dim), "cross_attn.v_img": (dim, dim)}
    tensors = {}
    for block in range(size.blocks):
        for name, (width_in, width_out) in linears.items():
            key = f"diffusion_model.blocks.{block}.{name}"
            down = torch.randn(rank, width_in, generator=generator) / width_in**0.5
            up = torch.randn(width_out, rank, generator=generator) * (strength / rank**0.5)
            tensors[f"{key}.lora_A.weight"] = down.to(torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = up.to(torch.bfloat16)
    return tensors


def lora_metadata(
    name: str, base_model: str, trigger_word: str = "", version: str = "0.9.2", step: int = 1000
) -> dict[str, str]:
    """Return the metadata that ai-toolkit writes into a LoRA's header, without the parts that nothing reads."""
    metadata = {
        "format": "pt",
        "name": name,
        "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": version}),
        "ss_base_model_version": base_model,
        "ss_output_name": name,
        "training_info": json.dumps({"step": step, "epoch": 1}),
    }
    if trigger_word:
        metadata["ss_tag_frequency"] = json.dumps({f"1_{trigger_word}": {trigger_word: 1}})
    return metadata


def write_lora(path: Path, size: Size, rank: int, seed: int, base_model: str, **metadata: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(size, rank, seed), path, metadata=lora_metadata(path.stem, base_model, **metadata))


def write_loras(folder: Path) -> None:
    """Write LoRAs of every shape, single and as pairs for two transformers, in several ranks."""
    for rank in (4, 16, 64):
        write_lora(folder / f"wan21_1b/rank{rank}.safetensors", SIZE_1B, rank, rank, "wan_2.1", trigger_word="sks")
    i2v_21, i2v_22 = size_of(MODELS["wan21_i2v_14b"]), size_of(MODELS["wan22_14b_i2v"])
    for rank in (8, 32):
        write_lora(folder / f"wan21_14b/rank{rank}.safetensors", SIZE_14B, rank, 100 + rank, "wan_2.1")
        write_lora(folder / f"wan21_i2v/rank{rank}.safetensors", i2v_21, rank, 200 + rank, "wan_2.1")
        write_lora(folder / f"wan22_5b/rank{rank}.safetensors", SIZE_5B, rank, 300 + rank, "wan_2.2_5b")
    for job, size, ranks, seed in (
        ("striped_sail", SIZE_14B, (8, 8), 390),  # what test_input.json names
        ("wan22_14b_t2v", SIZE_14B, (16, 16), 400),
        ("wan22_14b_t2v_mixed", SIZE_14B, (4, 32), 410),
        ("wan22_14b_i2v", i2v_22, (16, 16), 420),
        ("wan22_14b_i2v_mixed", i2v_22, (64, 8), 430),
    ):
        for side, rank in zip(("high", "low"), ranks, strict=True):
            path = folder / job / f"{job}_{side}_noise.safetensors"
            write_lora(path, size, rank, seed + (side == "low"), "wan_2.2_14b", trigger_word="sks")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.tiny_checkpoints", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder to write ROOT/ORG/NAME and ROOT/loras into")
    root = parser.parse_args().root
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    write_checkpoints(root)
    write_loras(root / "loras")
    megabytes = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / 1e6
    print(f"tiny checkpoints and LoRAs in {root}: {megabytes:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
