"""Seconds per denoising step with guidance: on one rank, and shared between two or four.

    python -m benchmarks.ranks                           a transformer of 1.3B's widths with 2 blocks, random weights
    python -m benchmarks.ranks --size 1.3B --blocks 30   the whole of it
    python -m benchmarks.ranks --size tiny               what the exchange costs where a pass takes hardly any time
    python -m benchmarks.ranks --ranks 4 --side 256      four ranks; more tokens, so that the text counts less

With several GPUs, each rank has one. On a CPU every rank has one thread, so that they are devices of the same speed; let
nothing else run then. With fewer cores than ranks, look at `cpu_seconds`: what rank 0 computes in a step itself, without its
waiting. The videos of one and of several ranks take turns in one run. Two ranks must make equal frames; of four, the largest
difference is shown. Prints a table and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.switch import arguments, in_a_folder, write_model
from pipelines import Sampling, WanModel, load_pipeline
from pipelines.cfg_parallel import PASSES, CfgParallel
from pipelines.recipes import documented

SAMPLING = Sampling("a boat", "blurry", num_frames=17, num_inference_steps=6)
"""5 latent frames, each of width × height / 256 tokens."""

Step = tuple[float, float]
"""Seconds, and CPU seconds of this process."""


def main() -> int:
    parser = arguments("python -m benchmarks.ranks", __doc__, repeat=3)
    parser.set_defaults(size="1.3B", blocks=2)
    parser.add_argument("--ranks", type=int, nargs="+", choices=[2, 4], default=[2])
    parser.add_argument("--side", type=int, default=128, help="width and height in pixels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    elif torch.cuda.device_count() < max(options.ranks):
        print("too few GPUs; on a CPU: CUDA_VISIBLE_DEVICES= python -m benchmarks.ranks", file=sys.stderr)
        return 1
    sampling = replace(SAMPLING, width=options.side, height=options.side)
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, options.ranks, sampling, options.repeat))
    return 0


def measure(root: Path, size: str, blocks: int | None, numbers: list[int], sampling: Sampling, repeat: int) -> None:
    shape = write_model(root, size, blocks)
    model = load(root, 0)
    rows = [row for number in numbers for row in compared(root, model, number, sampling, repeat)]
    name = "-".join(["ranks", *map(str, numbers), size, f"{shape.blocks}-blocks"])
    tokens = 5 * (sampling.width // 16) * (sampling.height // 16)
    report.write(name, rows, size=size, tokens=tokens, threads_per_rank=torch.get_num_threads())


def compared(root: Path, model: WanModel, number: int, sampling: Sampling, repeat: int) -> list[dict[str, Any]]:
    """A row for one rank, and one for `number` of them."""
    store = root / f"store-{number}"
    connections, processes = [], []
    for rank in range(1, number):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=other_rank, args=(root, store, rank, number, theirs), daemon=True
        )
        process.start()
        connections.append(ours)
        processes.append(process)
    parallel = CfgParallel(0, model.device, store, number)
    steps: dict[int, list[Step]] = {1: [], number: []}
    frames = {}
    for ranks in [1, number] * (repeat + 1):  # the first of each warms up
        model._parallel = parallel if ranks > 1 else None
        for connection in connections if ranks > 1 else ():
            connection.send(sampling)
        frames[ranks], step = video(model, sampling)
        steps[ranks] += [step]
    for connection, process in zip(connections, processes, strict=True):
        connection.send(None)
        process.join()
    dist.destroy_process_group()
    difference = int(np.abs(frames[number].astype(int) - frames[1]).max())
    if difference and number <= PASSES:
        raise SystemExit("the frames of one rank and of two differ")
    medians = {
        ranks: [statistics.median(column) for column in zip(*values[1:], strict=True)] for ranks, values in steps.items()
    }
    return [
        {
            "ranks": ranks,
            "seconds_per_step": round(seconds, 4),
            "to_one_rank": round(seconds / medians[1][0], 2),
            "cpu_seconds": round(cpu_seconds, 4),
            "cpu_to_one_rank": round(cpu_seconds / medians[1][1], 2),
            "largest_difference": difference if ranks > 1 else 0,
        }
        for ranks, (seconds, cpu_seconds) in medians.items()
    ]


def load(root: Path, rank: int) -> WanModel:
    return load_pipeline("wan21_1b", root, f"cuda:{rank}" if torch.cuda.is_available() else "cpu")


def video(model: WanModel, sampling: Sampling) -> tuple[np.ndarray, Step]:
    """The frames, and the medians of the steps but the first."""
    ticks: list[Step] = []
    frames = np.concatenate(
        list(model.generate(sampling, None, lambda _: ticks.append((time.perf_counter(), time.process_time()))))
    )
    seconds, cpu_seconds = (
        statistics.median(after - before for before, after in itertools.pairwise(column)) for column in zip(*ticks, strict=True)
    )
    return frames, (seconds, cpu_seconds)


def other_rank(root: Path, store: Path, rank: int, number: int, connection: Connection[Any, Any]) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    model = load(root, rank)
    model.share_passes(CfgParallel(rank, model.device, store, number))
    while sampling := connection.recv():
        model.denoise(sampling, documented(model.spec))


if __name__ == "__main__":
    sys.exit(main())
