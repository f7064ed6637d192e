"""What a warm request costs beside the model's own forward passes, and beside plain diffusers use.

    python -m benchmarks.warm

Plain use: the pipeline's call, with its PIL frames, and diffusers' export_to_video. Ours: a job's whole way, from its JSON to
the stored file and the result. Both on tiny checkpoints, in turn, in one process; the time inside the text encoder, the
transformer and the VAE's decoder is taken off both.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks import report
from benchmarks.baseline import export, load_plain
from builder import tiny_checkpoints
from worker import logs
from worker.service import Service
from worker.settings import Settings
from worker.startup.cold_start import cold_start

SIZES = [(64, 64, 5, 2, 15), (320, 192, 17, 4, 5), (832, 480, 41, 1, 1)]
"""Width, height, frames, steps, rounds."""


class InForward:
    """Seconds inside the forward passes of a pipeline's models."""

    def __init__(self, pipe: Any) -> None:
        self.seconds = 0.0
        for module in (pipe.text_encoder, pipe.transformer, pipe.vae.decoder):
            module.forward = self._timed(module.forward)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return forward(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_checkpoints.write_checkpoints(folder)
        tiny_checkpoints.write_loras(folder / "loras")
        logs.configure()
        logs.log.setLevel("ERROR")
        pipe = load_plain(folder / tiny_checkpoints.T2V_1B, folder / "loras/wan21_1b/rank4.safetensors")
        runner = cold_start(
            Settings(
                model_id="wan21_1b",
                checkpoint_dir=folder,
                lora_dir=folder / "loras",
                device="cpu",
                output_dir=folder / "output",
            )
        )
        in_plain, in_ours = InForward(pipe), InForward(runner._gpu.model._pipe)
        rows = [row(pipe, in_plain, runner, in_ours, folder, *size) for size in SIZES]
    report.write("warm", rows)
    return 0


def row(
    pipe: diffusers.WanPipeline,
    in_plain: InForward,
    runner: Service,
    in_ours: InForward,
    folder: Path,
    width: int,
    height: int,
    num_frames: int,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    def plain() -> None:
        call = {"prompt": "a boat", "negative_prompt": "", "width": width, "height": height, "num_frames": num_frames}
        generator = torch.Generator().manual_seed(42)
        frames = pipe(**call, num_inference_steps=steps, guidance_scale=4.0, generator=generator).frames[0]
        export(frames, folder / "plain.mp4")

    def ours() -> None:
        prompt = {"prompt": "a boat", "width": width, "height": height, "num_frames": num_frames, "sample_steps": steps}
        request = {"model": "wan21_1b", "loras": [{"path": "wan21_1b/rank4.safetensors"}], "prompts": [prompt]}
        result = asyncio.run(runner.run({"input": request}))
        assert "outputs" in result, result

    plain()
    ours()
    beside: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for name, call, forward in (("plain", plain, in_plain), ("ours", ours, in_ours)):
            forward.seconds = 0.0
            beside[name].append(report.seconds(call) - forward.seconds)
    return report.compared(f"{width}x{height}x{num_frames}, {steps} steps", beside)


if __name__ == "__main__":
    sys.exit(main())
