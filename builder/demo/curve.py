"""Draw the loss curves of a training as one SVG."""

from __future__ import annotations

import csv
import math
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 440, 180, 24
COLOURS = {
    "vae": "#3f7fd4",
    "decoder": "#8f6fd4",
    "transformer": "#d0742b",
    "image_to_video": "#3f9f5f",
    "vae_5b": "#2f9fb0",
    "decoder_5b": "#b06fd4",
    "transformer_5b": "#b8963a",
    "distilled": "#b0508f",
}
INK = "#808080"
"""Readable on white and on black alike."""


def write_curve(curve: Path, to: Path, start: Path | None = None) -> None:
    """Copy a curve. `start`: the weights that the training began with; theirs comes first, if there is one."""
    rows = _rows(start / curve.name) if start and (start / curve.name).exists() else []
    step, seconds = rows[-1][:2] if rows else (0.0, 0.0)
    rows += [(step + row[0], seconds + row[1], row[2]) for row in _rows(curve)]
    lines = ["step,seconds,loss", *(f"{row[0]:.0f},{row[1]:.1f},{row[2]}" for row in rows)]
    to.write_text("\n".join(lines) + "\n")


def write_curves(folder: Path) -> None:
    """Write FOLDER/loss.svg from the `*-loss.csv` in it: the logarithm of each loss over its own share of the time."""
    lines: list[str] = []
    for name, colour in COLOURS.items():
        curve = folder / f"{name}-loss.csv"
        if not curve.exists():
            continue
        rows = [(seconds, loss) for _, seconds, loss in _rows(curve)]
        first, last = rows[0][1], rows[-1][1]
        lines.append(f'<polyline points="{_points(rows)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f"{name.replace('_', '-')}: {first:.2f} to {last:.2f} in {rows[-1][0] / 60:.0f} min"
        lines.append(f'<text x="{WIDTH - 230}" y="{MARGIN + 8 * len(lines)}" fill="{colour}">{label}</text>')
    (folder / "loss.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="Loss curves">{"".join(lines)}'
        f'<path d="M0 {HEIGHT - 1}H{WIDTH}" stroke="{INK}"/>'
        f'<text x="0" y="{HEIGHT - 6}" fill="{INK}">logarithm of the loss, over the time of each training</text></svg>\n'
    )


def _rows(curve: Path) -> list[tuple[float, float, float]]:
    """Return step, seconds and loss of each row."""
    with curve.open() as file:
        return [(float(row["step"]), float(row["seconds"]), float(row["loss"])) for row in csv.DictReader(file)]


def _points(rows: list[tuple[float, float]]) -> str:
    logs = [math.log(loss) for _, loss in rows]
    low, high = min(logs), max(logs)
    points = []
    for (seconds, _), value in zip(rows, logs, strict=True):
        x = seconds / rows[-1][0] * WIDTH
        y = MARGIN + (high - value) / ((high - low) or 1) * (HEIGHT - 2 * MARGIN)
        points.append(f"{x:.1f},{y:.1f}")
    return " ".join(points)
