"""How fast the worker reads weights, beside `dd` of the same files to /dev/null and beside plain diffusers.

    python -m benchmarks.load                            tiny models, on a CPU
    python -m benchmarks.load --size 1.3B                random weights of the real size, written to a temp folder
    python -m benchmarks.load --size 14B --repeat 2      on a GPU; --blocks for fewer blocks

`cold`: the files are not in the page cache, as on a new machine; `warm`: they are. `to_dd`: the rate to that of dd, both of one
round, the median of the rounds. `readers`: the threads of the worker that bring the bytes to the device. `worker`: its start,
with the threads that read ahead, to a loaded pipeline.
On a CPU the worker maps files; here it reads them as for a GPU, into main memory, and plain diffusers' weights are copied. That
memory is kept from one load to the next: a GPU's is there too, and need not be cleared by the system first.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.switch import arguments, in_a_folder, plain_diffusers, write_model
from builder import tiny_checkpoints
from pipelines import load_pipeline
from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from pipelines.pristine import CheckpointFile
from pipelines.reading import read_into
from worker.startup.prefetch import read_weights


def main() -> int:
    options = arguments("python -m benchmarks.load", __doc__, repeat=5).parse_args()
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, options.repeat))
    return 0


def measure(root: Path, size: str, blocks: int | None, repeat: int) -> None:
    device = report.device()
    if device == "cpu":
        keep_memory()
    shape = write_model(root, size, blocks)
    files = sorted((root / tiny_checkpoints.T2V_1B).rglob("*.safetensors"))
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    ways: dict[str, Callable[[], object]] = {
        "dd": lambda: dd(files),
        "readers": lambda: readers(files, device),
        "worker": lambda: worker(root, device),
        "plain diffusers": lambda: plain_diffusers(root, device),
    }
    for call in ways.values():
        call()  # imports, and the device's own start
    size = f"{size}-{shape.blocks}-blocks"
    rows = report.Rows(f"load-{size}", size=size, gigabytes=round(gigabytes, 2))
    for cache in ("cold", "warm"):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeat):
            for way, call in ways.items():
                gc.collect()
                if cache == "cold":
                    drop_from_cache(files)
                seconds[way].append(report.seconds(call))
        for way, values in seconds.items():
            to_dd = statistics.median(dd / own for dd, own in zip(seconds["dd"], values, strict=True))
            rate = gigabytes / statistics.median(values)
            rows.add(cache=cache, way=way, gigabytes_per_second=round(rate, 2), to_dd=round(to_dd, 2))


def dd(files: list[Path]) -> None:
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M", "status=none"], check=True)  # noqa: S603, S607


def readers(files: list[Path], device: str) -> None:
    """The worker's threads alone."""
    read_into([(file, 0, torch.empty(file.stat().st_size, dtype=torch.uint8, device=device)) for file in files])


def worker(root: Path, device: str) -> object:
    read_weights(MODELS["wan21_1b"], root)
    return pipeline(root, device)


def pipeline(root: Path, device: str) -> object:
    """The worker's, with its weights on the device."""
    model = load_pipeline("wan21_1b", root, device, dtype=torch.bfloat16)
    if device == "cpu":
        folders = Checkpoints(MODELS["wan21_1b"], root)
        for part in ("text_encoder", "vae", "transformer"):
            CheckpointFile(folders.folder_of(part), part).bring(getattr(model._pipe, part), model.device)
    return model


def keep_memory() -> None:
    """Have malloc (glibc's) neither map large blocks nor give memory back: M_MMAP_MAX, M_TRIM_THRESHOLD."""
    malloc = ctypes.CDLL(None)
    malloc.mallopt(-4, 0)
    malloc.mallopt(-1, -1)


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not on the disk cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
