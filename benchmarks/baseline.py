"""What everything is measured against: diffusers as its documentation shows it, in a few lines and with nothing around them.

    python benchmarks/baseline.py CHECKPOINT LORA TARGET --width 64 --height 64 --num-frames 5 --steps 2

makes one video in a fresh process: load, LoRA, call, `export_to_video`. Imports nothing of the project.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video


def load_plain(checkpoint: Path, lora: Path) -> WanPipeline:
    """bf16 on a GPU and float32 on a CPU, as the worker does it."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = WanPipeline.from_pretrained(checkpoint, dtype=dtype).to(device)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(frames: Any, target: Path) -> None:
    export_to_video(frames, str(target), fps=16)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baseline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("checkpoint", "lora", "target"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    for name in ("width", "height", "num-frames", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    pipe = load_plain(options.checkpoint, options.lora)
    frames = pipe(
        prompt="a boat",
        negative_prompt="",
        width=options.width,
        height=options.height,
        num_frames=options.num_frames,
        num_inference_steps=options.steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(42),
    ).frames[0]
    export(frames, options.target)


if __name__ == "__main__":
    main()
