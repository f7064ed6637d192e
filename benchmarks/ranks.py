"""Seconds per denoising step with guidance: on one rank, and shared between two.

    python -m benchmarks.ranks                           a transformer of 1.3B's widths with 2 blocks, random weights
    python -m benchmarks.ranks --size 1.3B --blocks 30   the whole of it
    python -m benchmarks.ranks --size tiny               what the exchange costs where a pass takes hardly any time

On a CPU every rank has one thread, so that two ranks are two devices of the same speed; let nothing else run then. With two
GPUs, each rank has one. The videos of one and of two ranks take turns in one run, and their frames must be equal. Prints a
table and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.switch import arguments, in_a_folder, write_model
from pipelines import Sampling, WanModel, load_pipeline
from pipelines.cfg_parallel import RANKS, CfgParallel
from pipelines.recipes import documented

SAMPLING = Sampling("a boat", "blurry", width=128, height=128, num_frames=17, num_inference_steps=6)
"""5 × 8 × 8 = 320 tokens."""


def main() -> int:
    parser = arguments("python -m benchmarks.ranks", __doc__, repeat=3)
    parser.set_defaults(size="1.3B", blocks=2)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    elif torch.cuda.device_count() < RANKS:
        print("one GPU: nothing to measure; on a CPU: CUDA_VISIBLE_DEVICES= python -m benchmarks.ranks", file=sys.stderr)
        return 1
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, options.repeat))
    return 0


def measure(root: Path, size: str, blocks: int | None, repeat: int) -> None:
    shape = write_model(root, size, blocks)
    ours, theirs = multiprocessing.Pipe()
    store = root / "store"
    other = multiprocessing.get_context("spawn").Process(target=other_rank, args=(root, store, theirs), daemon=True)
    other.start()
    model = load(root, 0)
    parallel = CfgParallel(0, model.device, store)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    frames = set()
    for ranks in [1, 2] * (repeat + 1):  # the first of each warms up
        model._parallel = parallel if ranks == RANKS else None
        if ranks == RANKS:
            ours.send(SAMPLING)
        made, steps = video(model)
        frames.add(made)
        seconds[ranks] += [statistics.median(steps)]
    ours.send(None)
    other.join()
    if len(frames) != 1:
        raise SystemExit("the frames of one rank and of two differ")
    medians = {ranks: statistics.median(values[1:]) for ranks, values in seconds.items()}
    rows = [
        {"ranks": ranks, "seconds_per_step": round(value, 4), "to_one_rank": round(value / medians[1], 2)}
        for ranks, value in medians.items()
    ]
    size = f"{size}-{shape.blocks}-blocks"
    report.write(f"ranks-{size}", rows, size=size, tokens=320, threads_per_rank=torch.get_num_threads())


def load(root: Path, rank: int) -> WanModel:
    return load_pipeline("wan21_1b", root, f"cuda:{rank}" if torch.cuda.is_available() else "cpu")


def video(model: WanModel) -> tuple[bytes, list[float]]:
    """The frames, and the seconds of each step but the first."""
    times: list[float] = []
    frames = b"".join(
        frames.tobytes() for frames in model.generate(SAMPLING, None, lambda _: times.append(time.perf_counter()))
    )
    return frames, [after - before for before, after in itertools.pairwise(times)]


def other_rank(root: Path, store: Path, connection: Connection[Any, Any]) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    model = load(root, 1)
    model.share_passes(CfgParallel(1, model.device, store))
    while sampling := connection.recv():
        model.denoise(sampling, documented(model.spec))


if __name__ == "__main__":
    sys.exit(main())
