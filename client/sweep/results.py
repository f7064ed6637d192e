"""Writes what a sweep is for: one grid video, one contact sheet, and a page to look through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.sweep.page import Entry, page
from client.sweep.plan import Cell, Plan
from client.sweep.record import Record
from client.sweep.table import arranged, title_of
from tools.grid import Table, Tile, write_sheet, write_video


@dataclass(frozen=True)
class Results:
    grid: Path | None
    """None if no cell has more than one frame."""
    sheet: Path
    page: Path


def write_results(plan: Plan, record: Record) -> Results:
    """Write `grid.mp4`, `sheet.jpg` and `index.html` into the sweep's folder. Raises BadInput, OSError."""
    cells = arranged(plan)
    entries = [[_entry(cell, record) for cell in row] for row in cells.cells]
    tiles = [[Tile(record.folder / entry.path if entry.path else None, entry.code) for entry in row] for row in entries]
    table = Table(title_of(plan), cells.columns, cells.rows, tiles)
    sheet, grid, target = (record.folder / name for name in ("sheet.jpg", "grid.mp4", "index.html"))
    written = write_video(table, grid)
    if not written:
        grid.unlink(missing_ok=True)  # of an earlier run
    write_sheet(table, sheet)
    part = target.with_name(f".{target.name}.part")
    part.write_text(page(table, entries, written), encoding="utf-8")
    part.replace(target)
    return Results(grid if written else None, sheet, target)


def _entry(cell: Cell, record: Record) -> Entry:
    state = record.state(cell)
    if record.is_done(cell):
        return Entry(cell.title, state.path, warnings=state.warnings)
    return Entry(cell.title, None, state.code or "NOT MADE", state.message)
