"""What another LoRA costs on a warm worker, beside what plain diffusers use costs: a fresh pipeline.

    python -m benchmarks.switch                          tiny models, on a CPU
    python -m benchmarks.switch --size 1.3B              random weights of the real size, written to a temp folder
    python -m benchmarks.switch --size 14B --repeat 2    on a GPU; --blocks for fewer blocks, where all do not fit

Prints a table row by row, and writes JSON with the device and versions to benchmarks/results/. Each figure is the median of
several switches between two LoRAs of different weights, measured in one run with the fresh loads.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from benchmarks import real_size, report
from benchmarks.report import median
from builder import tiny_checkpoints
from pipelines import Adapter, WanModel, load_pipeline
from pipelines.lora.file import LoraFile

SIZES = {"1.3B": (12, 8960, 30), "14B": (40, 13824, 40)}
"""Attention heads of width 128, ffn_dim, blocks: the published configs."""


def main() -> int:
    parser = arguments("python -m benchmarks.switch", __doc__, repeat=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 32, 128])
    options = parser.parse_args()
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, options.ranks, options.repeat))
    return 0


def arguments(prog: str, description: str | None, repeat: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--blocks", type=int, help="number of transformer blocks, where all of them do not fit")
    parser.add_argument("--repeat", type=int, default=repeat)
    return parser


def in_a_folder(measure: Callable[[Path], None]) -> None:
    """Measure in a temporary folder, without the libraries' progress bars."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


def write_model(root: Path, size: str, blocks: int | None) -> tiny_checkpoints.Size:
    """Tiny checkpoints in `root`, with a transformer of this size for wan21_1b."""
    tiny_checkpoints.write_checkpoints(root)
    if size not in SIZES:
        return tiny_checkpoints.SIZE_1B
    return write_real_size(root / tiny_checkpoints.T2V_1B / "transformer", size, blocks)


def measure(root: Path, size: str, blocks: int | None, ranks: list[int], repeat: int) -> None:
    device = report.device()
    shape = write_model(root, size, blocks)
    fresh = median(repeat, lambda: plain_diffusers(root, device))
    gc.collect()
    model = load_pipeline("wan21_1b", root, device, dtype=torch.bfloat16)
    gigabytes = round(sum(p.nbytes for p in model._pipe.transformer.parameters()) / 1e9, 2)
    size = f"{size}-{shape.blocks}-blocks"
    rows = report.Rows(f"switch-{size}", size=size, transformer_gigabytes=gigabytes, fresh_pipeline_seconds=round(fresh, 3))
    for rank in ranks:
        pair = [write_lora(root / f"{rank}-{seed}.safetensors", model, rank, seed) for seed in (1, 2)]
        row: dict[str, object] = {"rank": rank}
        for mode in ("adapter", "merge"):
            model.apply_loras([pair[1]], mode)
            seconds = median(repeat, *(lambda lora=lora, mode=mode: model.apply_loras([lora], mode) for lora in pair))
            row |= {f"{mode}_seconds": round(seconds, 3), f"{mode}_to_fresh": round(seconds / fresh, 3)}
        rows.add(**row)


def plain_diffusers(root: Path, device: str) -> None:
    """What a server does that makes a new pipeline for another LoRA, without loading the LoRA.

    On a CPU the weights stay memory-mapped until they are used; the copy stands for their way to a device.
    """
    pipe = WanPipeline.from_pretrained(root / tiny_checkpoints.T2V_1B, dtype=torch.bfloat16).to(device)
    if device == "cpu":
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data.clone()


def write_real_size(folder: Path, size: str, blocks: int | None) -> tiny_checkpoints.Size:
    """Write a transformer with random weights, which a GPU makes in seconds, in place of the one in `folder`."""
    heads, ffn_dim, all_blocks = SIZES[size]
    shape = tiny_checkpoints.Size(heads, ffn_dim, blocks or all_blocks)
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn_dim, num_layers=shape.blocks, text_dim=32
        )
    model = model.to(torch.bfloat16).to_empty(device=report.device())
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.to("cpu").save_pretrained(folder, max_shard_size="10GB")
    return shape


def write_vae(folder: Path, model_id: str) -> None:
    """Write a VAE of the real size in place of the one in `folder`, in bf16, with random weights."""
    with torch.device(report.device()):
        vae = real_size.vae(model_id)
    vae.to("cpu", torch.bfloat16).save_pretrained(folder)


def write_lora(path: Path, model: WanModel | torch.nn.Module, rank: int, seed: int) -> Adapter:
    """A LoRA on every linear layer of every block of a transformer, or of a model's first one, in ai-toolkit's format."""
    transformer = model._pipe.transformer if isinstance(model, WanModel) else model
    generator = torch.Generator(device := report.device()).manual_seed(seed)
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "net.0.proj": "0", "net.2": "2"}
    tensors = {}
    for name, module in transformer.named_modules():
        _, _, layer = name.partition("blocks.")
        block, _, layer = layer.partition(".")
        group, _, part = layer.partition(".")
        if part in names and isinstance(module, torch.nn.Linear):
            group = {"attn1": "self_attn", "attn2": "cross_attn"}.get(group, group)
            key = f"diffusion_model.blocks.{block}.{group}.{names[part]}"
            for part, shape in {"A": (rank, module.in_features), "B": (module.out_features, rank)}.items():
                factor = torch.randn(*shape, generator=generator, device=device)
                tensors[f"{key}.lora_{part}.weight"] = factor.to("cpu", torch.bfloat16)
    save_file(tensors, path, metadata=tiny_checkpoints.lora_metadata(path.stem, "wan_2.1"))
    return Adapter(LoraFile.read(path), 0.5)


if __name__ == "__main__":
    sys.exit(main())
