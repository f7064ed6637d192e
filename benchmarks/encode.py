"""What encoding and storing add to a warm job: from the end of the last forward pass to the stored file.

    python -m benchmarks.encode

Plain use makes PIL images of the decoded video, encodes them with diffusers' export_to_video, and uploads the file. Ours has
encoded most frames while the rest was decoded. Both upload to the same S3 server on this machine. On tiny checkpoints, whose
frames are noise, the hardest thing to encode; in turn, in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.baseline import export, load_plain
from builder import tiny_checkpoints
from tests import s3_server
from worker import logs
from worker.settings import Settings
from worker.startup.cold_start import cold_start
from worker.storage.base import Limit
from worker.storage.choice import storage_of

SIZES = [(320, 192, 17), (832, 480, 41)]
"""Width, height, frames."""
STEPS = 1


class EndOfDecoding:
    """When a pipeline's VAE last returned from a forward pass."""

    def __init__(self, pipe: Any) -> None:
        self.at = 0.0
        forward = pipe.vae.decoder.forward

        def noted(*arguments: Any, **named: Any) -> Any:
            pieces = forward(*arguments, **named)
            self.at = time.perf_counter()
            return pieces

        pipe.vae.decoder.forward = noted


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    logs.configure()
    logs.log.setLevel("ERROR")
    with tempfile.TemporaryDirectory() as name, s3_server.serve() as server:
        folder = Path(name)
        tiny_checkpoints.write_checkpoints(folder)
        tiny_checkpoints.write_loras(folder / "loras")
        bucket = {name.lower(): value for name, value in server.environment().items()}
        settings = Settings(model_id="wan21_1b", checkpoint_dir=folder, lora_dir=folder / "loras", device="cpu", **bucket)
        calls = {"plain": plain_use(folder, settings), "ours": our_use(settings)}
        rows = [row(calls, repeat, *size) for size in SIZES]
    report.write("encode", rows, steps=STEPS)
    return 0


Call = Callable[[int, int, int], float]
"""Makes a video of (width, height, frames); returns the seconds from the end of its decoding to its file in the bucket."""


def plain_use(folder: Path, settings: Settings) -> Call:
    pipe = load_plain(folder / tiny_checkpoints.T2V_1B, folder / "loras/wan21_1b/rank4.safetensors")
    decoding, storage = EndOfDecoding(pipe), storage_of(settings)

    def call(width: int, height: int, num_frames: int) -> float:
        size = {"width": width, "height": height, "num_frames": num_frames, "num_inference_steps": STEPS}
        export(pipe(prompt="a boat", **size).frames[0], folder / "plain.mp4")
        storage.put(folder / "plain.mp4", "plain/0.mp4", "video/mp4", "", Limit(threading.Event()))
        return time.perf_counter() - decoding.at

    return call


def our_use(settings: Settings) -> Call:
    runner = cold_start(settings)
    decoding = EndOfDecoding(runner._gpu.model._pipe)

    def call(width: int, height: int, num_frames: int) -> float:
        prompt = {"prompt": "a boat", "width": width, "height": height, "num_frames": num_frames, "sample_steps": STEPS}
        request = {"model": "wan21_1b", "loras": [{"path": "wan21_1b/rank4.safetensors"}], "prompts": [prompt]}
        result = asyncio.run(runner.run({"input": request}))
        assert "outputs" in result, result
        return time.perf_counter() - decoding.at

    return call


def row(calls: dict[str, Call], repeat: int, *size: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeat + 1):
        for name, call in calls.items():
            took = call(*size)
            if round_number:  # the first warms up
                seconds[name].append(took)
    return report.compared("x".join(map(str, size)), seconds)


if __name__ == "__main__":
    sys.exit(main())
