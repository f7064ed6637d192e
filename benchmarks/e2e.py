"""One video of Wan 2.2 T2V A14B with a pair of LoRAs: from the files to the frames, by plain diffusers and by the worker.

    python -m benchmarks.e2e                          tiny models, on a CPU
    python -m benchmarks.e2e --size 14B               two transformers of the real size, random weights, 832x480, 81 frames
    python -m benchmarks.e2e --size 14B --blocks 4    real widths, fewer blocks

Both load, take the LoRAs, and make the same video twice, in one process that has imported everything. `equal`: whether the
frames are those of plain diffusers to the bit. Both transformers are one file, and the text encoder is a tiny one: with its
11 GB the two would not fit a GPU of 80 GB. The VAE is of the real size. Plain diffusers are loaded first, from files that were
just written.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from benchmarks import report
from benchmarks.switch import SIZES, in_a_folder, write_lora, write_real_size, write_vae
from builder import tiny_checkpoints
from pipelines import Adapter, Sampling, load_pipeline
from pipelines.catalog import MODELS

SPEC = MODELS["wan22_14b_t2v"]
RANK = 16
Frames = np.ndarray[Any, Any]
Video = Callable[[], tuple[Frames, float]]
"""Makes the video; returns its frames, and the seconds of the mean step but the first."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.e2e", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--blocks", type=int, help="number of transformer blocks, where all of them do not fit")
    for name in ("width", "height", "num-frames"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    width, height, frames = (832, 480, 81) if torch.cuda.is_available() and options.size != "tiny" else (64, 64, 5)
    size = (options.width or width, options.height or height, options.num_frames or frames)
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, size, options.steps))
    return 0


def measure(root: Path, size: str, blocks: int | None, video: tuple[int, int, int], steps: int) -> None:
    write(root, size, blocks)
    loras = write_loras(root)
    sampling = Sampling("a boat", "", *video, num_inference_steps=steps, guidance_scale=4.0, seed=42)
    shape = f"{'x'.join(map(str, video))}, {steps} steps"
    rows = report.Rows(f"e2e-{size}", size=size, blocks=blocks, video=shape, lora_rank=RANK)
    expected: Frames | None = None
    for way, load in {"plain diffusers": plain, "worker": worker}.items():
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the first way leaves
        expected = row(rows, way, lambda load=load: load(root, loras, sampling), expected)  # type: ignore[misc]


def row(rows: report.Rows, way: str, load: Callable[[], tuple[Video, float]], expected: Frames | None) -> Frames:
    with report.Peak() as peak:
        (video, lora_seconds), load_seconds = report.timed(load)
        (frames, step), first = report.timed(video)
        (_, _), second = report.timed(video)
    rows.add(
        way=way,
        load_s=round(load_seconds - lora_seconds, 2),
        loras_s=round(lora_seconds, 2),
        first_video_s=round(first, 2),
        second_video_s=round(second, 2),
        step_s=round(step, 3),
        files_to_frames_s=round(load_seconds + first, 2),
        peak_gb=peak.total_gigabytes,
        equal=bool(np.array_equal(frames, frames if expected is None else expected)),
    )
    return frames


def write(root: Path, size: str, blocks: int | None) -> None:
    tiny_checkpoints.write_checkpoints(root)
    if size not in SIZES:
        return
    first, second = (root / SPEC.sources[name].repo / SPEC.sources[name].subfolder for name in SPEC.transformers)
    write_real_size(first, size, blocks)
    for file in second.iterdir():
        file.unlink()
    for file in first.iterdir():
        os.link(file, second / file.name)
    write_vae(root / SPEC.sources["vae"].repo / "vae", SPEC.id)


def write_loras(root: Path) -> list[Adapter]:
    transformer = WanTransformer3DModel.from_pretrained(root / SPEC.sources["transformer"].repo, subfolder="transformer")
    pair = [write_lora(root / f"{side}.safetensors", transformer, RANK, seed) for seed, side in enumerate(("high", "low"))]
    return [Adapter(lora.file, lora.scale, side) for lora, side in zip(pair, ("high", "low"), strict=True)]  # type: ignore[arg-type]


def plain(root: Path, loras: list[Adapter], sampling: Sampling) -> tuple[Video, float]:
    device, dtype = report.device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32
    transformers = {
        name: WanTransformer3DModel.from_pretrained(root / SPEC.sources[name].repo, subfolder=name, dtype=dtype)
        for name in SPEC.transformers
    }
    pipe = WanPipeline.from_pretrained(root / SPEC.sources["vae"].repo, **transformers, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)

    def apply() -> None:
        for lora, into_second in zip(loras, (False, True), strict=True):
            file = lora.file.path
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=file.stem, load_into_transformer_2=into_second
            )
        pipe.transformer.set_adapters(["high"], [loras[0].scale])
        pipe.transformer_2.set_adapters(["low"], [loras[1].scale])

    def video() -> tuple[Frames, float]:
        ends: list[float] = []

        def step_end(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            note(ends)
            return tensors

        images = pipe(
            prompt=sampling.prompt,
            negative_prompt=sampling.negative_prompt,
            width=sampling.width,
            height=sampling.height,
            num_frames=sampling.num_frames,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=torch.Generator().manual_seed(sampling.seed),
            callback_on_step_end=step_end,
            output_type="pil",
        ).frames[0]
        return np.stack([np.asarray(image) for image in images]), mean_step(ends)

    return video, report.seconds(apply)


def worker(root: Path, loras: list[Adapter], sampling: Sampling) -> tuple[Video, float]:
    model = load_pipeline(SPEC.id, root, report.device())

    def video() -> tuple[Frames, float]:
        ends: list[float] = []
        frames = list(model.generate(sampling, on_step=lambda _: note(ends)))
        return np.concatenate(frames), mean_step(ends)

    return video, report.seconds(lambda: model.apply_loras(loras))


def note(ends: list[float]) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.perf_counter())


def mean_step(ends: list[float]) -> float:
    return (ends[-1] - ends[0]) / (len(ends) - 1)


if __name__ == "__main__":
    sys.exit(main())
