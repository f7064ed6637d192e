"""Turns benchmarks/results/ into tables and a plot, so that every figure on a page comes from a result or is an estimate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from builder import sizes
from pipelines.catalog import MODELS, OffloadMode
from worker.request import Prompt

Table = list[tuple[str, ...]]
"""The head, then the rows."""

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
_CPU = "cpu-x86_64"

GPUS = (24, 32, 48, 80, 96, 141)
"""Memory in GB of the GPUs that RunPod Serverless rents."""

H100_DOLLARS_PER_SECOND = 0.00116
"""A flex worker, as RunPod's documentation listed it in November 2026."""

PFLOP_PER_SECOND = 0.34
"""An estimate for an H100 with plain diffusers, not measured here: the authors of LightX2V published 9.77 s per step for Wan
2.1 I2V 14B at 832x480 with 81 frames, and a step of this size has 3.36 PFLOP."""

DEFAULT_STEPS = Prompt.model_fields["sample_steps"].default

_WIDTH, _ROW, _BAR, _END = 440, 44, 14, 48
_INK, _OURS, _GOAL = "#808080", "#3f7fd4", "#d0742b"
"""Colours for light and dark pages: the plot is an image, which does not know the theme of its page."""


def ratios() -> list[tuple[str, float, float]]:
    """Return (what, goal, measured). Each is a ratio to plain use of diffusers, or to the model's own time."""
    start, warm, backlog = _rows("start")[-1], _rows("warm"), _rows("backlog")[0]
    switch = _rows("switch-tiny-2-blocks")
    return [
        ("process start to first result", 0.6, start["ratio"]),
        *((f"warm request beside the model, {row['size']}", 0.3, row["ratio"]) for row in warm),
        ("another LoRA as an adapter, to a fresh pipeline", 0.1, max(row["adapter_to_fresh"] for row in switch)),
        ("another LoRA merged, to a fresh pipeline", 0.1, max(row["merge_to_fresh"] for row in switch)),
        ("8 jobs, 1 s per upload, to the model's time", 1.1, backlog["worker_to_model"]),
        *((f"encoding and storing after the decode, {row['size']}", 0.2, row["ratio"]) for row in _rows("encode")),
    ]


def ratio_table() -> Table:
    return [("figure", "goal", "measured"), *((what, f"{goal:g}", f"{ratio:.2f}") for what, goal, ratio in ratios())]


def memory_table() -> Table:
    """Return GB by model: the weights on the device in each mode, and what jobs of some sizes take beside them."""
    rows = [{name: value for name, value in row.items() if not name.startswith("host")} for row in _rows("memory")]
    head = tuple(name.replace("x", "×") if name.startswith("job ") else name.removeprefix("weights ") for name in rows[0])
    return [head, *(tuple("" if value is None else str(value) for value in row.values()) for row in rows)]


def gpu_table() -> Table:
    """Return GB by model: the weights on disk, and what must be free on the GPU for `auto` to take a mode."""
    modes: tuple[OffloadMode, ...] = ("none", "text_encoder", "swap", "group")
    head = ("model id", "on the Hub", "as bf16", *(f"`{mode}` from" for mode in modes))
    return [
        head,
        *(
            (
                f"`{row['model']}`",
                f"{sizes.on_disk(row['model']) / 1e9:.1f}",
                f"{row['weights none']:.1f}",
                *(_needed(row["model"], mode, row[f"weights {mode}"]) for mode in modes),
            )
            for row in _rows("memory")
        ),
    ]


def _needed(model_id: str, mode: OffloadMode, weights: float | None) -> str:
    """Return GB of the weights and of a job; "" for a mode that the model does not have."""
    return "" if weights is None else f"{weights + MODELS[model_id].bytes_of_a_job(mode) / 1e9:.1f}"


def host_table() -> Table:
    """Return GB of weights by model that stay in main memory."""
    modes: tuple[OffloadMode, ...] = ("text_encoder", "swap", "group")
    rows = _rows("memory")
    head = ("model id", *(f"`{mode}`" for mode in modes))
    texts = [["" if (size := row[f"host {mode}"]) is None else str(size) for mode in modes] for row in rows]
    return [head, *((f"`{row['model']}`", *text) for row, text in zip(rows, texts, strict=True))]


