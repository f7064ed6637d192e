"""Arranges the cells of a sweep as a table: which differences are rows, which are columns, and their headings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from client.sweep.plan import Cell, Plan


@dataclass(frozen=True)
class Arranged:
    """The cells as a table."""

    columns: list[str]
    rows: list[str]
    cells: list[list[Cell]]


def arranged(plan: Plan) -> Arranged:
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

    return Arranged(
        [heading(column) for column in combinations(columns)],
        [heading(row) for row in combinations(rows)],
        [[at(row | column) for column in combinations(columns)] for row in combinations(rows)],
    )


def title_of(plan: Plan) -> str:
    """What all cells have in common; the prompt last, as it is the longest."""
    common = [axis.in_words(0) for axis in plan.axes[1:] + plan.axes[:1] if len(axis.values) == 1 and axis.values[0]]
    draft = ["draft"] if plan.cells[0].is_draft else []
    return " · ".join([plan.model, *draft, *common]).replace("\n", " ")
