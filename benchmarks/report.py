"""What every benchmark ends with: a table, and a JSON file with the device and the versions in benchmarks/results/."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "av")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"


def write(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print `rows` as a table under the facts, and write both to `NAME-DEVICE.json`."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    report = {"device": device_name(), "cpus": os.cpu_count(), "versions": versions, **facts, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    file = f"{name}-{device_name()}".replace(" ", "_").replace("/", "_")
    (RESULTS / f"{file}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in {"device": device_name(), **facts}.items()))
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compared(size: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A row: the medians of `plain` and `ours` in milliseconds, and their ratio."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    in_ms = {f"{name}_ms": round(1000 * value) for name, value in medians.items()}
    return {"size": size, **in_ms, "ratio": round(medians["ours"] / medians["plain"], 2)}


def median(repeat: int, *calls: Callable[[], object]) -> float:
    """Median seconds of a call, over `repeat` rounds through all of them."""
    return statistics.median(seconds(call) for _ in range(repeat) for call in calls)
