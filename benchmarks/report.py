"""What every benchmark writes: a table, and a JSON file with the device and the versions in benchmarks/results/."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
Result = TypeVar("Result")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "av")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"


class Rows:
    """A table that grows: each row is printed, and the file `NAME-DEVICE.json` written anew, as soon as the row is there.

    What fails later costs none of the rows before.
    """

    def __init__(self, name: str, **facts: Any) -> None:
        versions = {package: _version_of(package) for package in _PACKAGES}
        self._facts = {"device": device_name(), "cpus": os.cpu_count(), "versions": versions, **facts}
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._file = RESULTS / (f"{name}-{device_name()}".replace(" ", "_").replace("/", "_") + ".json")
        print(", ".join(f"{key} {value}" for key, value in {"device": device_name(), **facts}.items()), flush=True)

    def add(self, **row: Any) -> None:
        if list(row) != self._columns:
            self._columns = list(row)
            print(" | ".join(row), flush=True)
        print(" | ".join(str(value) for value in row.values()), flush=True)
        self._rows.append(row)
        RESULTS.mkdir(exist_ok=True)
        self._file.write_text(json.dumps({**self._facts, "rows": self._rows}, indent=2) + "\n")


def write(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print `rows` as a table under the facts, and write both to `NAME-DEVICE.json`."""
    table = Rows(name, **facts)
    for row in rows:
        table.add(**row)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds(call: Callable[[], object]) -> float:
    """The seconds of one call, the device's work included."""
    return timed(call)[1]


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call returns, and its seconds, the device's work included."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


class Peak:
    """The most that is allocated on the GPU at once within the block."""

    gigabytes: float | None = None
    """Beside what was there before; None on a CPU."""
    total_gigabytes: float | None = None

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            self.gigabytes = round((peak - self._before) / 1e9, 2)
            self.total_gigabytes = round(peak / 1e9, 2)


def compared(size: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A row: the medians of `plain` and `ours` in milliseconds, and their ratio."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    in_ms = {f"{name}_ms": round(1000 * value) for name, value in medians.items()}
    return {"size": size, **in_ms, "ratio": round(medians["ours"] / medians["plain"], 2)}


def median(repeat: int, *calls: Callable[[], object]) -> float:
    """Median seconds of a call, over `repeat` rounds through all of them."""
    return statistics.median(seconds(call) for _ in range(repeat) for call in calls)
