"""What a second process costs that loads the same weights at the same time, as the ranks of a worker with several GPUs do.

    python -m benchmarks.load_ranks                            tiny models, on a CPU
    python -m benchmarks.load_ranks --size 1.3B                random weights of the real size, written to a temp folder
    python -m benchmarks.load_ranks --size 14B --repeat 2      with two GPUs; --blocks for fewer blocks

`cold`: the files are not in the page cache, as on a new machine; `warm`: they are. `seconds`: until all processes have loaded;
the first also reads ahead, as the worker does. `cpu_seconds`: of all processes together, which tells more where the machine has
other work. `read_from_disk`: how often the files came from the disk, all processes together, as Linux counts it. Everything is
imported before. On a CPU each process has one thread, and what would be mapped is copied, as in `benchmarks.load`.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.load import drop_from_cache, keep_memory, pipeline, worker
from benchmarks.switch import arguments, in_a_folder, write_model
from builder import tiny_checkpoints

Loaded = tuple[float, float, int]
"""When a process had loaded, its CPU seconds for it, and the bytes that it read from the disk."""


def main() -> int:
    parser = arguments("python -m benchmarks.load_ranks", __doc__, repeat=5)
    options = parser.parse_args()
    if torch.cuda.device_count() == 1:
        print("too few GPUs; on a CPU: CUDA_VISIBLE_DEVICES= python -m benchmarks.load_ranks", file=sys.stderr)
        return 1
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, options.repeat))
    return 0


def measure(root: Path, size: str, blocks: int | None, repeat: int) -> None:
    shape = write_model(root, size, blocks)
    files = sorted((root / tiny_checkpoints.T2V_1B).rglob("*.safetensors"))
    size, total = f"{size}-{shape.blocks}-blocks", sum(file.stat().st_size for file in files)
    rows = report.Rows(f"load-ranks-{size}", size=size, gigabytes=round(total / 1e9, 2))
    for cache in ("cold", "warm"):
        rounds = [[loads(root, processes, files if cache == "cold" else []) for processes in (1, 2)] for _ in range(repeat)]
        for processes, loaded in enumerate(zip(*rounds, strict=True), 1):
            seconds, cpu_seconds, read = (statistics.median(column) for column in zip(*loaded, strict=True))
            rows.add(
                cache=cache,
                processes=processes,
                seconds=round(seconds, 2),
                cpu_seconds=round(cpu_seconds, 2),
                read_from_disk=round(read / total, 2),
            )


def loads(root: Path, processes: int, to_drop: list[Path]) -> Loaded:
    """Seconds until all processes have loaded; their CPU seconds, and the bytes that they read from the disk, together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.load"])  # the imports of all processes
    connections = []
    for rank in range(processes):
        ours, theirs = context.Pipe()
        context.Process(target=load, args=(rank, root, theirs), daemon=True).start()
        connections.append(ours)
    for connection in connections:
        connection.recv()  # it has imported everything
    drop_from_cache(to_drop)
    start = time.monotonic()
    for connection in connections:
        connection.send(None)
    loaded: list[Loaded] = [connection.recv() for connection in connections]
    ends, cpu_seconds, read = zip(*loaded, strict=True)
    return max(ends) - start, sum(cpu_seconds), sum(read)


def load(rank: int, root: Path, connection: Connection[Any, Any]) -> None:
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        torch.set_num_threads(1)
        keep_memory()
    connection.send(None)
    connection.recv()
    before, cpu = read_from_disk(), time.process_time()
    (pipeline if rank else worker)(root, f"cuda:{rank}" if has_gpu else "cpu")
    connection.send((time.monotonic(), time.process_time() - cpu, read_from_disk() - before))


def read_from_disk() -> int:
    """Bytes that this process had the disk read so far."""
    return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])


if __name__ == "__main__":
    sys.exit(main())
