"""Remembers on disk what became of each cell, so that a sweep that was stopped, or killed, goes on where it was.

`sweep.jsonl` has a line for each thing that happened. Lines are only added, and each is on disk before the next step is taken.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import TypeAdapter

from client.errors import BadInput
from client.sweep.plan import Cell

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Job:
    id: str
    url: str
    """The address of the API that it was sent to."""


@dataclass(frozen=True)
class State:
    """What became of a cell so far."""

    job: Job | None = None
    """Sent, and not known to have ended."""
    path: str | None = None
    """The finished file, relative to the sweep's folder."""
    bytes: int = 0
    warnings: tuple[str, ...] = ()
    """The worker's."""
    code: str | None = None
    """The code of the error that the cell ended with."""
    message: str = ""


_STATE = TypeAdapter(State)


class Record:
    """The states of a sweep's cells. A context manager: no other process uses the folder at the same time."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput where another sweep uses the folder, OSError."""
        self.folder = folder
        self.videos = folder / "videos"
        self.videos.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "sweep.jsonl").open("a+", encoding="utf-8")
        if fcntl:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise BadInput(
                    f"another sweep is at work in {folder}; wait for it, or give --output-dir another folder"
                ) from None
        self._states: dict[str, State] = {}
        self._read()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()

    def state(self, cell: Cell) -> State:
        return self._states.get(cell.key, State())

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell's file is there, as it was downloaded."""
        state = self.state(cell)
        path = self.folder / state.path if state.path else None
        return path is not None and path.is_file() and path.stat().st_size == state.bytes

    def as_json(self, cell: Cell) -> dict[str, Any]:
        """What the command prints of a cell with --json."""
        state, prompt = self.state(cell), cell.job["input"]["prompts"][0]
        made = (
            {"path": str(self.folder / state.path)} if state.path else {"error": {"code": state.code, "message": state.message}}
        )
        return {"prompt": prompt["prompt"], "seed": prompt["seed"], "loras": cell.job["input"]["loras"], **made}

    def submitted(self, cell: Cell, job: Job) -> None:
        self._add(cell, State(job))

    def done(self, cell: Cell, path: Path, warnings: tuple[str, ...]) -> None:
        self._add(cell, State(path=path.relative_to(self.folder).as_posix(), bytes=path.stat().st_size, warnings=warnings))

    def failed(self, cell: Cell, code: str, message: str, keep_job: bool = False) -> None:
        """`keep_job`: the job's result may still be there, and is asked for the next time."""
        self._add(cell, State(self.state(cell).job if keep_job else None, code=code, message=message))

    def _add(self, cell: Cell, state: State) -> None:
        self._states[cell.key] = state
        self._file.write(json.dumps({"cell": cell.key, "title": cell.title, **asdict(state)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line of a process that was killed can be cut short
                noted = json.loads(line)
                self._states[noted["cell"]] = _STATE.validate_python(noted)
        if text and not text.endswith("\n"):
            self._file.write("\n")
        for part in self.videos.glob(".download-*"):  # of a process that was killed
            part.unlink(missing_ok=True)