def gpu_choice_table() -> Table:
    """Return by model the smallest GPUs for some modes, in GB as they are sold, and a network volume for weights and LoRAs."""
    modes: tuple[OffloadMode, ...] = ("none", "text_encoder", "swap")
    head = ("model id", "GPU for everything (`none`)", "`text_encoder`", "`swap`", "network volume")

    def row_of(row: dict[str, Any]) -> tuple[str, ...]:
        needed = (_needed(row["model"], mode, row[f"weights {mode}"]) for mode in modes)
        gpus = (_smallest_gpu(gb) if gb else "" for gb in needed)
        volume = math.ceil((sizes.on_disk(row["model"]) / 1e9 + 10) / 10) * 10
        return (f"`{row['model']}`", *gpus, f"{volume} GB")

    return [head, *(row_of(row) for row in _rows("memory"))]


def _smallest_gpu(gigabytes: str) -> str:
    return f"{next(size for size in GPUS if size >= float(gigabytes))} GB"


def video_table() -> Table:
    """Return estimated seconds and dollars per video on an H100."""
    head = ("model", "size", "frames", "seconds", "dollars")
    rows = []
    for row in _rows("cost"):
        seconds = (DEFAULT_STEPS * row["step"] + row["decode"]) / PFLOP_PER_SECOND
        size = f"{row['width']}×{row['height']}"
        rows.append(
            (f"`{row['model']}`", size, str(row["num_frames"]), f"{seconds:.0f}", f"{seconds * H100_DOLLARS_PER_SECOND:.3f}")
        )
    return [head, *rows]


def quantized_table() -> Table:
    """Return GB by model that must be free on the GPU for a worker with QUANTIZE and a job, and the smallest such GPU."""
    rows = _rows("memory-quantized")
    places = [name for name in rows[0] if name != "model"]
    modes: dict[str, OffloadMode] = {name: "none" if name.endswith(" none") else "text_encoder" for name in places}
    head = ("model id", *(f"`QUANTIZE={name.partition(' ')[0]}`, `{mode}`" for name, mode in modes.items()))
    needed = [[_needed(row["model"], mode, row[name]) for name, mode in modes.items()] for row in rows]
    texts = [[f"{gigabytes} ({_smallest_gpu(gigabytes)})" for gigabytes in of_model] for of_model in needed]
    return [head, *((f"`{row['model']}`", *text) for row, text in zip(rows, texts, strict=True))]


def stored_table() -> Table:
    """Return GB of weights by model on disk: as they are on the Hub, and as fetch_checkpoints can keep them."""
    formats = ("qfloat8", "uint4")
    head = ("model id", "on the Hub", "`--dtype bf16`", *(f"`--quantize {format}`" for format in formats))
    rows = []
    for row, coded in zip(_rows("memory"), _rows("memory-quantized"), strict=True):
        kept = (row["weights none"], *(coded[f"{format} none"] for format in formats))
        rows.append((f"`{row['model']}`", f"{sizes.on_disk(row['model']) / 1e9:.1f}", *(f"{size:.1f}" for size in kept)))
    return [head, *rows]


def cost_table() -> Table:
    """Return PFLOP by model and size."""
    head = ("model", "size", "frames", "a step", "of it attention", "the decode")
    names = ("model", "size", "num_frames", "step", "attention", "decode")
    texts = [{"size": f"{row['width']}×{row['height']}", "attention": f"{row['attention_part']:.0%}"} for row in _rows("cost")]
    return [head, *(tuple(str((row | text)[name]) for name in names) for row, text in zip(_rows("cost"), texts, strict=True))]


def plot() -> str:
    """Return an SVG with the ratios as bars, and their goals. The words are above the bars, so that a phone can show them."""
    rows = ratios()
    scale = (_WIDTH - _END) / max(max(goal, ratio) for _, goal, ratio in rows)
    bars = "".join(_bar(what, goal, ratio, number * _ROW, scale) for number, (what, goal, ratio) in enumerate(rows))
    height = len(rows) * _ROW + 48
    key = _text(0, height - 22, "blue: measured on a CPU; orange: the goal")
    key += _text(0, height - 6, "plain diffusers use, or the model's own time, is 1.0; less is better")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="Ratios to plain diffusers use, and their goals">{bars}{key}</svg>\n'
    )


def _bar(what: str, goal: float, ratio: float, top: float, scale: float) -> str:
    bar, mark = top + 22, goal * scale
    return (
        _text(0, top + 13, what)
        + f'<rect x="0" y="{bar}" width="{ratio * scale:.1f}" height="{_BAR}" fill="{_OURS}"/>'
        + f'<path d="M{mark:.1f} {bar - 3}V{bar + _BAR + 4}" stroke="{_GOAL}" stroke-width="2"/>'
        + _text(max(ratio, goal) * scale + 8, bar + 11, f"{ratio:.2f}")
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}">{text}</text>'


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}-{_CPU}.json").read_text())["rows"]
    return rows
