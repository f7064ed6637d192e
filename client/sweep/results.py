"""Writes what a sweep is for: one grid video, one contact sheet, and a page to look through."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from client.sweep.page import Entry, page
from client.sweep.plan import Cell, Plan
from client.sweep.record import Record
from tools.grid import Table, Tile, write_sheet, write_video


@dataclass(frozen=True)
class Results:
    grid: Path | None
    """None if no cell has more than one frame."""
    sheet: Path
    page: Path


def write_results(plan: Plan, record: Record) -> Results:
    """Write `grid.mp4`, `sheet.jpg` and `index.html` into the sweep's folder. Raises BadInput, OSError."""
    cells = _arranged(plan)
    entries = [[_entry(cell, record) for cell in row] for row in cells.cells]
    tiles = [[Tile(record.folder / entry.path if entry.path else None, entry.code) for entry in row] for row in entries]
    table = Table(_title(plan), cells.columns, cells.rows, tiles)
    sheet, grid, target = (record.folder / name for name in ("sheet.jpg", "grid.mp4", "index.html"))
    written = write_video(table, grid)
    if not written:
        grid.unlink(missing_ok=True)  # of an earlier run
    write_sheet(table, sheet)
    part = target.with_name(f".{target.name}.part")
    part.write_text(page(table, entries, written), encoding="utf-8")
    part.replace(target)
    return Results(grid if written else None, sheet, target)


@dataclass(frozen=True)
class _Arranged:
    """The cells as a table."""

    columns: list[str]
    rows: list[str]
    cells: list[list[Cell]]


def _arranged(plan: Plan) -> _Arranged:
    """Prompts and LoRAs as rows, seeds and scales as columns; one row where only one thing differs."""
    varying = [number for number, axis in enumerate(plan.axes) if len(axis.values) > 1]
    rows, columns = [number for number in varying if number < 2], [number for number in varying if number >= 2]
    if len(varying) == 1:
        rows, columns = [], varying
    elif not rows or not columns:
        rows, columns = varying[:1], varying[1:]
    by_place = {cell.place: cell for cell in plan.cells}

    def combinations(axes: list[int]) -> list[dict[int, int]]:
        return [
            dict(zip(axes, values, strict=True)) for values in product(*(range(len(plan.axes[axis].values)) for axis in axes))
        ]

    def at(chosen: dict[int, int]) -> Cell:
        return by_place[tuple(chosen.get(axis, 0) for axis in range(len(plan.axes)))]

    def heading(chosen: dict[int, int]) -> str:
        return "\n".join(plan.axes[axis].in_words(value) for axis, value in chosen.items())

    return _Arranged(
        [heading(column) for column in combinations(columns)],
        [heading(row) for row in combinations(rows)],
        [[at(row | column) for column in combinations(columns)] for row in combinations(rows)],
    )


def _title(plan: Plan) -> str:
    """What all cells have in common; the prompt last, as it is the longest."""
    common = [axis.in_words(0) for axis in plan.axes[1:] + plan.axes[:1] if len(axis.values) == 1 and axis.values[0]]
    return " · ".join([plan.model, *common]).replace("\n", " ")


def _entry(cell: Cell, record: Record) -> Entry:
    state = record.state(cell)
    if record.is_done(cell):
        return Entry(cell.title, state.path, warnings=state.warnings)
    return Entry(cell.title, None, state.code or "NOT MADE", state.message)
