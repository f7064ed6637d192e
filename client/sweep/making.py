"""Has the cells made: a few jobs at a time in the endpoint's queue, each noted before the next step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from client import client as polling
from client.client import Client
from client.display import Display
from client.errors import ClientError, DownloadFailed, JobFailed, JobNotFound, JobStopped, SubmissionUnknown
from client.result import Progress, has_ended, result_of
from client.sweep.plan import Cell
from client.sweep.record import Job, Record


@dataclass
class _Running:
    cell: Cell
    job_id: str
    answers: Iterator[dict[str, Any]]
    sent_before: bool = False
    """By an earlier run of the command."""
    percent: int = 0


class Making:
    """The jobs of one run of the command."""

    def __init__(self, cells: Iterable[Cell], record: Record, client: Client, display: Display) -> None:
        unique = {cell.key: cell for cell in cells}
        self._record, self._client, self._display = record, client, display
        missing = [cell for cell in unique.values() if not record.is_done(cell)]
        # Jobs that were sent before run, or have run, already.
        self._waiting = deque(sorted(missing, key=lambda cell: self._noted_job(cell) is None))
        self._count, self._ended = len(unique), len(unique) - len(missing)
        self._running: list[_Running] = []
        self._said: set[str] = set()
        self.errors: list[ClientError] = []
        """Those of the cells that failed."""
        self.full_run_seconds = 0.0
        """How long the full run of the drafts that were made would take the GPU."""

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that were sent and have not ended."""
        return [running.job_id for running in self._running]

    def run(self, concurrency: int) -> None:
        """Have all cells made that are missing. A job that fails is noted, and the others go on.

        Raises Unreachable, NotAuthorized, JobNotFound and Refused, if the endpoint cannot be used: no cell could be made.
        """
        if self._ended:
            self._display.say(f"{self._ended} of {self._count} are done already")
        while self._waiting or self._running:
            while self._waiting and len(self._running) < concurrency:
                self._start(self._waiting.popleft())
            for running in list(self._running):
                self._look_at(running)
            percent = (100 * self._ended + sum(running.percent for running in self._running)) // max(self._count, 1)
            if self._running:
                place = min(self._ended, self._count - 1)
                self._display.show(
                    Progress("", "IN_PROGRESS", "sweep", prompt_index=place, prompts=self._count, percent=percent)
                )
                time.sleep(polling.SECONDS_BETWEEN_POLLS)

    def _noted_job(self, cell: Cell) -> Job | None:
        """The cell's job that was sent to this endpoint by an earlier run."""
        job = self._record.state(cell).job
        return job if job and job.url == self._client.url else None

    def _start(self, cell: Cell) -> None:
        if job := self._noted_job(cell):
            self._display.say(f"job {job.id}, sent before: {cell.title}")
            self._running.append(_Running(cell, job.id, self._client.answers(job.id), sent_before=True))
        else:
            self._submit(cell)

    def _submit(self, cell: Cell) -> None:
        try:
            job_id = self._client.submit(cell.job, folder=None)
        except SubmissionUnknown as error:
            self._fail(cell, error)
            return
        except KeyboardInterrupt:
            self._display.say("interrupted while a request was sent: its job may run")
            raise
        self._record.submitted(cell, Job(job_id, self._client.url))
        self._display.say(f"job {job_id}: {cell.title}")
        self._running.append(_Running(cell, job_id, self._client.answers(job_id)))

    def _look_at(self, running: _Running) -> None:
        """Ask for the job's status. When it has ended, download its file."""
        try:
            answer = next(running.answers)
        except JobNotFound as error:
            self._running.remove(running)
            if running.sent_before:  # its result was deleted: RunPod keeps it for 30 minutes
                self._display.say(f"job {running.job_id} is gone; its video is made again: {running.cell.title}")
                self._submit(running.cell)
            else:
                self._fail(running.cell, error)
            return
        if has_ended(answer):
            self._end(running.cell, running.job_id, answer)
            self._running.remove(running)
        else:
            running.percent = min(Progress.of(running.job_id, answer).percent or 0, 99)

    def _end(self, cell: Cell, job_id: str, answer: dict[str, Any]) -> None:
        try:
            result = result_of(job_id, answer)
            for warning in result.warnings:
                if warning not in self._said:  # most cells have the same ones
                    self._said.add(warning)
                    self._display.say(f"warning: {warning}")
            if not result.outputs:
                first = result.failed[0] if result.failed else None
                raise JobFailed(f"{first.code}: {first.message}" if first else "the job made no video")
            output = result.outputs[0]
            self.full_run_seconds += result.full_run_seconds or 0.0
            path = self._client.download_file(output, self._record.videos, f"{cell.name}{output.suffix}")
        except (JobFailed, JobStopped, DownloadFailed) as error:
            self._fail(cell, error)
        else:
            self._record.done(cell, path, result.warnings)
            self._ended += 1
            self._display.say(f"done: {cell.title}")

    def _fail(self, cell: Cell, error: ClientError) -> None:
        text = str(error).removeprefix(f"{error.code}: ")
        self._record.failed(cell, error.code, text, keep_job=isinstance(error, DownloadFailed))
        self.errors.append(error)
        self._ended += 1
        self._display.say(f"failed: {cell.title}: {error.code}: {text}")
