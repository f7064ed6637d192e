"""The HTML page of a sweep: the cells in a table that plays in step, each with its full size on a click.

The page is one file beside the videos, and loads nothing else. All cells are cut from the one grid video: in one file they stay
in step even if the browser drops frames. The text comes from requests, files' names and the worker; none of it becomes markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tools.grid import Grid, Table

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Entry:
    """What the page says of one cell."""

    title: str
    path: str | None
    """The file's, relative to the page; None for a cell that failed."""
    code: str = ""
    message: str = ""
    warnings: tuple[str, ...] = ()


def page(table: Table, entries: Sequence[Sequence[Entry]], grid: Grid | None) -> str:
    """The page's text. `entries`: by row and column, as the table's tiles. `grid`: None where the cells are images."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script
    every = [entry for row in entries for entry in row]
    failed = [entry for entry in every if not entry.path]
    count = f"{len(every)} video{'s' * (len(every) != 1)}" + (f", {len(failed)} of them failed" if failed else "")
    warnings = {text: None for entry in every for text in entry.warnings}
    parts = {
        "script-hash": base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode(),
        "title": _text(table.title),
        "count": count,
        "table": _table(table, entries, grid),
        "failed": _list("Failed", (f"{entry.title}: {entry.code}: {entry.message}" for entry in failed)),
        "warnings": _list("Warnings", warnings),
        "grid": '<video id="grid" src="grid.mp4" muted loop playsinline preload="auto"></video>' if grid else "",
    }
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda match: parts[match[1]], template)


def _table(table: Table, entries: Sequence[Sequence[Entry]], grid: Grid | None) -> str:
    data = {}
    if grid:
        layout = grid.layout
        data = {"width": layout.tile[0], "height": layout.tile[1], "fps": grid.fps, "frames": grid.num_frames}
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in table.columns)
    rows = [
        f'<tr><th scope="row">{f"<span>{_text(heading)}</span>" if heading else ""}</th>'
        + "".join(_cell(entry, grid.layout.corner(row, column) if grid else None) for column, entry in enumerate(cells))
        + "</tr>"
        for row, (heading, cells) in enumerate(zip(table.rows, entries, strict=True))
    ]
    attributes = "".join(f' data-{name}="{value}"' for name, value in data.items())
    return f'<table id="table"{attributes}><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(entry: Entry, corner: tuple[int, int] | None) -> str:
    title = html.escape(entry.title)
    if not entry.path:
        return f'<td class="failed" title="{html.escape(entry.message)}">{_text(entry.code)}</td>'
    url = html.escape(quote(entry.path))
    inside = f'<canvas data-x="{corner[0]}" data-y="{corner[1]}"></canvas>' if corner else f'<img src="{url}" alt="">'
    return f'<td><button type="button" data-file="{url}" aria-label="{title}">{inside}</button></td>'


def _list(heading: str, texts: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(text)}</li>" for text in texts)
    return f"<h2>{heading}</h2><ul>{items}</ul>" if items else ""


def _text(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
