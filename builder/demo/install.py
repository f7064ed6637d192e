"""Write the trained tiny weights in the layout of the models' checkpoints.

    python -m builder.demo.install ROOT

The result is `ROOT/ORG/NAME` for every Hub repo that the models of pipelines/catalog.py and ai-toolkit read, and in
`ROOT/loras` the folders that ai-toolkit wrote when it trained LoRAs: `striped_sail` for `wan22_14b_t2v` and `nightfall` for
`wan22_14b_i2v`. All text-to-video models of 1.3B and 14B, and both transformers of 2.2, are the same weights. They differ only
in how they are sampled. So do the LoRAs of their drafts. The same holds for image-to-video, which has no drafts here; the image
encoder of 2.1 is random, and what it sees changes nothing. 5B has a VAE and a transformer of its own, and a LoRA that changes
nothing, since the worker wants one.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from builder import tiny_checkpoints
from builder.demo import image_to_video
from pipelines.catalog import MODELS, ModelSpec

WEIGHTS = Path(__file__).parent / "weights"
TRAINED = Path(__file__).parent / "trained"
LORA_5B = "untrained_5b/untrained_5b.safetensors"
"""Below `ROOT/loras`."""


def enlargement(spec: ModelSpec) -> int:
    """Return how many times as wide and high this model's films are: 5B makes as many tokens of twice the size."""
    return spec.trainer_size_divisor // 16


def install(root: Path) -> None:
    """Write the repos and the LoRAs below `root`, and overwrite what exists."""
    for spec in MODELS.values():
        _install_model(spec, root)
    _write_untrained_lora(root / "loras" / LORA_5B)
    shutil.copytree(TRAINED, root / "loras", dirs_exist_ok=True)
    drafts = [spec.draft for spec in MODELS.values() if spec.family == "t2v" and spec.draft]
    for lora in (lora for draft in drafts for lora in draft.loras):
        (root / lora.repo).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(WEIGHTS / "distilled.safetensors", root / lora.repo / lora.path)


def _install_model(spec: ModelSpec, root: Path) -> None:
    for part, source in spec.sources.items():
        _write_part(spec, part, root / source.repo / source.subfolder)
    base = root / spec.sources["vae"].repo
    if spec.family == "toolkit_ti2v":  # for plain diffusers
        tiny_checkpoints.scheduler(flow_shift=5.0).save_pretrained(base / "scheduler")
        tiny_checkpoints.write_index(base, "WanPipeline", expand_timesteps=True, transformer_2=[None, None])
    if spec.needs_toolkit:
        return
    for part in spec.transformers:  # 2.2: beside those that the worker reads, for plain diffusers
        _write_part(spec, part, base / part)
    pipeline = "WanImageToVideoPipeline" if spec.family == "i2v" else "WanPipeline"
    tiny_checkpoints.write_index(base, pipeline, **({"boundary_ratio": 0.875} if spec.moe else {}))


def _write_part(spec: ModelSpec, part: str, to: Path) -> None:
    if part in spec.transformers and spec.control_image == "required":
        _image_to_video(tiny_checkpoints.IMAGE_DIM if spec.image_dim else None).save_pretrained(to)
    elif part == "image_encoder":
        tiny_checkpoints.image_encoder(seed=0).save_pretrained(to)
    elif part == "image_processor":
        tiny_checkpoints.image_processor().save_pretrained(to)
    else:
        own = spec.family == "toolkit_ti2v" and part in ("vae", "transformer")
        to.mkdir(parents=True, exist_ok=True)
        for file in (WEIGHTS / (f"{part}_5b" if own else part.removesuffix("_2"))).iterdir():
            shutil.copyfile(file, to / file.name)


def _write_untrained_lora(path: Path) -> None:
    """Write a LoRA for 5B as a training begins with it: its second matrices are 0."""
    config = WanTransformer3DModel.load_config(WEIGHTS / "transformer_5b")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    size = tiny_checkpoints.Size(width // tiny_checkpoints.HEAD_DIM, config["ffn_dim"], config["num_layers"])
    metadata = tiny_checkpoints.lora_metadata(path.stem, MODELS["wan22_5b"].lora_base_version, step=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tiny_checkpoints.lora_tensors(size, rank=1, seed=0, strength=0.0), path, metadata=metadata)


@functools.cache
def _image_to_video(image_dim: int | None) -> WanTransformer3DModel:
    return image_to_video.load(WEIGHTS, image_dim).to(torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.install", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder to write ROOT/ORG/NAME and ROOT/loras into")
    root = parser.parse_args().root
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    install(root)
    print(f"demo checkpoints of {', '.join(MODELS)} and LoRAs in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
