"""Seconds per denoising step: plain diffusers use, the worker's exact path, other attention kernels, compiled blocks.

    python -m benchmarks.denoise                       tiny models, on a CPU
    python -m benchmarks.denoise --size 14B            random weights of the real size, written to a temp folder
    python -m benchmarks.denoise --size 14B --blocks 8 --width 832 --height 480 --num-frames 41 --steps 25

Each with one LoRA, in one run. The first step is told by itself: compiling falls into it. `equal`: whether the frames are
those of plain use to the bit. `switch`: seconds of the first step after a LoRA of another rank.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.baseline import load_plain
from benchmarks.switch import SIZES, write_lora, write_real_size
from builder import tiny_checkpoints
from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.catalog import Attention, LoraMode
from pipelines.lora.file import LoraFile

RANKS = (16, 64)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.denoise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--blocks", type=int, help="number of transformer blocks, where all of them do not fit")
    parser.add_argument("--cache", type=Path, help="folder for compiled code; default: a new one")
    for name, default in (("width", 320), ("height", 192), ("num-frames", 17), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    size = {"width": options.width, "height": options.height, "num_frames": options.num_frames}
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tiny_checkpoints.write_checkpoints(root)
        if options.size in SIZES:
            write_real_size(root / tiny_checkpoints.T2V_1B / "transformer", options.size, options.blocks)
        video = f"{options.width}x{options.height}x{options.num_frames}, {options.steps} steps"
        rows = report.Rows(f"denoise-{options.size}", size=options.size, blocks=options.blocks, video=video)
        measure(rows, root, options.cache or root / "compiled", size | {"num_inference_steps": options.steps})
    return 0


def measure(rows: report.Rows, root: Path, cache: Path, size: dict[str, int]) -> None:
    device = report.device()

    def load(attention: Attention) -> WanModel:
        return load_pipeline("wan21_1b", root, device, "none", attention=attention)

    model = load("native")
    loras = [write_lora(root / f"rank{rank}.safetensors", model, rank, seed=rank) for rank in RANKS]
    del model
    gc.collect()
    plain_first, plain_step, plain_frames = plain(root, loras[0], size)
    rows.add(way="plain diffusers", first_step_s=plain_first, step_s=plain_step, to_plain=1.0, equal=True, switch_s=None)
    ways: list[tuple[str, Attention, bool, LoraMode]] = [
        ("exact", "native", False, "adapter"),
        ("attention chosen", "auto", False, "adapter"),
        ("attention chosen, compiled", "auto", True, "adapter"),
        ("attention chosen, compiled, LoRA merged", "auto", True, "merge"),
    ]
    for name, attention, compiles, mode in ways:
        gc.collect()
        model = load(attention)
        if compiles:
            model.compile_blocks(cache)
        first, step, frames = ours(model, loras[0], mode, size)
        switch, _, _ = ours(model, loras[1], mode, size)
        rows.add(
            way=f"{name} ({model.facts['attention']})",
            first_step_s=first,
            step_s=step,
            to_plain=round(step / plain_step, 2),
            equal=bool(np.array_equal(frames, plain_frames)),
            switch_s=switch,
        )
        del model


class Steps:
    """When each denoising step ended, the device's work included."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def seconds(self, start: float) -> tuple[float, float]:
        """The seconds of the first step, with the texts, and the mean of the others."""
        first, last = self._ends[0], self._ends[-1]
        return round(first - start, 4), round((last - first) / (len(self._ends) - 1), 4)


def plain(root: Path, lora: Adapter, size: dict[str, int]) -> tuple[float, float, np.ndarray[Any, Any]]:
    pipe = load_plain(root / tiny_checkpoints.T2V_1B, lora.file.path)
    pipe.set_adapters(pipe.get_active_adapters(), [lora.scale])

    def call(end: Callable[[], None]) -> Any:
        def callback(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            end()
            return tensors

        texts = {"prompt": "a boat", "negative_prompt": ""}
        generator = torch.Generator().manual_seed(42)
        return pipe(**texts, **size, guidance_scale=4.0, generator=generator, callback_on_step_end=callback, output_type="pil")

    call(lambda: None)
    steps, start = Steps(), time.perf_counter()
    images = call(steps.end).frames[0]
    return *steps.seconds(start), np.stack([np.asarray(image) for image in images])


def ours(model: WanModel, lora: Adapter, mode: LoraMode, size: dict[str, int]) -> tuple[float, float, np.ndarray[Any, Any]]:
    model.apply_loras([Adapter(LoraFile.read(lora.file.path), lora.scale)], mode)
    steps, start = Steps(), time.perf_counter()
    sampling = Sampling("a boat", guidance_scale=4.0, seed=42, **size)  # type: ignore[arg-type]
    frames = list(model.generate(sampling, on_step=lambda _: steps.end()))
    return *steps.seconds(start), np.concatenate(frames)


if __name__ == "__main__":
    sys.exit(main())
