"""The sweeps of this playground: what they make, the thread that has it made, and the video in which all plays in step.

`client.sweep` decides the cells. Each cell is a job like any other run, and knows its sweep and its place in it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

from client import Client, ClientError, DownloadFailed, InvalidRequest, JobNotFound, NotAuthorized, Refused, Unreachable
from client.errors import BadInput
from client.sweep.plan import Plan, TriedLora, sweep_of
from client.sweep.table import Arranged, arranged, title_of
from playground.jobs import Job, Jobs, NoFile
from playground.store import Store
from tools.grid import Table, Tile, write_video
from worker.errors import Code, Problem

MOST = 60
"""Videos of one sweep: more do not fit on a screen, nor into a person's patience."""

_AT_ONCE = 3
"""Jobs of sweeps in the worker's queue at the same time, so that another run does not wait for a whole sweep."""

_TILE, _ALL_TILES = 384, 2_500_000
"""Pixels of a tile's longer side in the video of all cells, and of all tiles together, which decide how long it takes to draw.
The page shows hardly more; a click shows the original."""

_SECONDS_BETWEEN_LOOKS = {"local": 0.4, "endpoint": 1.5}
_SECONDS_UNTIL_RETRY = 4.0
_INDEX = "sweeps.json"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Asked:
    """A sweep as the page asks for it."""

    request: dict[str, Any]
    """The form's; its own LoRAs, scale and seed count where an axis has no values."""
    loras: tuple[str | TriedLora, ...]
    scales: str
    """As "0.6, 0.8, 1"."""
    seeds: str

    @classmethod
    def of(cls, body: Any) -> Asked:
        """Raises BadInput."""
        try:
            request, scales, seeds = body["request"], str(body["scales"]), str(body["seeds"])
            loras = tuple(
                lora if isinstance(lora, str) else TriedLora(str(lora["title"]), _items(lora)) for lora in body["loras"]
            )
            if not (request["prompts"] and all(isinstance(item, dict) for item in [*request["prompts"], *request["loras"]])):
                raise TypeError
        except (KeyError, TypeError):
            raise BadInput("a sweep is `request`, `loras`, `scales` and `seeds`") from None
        return cls(request, loras, scales, seeds)

    def plan(self, is_local: bool) -> Plan:
        """Raises InvalidRequest."""
        prompts = [prompt | {"num_videos": 1} for prompt in self.request["prompts"]]
        scales = _numbers(float, self.scales, "--scale", "numbers, such as 0.6, 0.8, 1")
        seeds = _numbers(int, self.seeds, "--seed", "whole numbers, such as 42, 43")
        # Before they are made: thousands would take minutes to check. Two lines of `loras` can be one LoRA.
        _limit(len(prompts) * max(len(self.loras) // 2, 1) * max(len(scales), 1) * max(len(seeds), 1))
        plan = sweep_of(self.request | {"prompts": prompts}, self.loras, scales, seeds, is_local)
        _limit(len(plan.cells))
        return plan

    def without_token(self) -> Asked:
        request = {name: value for name, value in self.request.items() if name != "hf_token"}
        return Asked(request, self.loras, self.scales, self.seeds)


def _limit(count: int) -> None:
    if count > MOST:
        text = f"a sweep has at most {MOST} videos, and this one has {count}; take fewer LoRAs, scales or seeds"
        raise InvalidRequest([Problem(Code.INVALID_INPUT, "", text)])


def _items(lora: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: item[name] for name in ("path", "transformer") if name in item} for item in lora["loras"])


def _numbers(kind: type[Number], text: str, field: str, means: str) -> list[Number]:
    try:
        return [kind(part) for part in text.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        raise InvalidRequest([Problem(Code.INVALID_INPUT, field, f"must be {means}")]) from None


@dataclass
class _Cell:
    """What is known of a cell beside its job."""

    state: str = "wanted"
    """wanted; sending; stopping: cancelled while it was sent; or settled: its job or its error says the rest."""
    code: str = ""
    """The code of the error for which it could not be sent."""
    error: str = ""


@dataclass
class Sweep:
    """One sweep."""

    number: int
    asked: Asked
    """Without the Hugging Face token."""
    plan: Plan
    after: int
    """The number of the last run before it."""
    token: str | None = None
    """The Hugging Face token, which is not stored."""
    cells: list[_Cell] = field(default_factory=list)
    trouble: str = ""
    """Why nothing can be sent at the moment."""

    def title_at(self, place: int) -> str:
        return self.plan.cells[place].title


class Sweeps:
    """All sweeps that were not deleted, and the thread that sends their jobs. Its methods may be called from any thread."""

    def __init__(self, client: Client, jobs: Jobs, folder: Path, store: Store | None = None) -> None:
        """`folder`: for temporary files. `store`: where the sweeps outlive the process; None: they end with it."""
        self._client, self._jobs, self._folder, self._store_of_lists = client, jobs, folder, store
        self._lock = threading.RLock()
        self._drawing = threading.Lock()
        self._grids: dict[int, tuple[str, dict[str, Any]]] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._sweeps: dict[int, Sweep] = self._stored()
        self._wake()

    def close(self) -> None:
        """Send nothing more. What is in the queue goes on."""
        self._closed.set()
        if thread := self._thread:
            thread.join(_SECONDS_UNTIL_RETRY)

    # What the page asks for

    def plan(self, body: Any) -> dict[str, Any]:
        """What a sweep would make: its `problems`, or its table and how long it would take. Raises BadInput."""
        asked = Asked.of(body)
        try:
            plan = asked.plan(self._client.is_local)
        except InvalidRequest as error:
            return {"problems": [vars(problem) for problem in error.problems]}
        table = arranged(plan)
        shown = {"problems": [], "rows": table.rows, "columns": table.columns, "count": len(plan.cells)}
        return shown | {"known": _known_seconds(asked.request, self._jobs.all())}

    def start(self, body: Any) -> dict[str, Any]:
        """Start a sweep. Raises BadInput, InvalidRequest."""
        asked = Asked.of(body)
        plan = asked.plan(self._client.is_local)
        after = max((job.number for job in self._jobs.all()), default=0)
        with self._lock:
            number = max(self._sweeps, default=0) + 1
            sweep = Sweep(
                number, asked.without_token(), plan, after, asked.request.get("hf_token"), [_Cell() for _ in plan.cells]
            )
            self._sweeps[number] = sweep
            self._store()
            self._wake()
        return self.public(number)

    def all(self) -> list[dict[str, Any]]:
        return [self.public(number) for number in list(self._sweeps)]

    def public(self, number: int) -> dict[str, Any]:
        """The sweep for the page, as JSON. Raises NoFile."""
        sweep, jobs = self._get(number), self._jobs_of(number)
        table, places = _places(sweep.plan)
        cells = [_shown(place, sweep, jobs.get(place)) for place in range(len(sweep.cells))]
        is_open = any(cell["status"] in ("waiting", "queued", "running") for cell in cells)
        seconds = [taken for job in jobs.values() if (taken := _seconds(job))]
        return {
            "number": number,
            "title": title_of(sweep.plan),
            "rows": table.rows,
            "columns": table.columns,
            "cells": [[cells[place] for place in row] for row in places],
            "is_open": is_open,
            "trouble": sweep.trouble if is_open else "",
            "size": [sweep.plan.cells[0].job["input"]["prompts"][0].get(side) for side in ("width", "height")],
            "after": sweep.after,
            "seconds": sum(seconds) / len(seconds) if seconds else None,
        }

    def cancel(self, number: int) -> dict[str, Any]:
        """Send no more of its jobs, and cancel those that were sent. Raises NoFile, ClientError."""
        with self._lock:
            for cell in self._get(number).cells:
                cell.state = "settled" if cell.state == "wanted" else "stopping" if cell.state == "sending" else cell.state
            self._store()
        for job in self._jobs_of(number).values():
            self._jobs.cancel(job.number)
        return self.public(number)

    def again(self, number: int, place: int | None, token: str | None) -> dict[str, Any]:
        """Make a cell again that was not made, or with None all of them. Raises NoFile."""
        jobs = self._jobs_of(number)
        with self._lock:
            sweep = self._get(number)
            sweep.token = token or sweep.token
            for at in range(len(sweep.cells)) if place is None else [place]:
                job = jobs.get(at)
                if at < len(sweep.cells) and _shown(at, sweep, job)["status"] in ("failed", "cancelled"):
                    if job:
                        self._jobs.delete(job.number)
                    sweep.cells[at] = _Cell()
            self._store()
            self._wake()
        return self.public(number)

    def delete(self, number: int) -> None:
        """Forget a sweep that has ended, with its runs and their files here. Raises NoFile."""
        if self.public(number)["is_open"]:
            raise NoFile("this sweep has not ended; cancel it first")
        for job in self._jobs_of(number).values():
            self._jobs.delete(job.number)
        with self._lock:
            del self._sweeps[number]
            self._store()

    def grid(self, number: int) -> dict[str, Any]:
        """The video of all finished cells: its `file`, and where each cell is in it. Empty where there is none.

        Raises NoFile, BadInput, OSError.
        """
        sweep = self._get(number)
        done = {place: job for place, job in self._jobs_of(number).items() if job.status == "done" and job.files}
        names = json.dumps([[place, job.id] for place, job in sorted(done.items())])
        name = f"sweep-{number}-{hashlib.sha256(names.encode()).hexdigest()[:16]}.mp4"
        with self._drawing:
            drawn, grid = self._grids.get(number, ("", {}))
            if drawn != name:
                grid = self._draw(sweep, done, self._folder / name)
                (self._folder / drawn).unlink(missing_ok=True) if drawn else None
                self._grids[number] = (name, grid)
        return {"file": name, **grid} if grid else {}

    def title(self, job: Job) -> str:
        """What the job's cell is called; empty for a run that belongs to no sweep."""
        sweep = self._sweeps.get(job.sweep)
        return sweep.title_at(job.cell) if sweep else ""

    # The video of all cells

    def _draw(self, sweep: Sweep, done: dict[int, Job], target: Path) -> dict[str, Any]:
        films = {}
        for place, job in done.items():
            with suppress(NoFile, DownloadFailed):  # the page shows why when the run is opened
                films[place] = self._jobs.file(job.number, 0)
        table, places = _places(sweep.plan)
        tiles = [[Tile(films.get(place)) for place in row] for row in places]
        longest = min(_TILE, isqrt(_ALL_TILES * 16 // (9 * len(sweep.cells))))
        written = write_video(Table(title_of(sweep.plan), table.columns, table.rows, tiles), target, longest)
        if not written:
            return {}
        corners = {
            place: written.layout.corner(row, column)
            for row, line in enumerate(places)
            for column, place in enumerate(line)
            if place in films
        }
        width, height = written.layout.tile
        return {"width": width, "height": height, "fps": written.fps, "frames": written.num_frames, "corners": corners}

    # The thread that sends the jobs

    def _wake(self) -> None:
        """Start the thread if there is something to do and none is at it."""
        with self._lock:
            is_at_it = self._thread is not None and self._thread.is_alive()
            if not is_at_it and not self._closed.is_set() and self._open():
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _open(self) -> list[int]:
        jobs = [job.sweep for job in self._jobs.all() if job.sweep and not job.has_ended]
        return [
            number
            for number, sweep in self._sweeps.items()
            if number in jobs or any(cell.state != "settled" for cell in sweep.cells)
        ]

    def _work(self) -> None:
        pause = _SECONDS_BETWEEN_LOOKS["local" if self._client.is_local else "endpoint"]
        while not self._closed.is_set():
            with self._lock:
                if not self._open():
                    self._thread = None
                    return
            room = _AT_ONCE - self._look()
            taken = all(self._send() for _ in range(room))
            self._closed.wait(pause if taken else _SECONDS_UNTIL_RETRY)

    def _look(self) -> int:
        """Ask for the jobs in the queue. Returns how many are still there."""
        waiting = [job for job in self._jobs.all() if job.sweep and not job.has_ended]
        for job in waiting:
            with suppress(NoFile):
                self._jobs.refresh(job.number)
        return sum(not job.has_ended for job in waiting)

    def _send(self) -> bool:
        """Send the next job, if there is one. Returns False if nobody takes it at the moment."""
        with self._lock:
            cells = [(sweep, at, cell) for sweep in self._sweeps.values() for at, cell in enumerate(sweep.cells)]
            sweep, place, cell = next((found for found in cells if found[2].state == "wanted"), (None, 0, _Cell()))
            if sweep is None:
                return True
            cell.state = "sending"
        request = sweep.plan.cells[place].job["input"]
        try:
            job = self._jobs.start(request | ({"hf_token": sweep.token} if sweep.token else {}), sweep.number, place)
        except ClientError as error:
            return self._not_sent(sweep, cell, error)
        with self._lock:
            is_stopped = cell.state == "stopping"
            cell.state, sweep.trouble = "settled", ""
            self._store()
        if is_stopped:
            with suppress(ClientError):
                self._jobs.cancel(job.number)
        return True

    def _not_sent(self, sweep: Sweep, cell: _Cell, error: ClientError) -> bool:
        """Note it at the cell, or at all that wait if they cannot be sent either. Returns False if it can pass by itself."""
        with self._lock:
            if isinstance(error, Unreachable):
                cell.state, sweep.trouble = "settled" if cell.state == "stopping" else "wanted", str(error)
                return False
            cannot_be_used = isinstance(error, (NotAuthorized, JobNotFound, Refused))
            for lost in [cell, *(other for other in sweep.cells if cannot_be_used and other.state == "wanted")]:
                lost.state, lost.code, lost.error = "settled", error.code, str(error)
            self._store()
        return True

    def _get(self, number: int) -> Sweep:
        if number not in self._sweeps:
            raise NoFile("this playground does not have this sweep")
        return self._sweeps[number]

    def _jobs_of(self, number: int) -> dict[int, Job]:
        """The jobs of a sweep by the place of their cells."""
        return {job.cell: job for job in self._jobs.all() if job.sweep == number}

    # What outlives the process

    def _stored(self) -> dict[int, Sweep]:
        """The sweeps of the process before this one; none if their list cannot be read."""
        sweeps = {}
        with suppress(OSError, ValueError, TypeError, KeyError):
            for stored in self._store_of_lists.read(_INDEX) if self._store_of_lists else []:
                with suppress(ClientError, BadInput):
                    sweeps[stored["number"]] = self._restored(stored)
        return sweeps

    def _restored(self, stored: dict[str, Any]) -> Sweep:
        """Raises KeyError, TypeError, ClientError and BadInput for one that cannot be read."""
        number, asked, jobs = stored["number"], Asked.of(stored["asked"]), self._jobs_of(stored["number"])
        plan, cells = asked.plan(self._client.is_local), [_Cell(**cell) for cell in stored["cells"]]
        if len(plan.cells) != len(cells):
            raise BadInput("another version made it")
        for place, cell in enumerate(cells):
            cell.state = "settled" if place in jobs or cell.state in ("stopping", "settled") else "wanted"
            if cell.state == "wanted" and stored["had_token"]:
                cell.state, cell.code, cell.error = "settled", "NO_TOKEN", _NOT_KEPT
        return Sweep(number, asked, plan, stored["after"], None, cells)

    def _store(self) -> None:
        if self._store_of_lists:
            self._store_of_lists.write(_INDEX, [_as_stored(sweep) for sweep in self._sweeps.values()])


_NOT_KEPT = (
    "the playground was started again and has not kept the Hugging Face token; enter it in the form, and make this again"
)


def _as_stored(sweep: Sweep) -> dict[str, Any]:
    asked = sweep.asked
    loras = [lora if isinstance(lora, str) else {"title": lora.title, "loras": lora.items} for lora in asked.loras]
    return {
        "number": sweep.number,
        "asked": {"request": asked.request, "loras": loras, "scales": asked.scales, "seeds": asked.seeds},
        "after": sweep.after,
        "had_token": sweep.token is not None,
        "cells": [asdict(cell) for cell in sweep.cells],
    }


def _places(plan: Plan) -> tuple[Arranged, list[list[int]]]:
    """The plan's table, and the number of the cell at each place in it."""
    table = arranged(plan)
    numbers = {cell.place: number for number, cell in enumerate(plan.cells)}
    return table, [[numbers[cell.place] for cell in row] for row in table.cells]


def _shown(place: int, sweep: Sweep, job: Job | None) -> dict[str, Any]:
    """A cell for the page."""
    cell = sweep.cells[place]
    shown: dict[str, Any] = {"place": place, "title": sweep.title_at(place), "job": job.number if job else None}
    if job is None:
        status = "waiting" if cell.state != "settled" else "failed" if cell.code else "cancelled"
        return shown | {"status": status, "code": cell.code, "error": cell.error}
    shown |= {"status": job.status, "progress": job.progress, "trouble": job.trouble, "code": job.code}
    shown |= {"error": job.problems[0].text if job.problems else job.error.removeprefix(f"{job.code}: ")}
    if job.status == "done" and job.result:
        items = [item for group in job.result["outputs"].values() for item in group]
        if not items:
            error = next((failed["message"] for failed in job.result.get("errors", ())), "the job made no video")
            return shown | {"status": "failed", "code": "JOB_FAILED", "error": error}
        shown |= {name: items[0].get(name) for name in ("file", "play", "poster", "width", "height", "format")}
    return shown


def _seconds(job: Job) -> float:
    """The worker's seconds for a finished job, without those in which it waited for another one; 0 if they are not known."""
    timings = job.result.get("timings", {}) if job.result else {}
    return float(timings.get("total", 0) - timings.get("wait", 0))


def _known_seconds(request: dict[str, Any], jobs: Sequence[Job]) -> dict[str, Any] | None:
    """The `seconds` that a video of the request takes, by the last `run` of the same model; None where there is none.

    `is_same`: whether that run had the same size, frames and steps. Otherwise the seconds are in proportion to them.
    """
    prompt = request["prompts"][0]
    for job in reversed(jobs):
        result, made = job.result or {}, job.request["prompts"][0]
        if job.status != "done" or job.request["model"] != request["model"] or _is_draft(job.request) != _is_draft(request):
            continue
        count = sum(len(group) for group in result["outputs"].values())
        if count and (seconds := _seconds(job)):
            with suppress(TypeError, ZeroDivisionError, KeyError):
                ratio = _work(prompt) / _work(made)
                return {"seconds": seconds / count * ratio, "run": job.number, "is_same": ratio == 1}
    return None


def _is_draft(request: dict[str, Any]) -> bool:
    return bool(request.get("draft"))


_OF_WORK = ("width", "height", "num_frames", "sample_steps")


def _work(prompt: dict[str, Any]) -> float:
    """Something in proportion to the seconds of a video: steps, passes and pixels. The page sends all of these numbers."""
    product = 2.0 if prompt.get("guidance_scale") != 1 else 1.0
    for name in _OF_WORK:
        product *= prompt[name]
    return product
