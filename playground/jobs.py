"""The jobs of this playground: their requests, progress, results and files."""

from __future__ import annotations

import copy
import tempfile
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from client import (
    Client,
    ClientError,
    DownloadFailed,
    JobFailed,
    JobNotFound,
    JobStopped,
    NotAuthorized,
    Output,
    Picture,
    Progress,
    Refused,
    Result,
    Unreachable,
)
from client.client import LOCAL_PATIENCE, LOOPBACK, PATIENCE
from client.result import RUNNING, File, has_ended, result_of
from playground.check import served_model
from playground.store import Store
from tools.frames import read_clip
from worker.errors import Problem
from worker.video import VIDEO, encode

CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".zip": "application/zip",
}
"""The types of a job's files. No other file is served."""


_SECONDS_UNKNOWN = 60.0
"""After so long with a status that RunPod does not have, a job counts as failed."""


_FORGOTTEN = "the worker was started again while this ran, and has forgotten it; run it again"


class NoFile(Exception):
    """The job or file does not exist; the text says why."""


@dataclass
class Job:
    """One job."""

    number: int
    id: str
    request: dict[str, Any]
    """Without its Hugging Face token."""
    sweep: int = 0
    """The number of the sweep that it is a cell of; 0 for a run by itself."""
    cell: int = 0
    """Which of the sweep's cells it is, from 0."""
    started_at: float = field(default_factory=time.time)
    status: str = "queued"
    """queued, running, done, failed or cancelled."""
    seconds: float = 0.0
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    """The worker's result. Each file in it has the path `file`, under which this process serves it."""
    code: str = ""
    error: str = ""
    problems: tuple[Problem, ...] = ()
    served_model: str | None = None
    """The model that the worker serves, if the request named another one."""
    files: list[File] = field(default_factory=list)
    """Those of the result, by their number in /files."""
    answer: dict[str, Any] | None = None
    """The last answer to /status, of which the rest is made, once the job has ended by one."""
    trouble: str = ""
    """Why there was no answer when the job was last asked for; empty when there was one."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """What came from the worker, in its order: `seconds` since the start, `kind` (status, progress, warning or error), and
    `text` or `progress`.
    """
    _unknown_since: float | None = None
    _silent_since: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.status not in ("queued", "running")

    def update(self, answer: dict[str, Any]) -> None:
        """Take over an answer to /status."""
        if self.has_ended:
            return
        self.seconds = round(time.time() - self.started_at, 1)
        if self.trouble:
            self._note("status", "the worker answers again")
        self.trouble, self._silent_since = "", None
        if not has_ended(answer):
            status = "queued" if answer["status"] == "IN_QUEUE" else "running"
            if status != self.status or not self.log:
                self._note("status", "waiting for a worker" if status == "queued" else "a worker has the job")
            self.status = status
        if Progress.of(self.id, answer).stage:
            self._note_progress(answer["output"])
            self.progress = answer["output"]
        if not has_ended(answer):
            if answer["status"] in RUNNING:
                self._unknown_since = None
                return
            self._unknown_since = self._unknown_since or time.time()
            if time.time() - self._unknown_since > _SECONDS_UNKNOWN:
                self.code, self.error = "JOB_FAILED", f"the status {answer['status'][:40]!r} is not one of RunPod's"
                self._note("error", self.error)
                self.status = "failed"
            return
        self.answer = copy.deepcopy(answer)
        try:
            self.result = self._with_files(result_of(self.id, answer))
            for warning in self.result.get("warnings", ()):
                self._note("warning", warning)
            for failed in self.result.get("errors", ()):
                self._note("error", f"prompts[{failed['prompt_index']}]: {failed['message']}")
            self._note("status", "done")
            self.status = "done"  # last, since other threads read it
        except (JobFailed, JobStopped) as error:
            self.code, self.error, self.problems = error.code, str(error), error.problems
            self.served_model = served_model(error.problems, self.request.get("model"))
            cancelled = error.code == "CANCELLED"
            self._note("status" if cancelled else "error", self.error)
            self.status = "cancelled" if cancelled else "failed"

    def _note(self, kind: str, text: str) -> None:
        self.log.append({"seconds": self.seconds, "kind": kind, "text": text})

    def _note_progress(self, progress: dict[str, Any]) -> None:
        """Note a tenth of the steps of a video alone, so that the log stays short."""
        last: dict[str, Any] = next((entry["progress"] for entry in reversed(self.log) if entry["kind"] == "progress"), {})
        if all(progress.get(name) == last.get(name) for name in ("stage", "prompt_index")):
            steps = progress.get("step", 0) - last.get("step", 0)
            if 10 * steps < progress.get("steps", 0) or not steps:
                return
        self.log.append({"seconds": self.seconds, "kind": "progress", "progress": progress})

    def unanswered(self, error: Unreachable, patience: float) -> None:
        """Nobody answered for the job. After `patience` seconds of that it counts as failed."""
        self._silent_since = self._silent_since or time.time()
        self.seconds = round(time.time() - self.started_at, 1)
        if not self.trouble:
            self._note("error", str(error))
        self.trouble = str(error)
        if time.time() - self._silent_since > patience:
            self.fail(error)

    def fail(self, error: ClientError, text: str = "") -> None:
        """The job's end is not known and will not be: it counts as failed."""
        if not self.has_ended:
            self.code, self.error, self.trouble = error.code, text or str(error), ""
            self._note("error", self.error)
            self.status = "failed"

    def _with_files(self, result: Result) -> dict[str, Any]:
        outputs = {output.key: output for output in result.outputs}
        for item in [item for group in result.raw["outputs"].values() for item in group]:
            output = outputs[item["key"]]
            item["file"] = self._path_of(output)
            item["play"] = f"{item['file']}.mp4" if output.suffix == ".zip" else item["file"]
            for picture in output.pictures(posters=True):
                item[picture.kind]["file"] = self._path_of(picture)
        return result.raw

    def _path_of(self, file: File) -> str:
        self.files.append(file)
        return f"/files/{self.number}/{len(self.files) - 1}"

    def output(self, place: int) -> Output:
        """The video or image with this number in `files`. Raises NoFile."""
        if place < len(self.files) and isinstance(output := self.files[place], Output):
            return output
        raise NoFile("the job does not have this output")

    def public(self) -> dict[str, Any]:
        """The job for the page, as JSON."""
        shown = {name: value for name, value in vars(self).items() if name not in _NOT_SHOWN}
        return shown | {"problems": [vars(problem) for problem in self.problems]}


_NOT_SHOWN = ("files", "started_at", "answer", "_unknown_since", "_silent_since")
_OF_START = ("number", "id", "request", "sweep", "cell", "started_at")
_STORED = (*_OF_START, "seconds", "code", "error", "answer", "log")
_INDEX = "runs.json"


class Jobs:
    """All jobs that were not deleted. Its methods may be called from any thread."""

    def __init__(self, client: Client, folder: Path, store: Store | None = None) -> None:
        """`folder`: for downloaded files. `store`: where the list of jobs outlives the process; None: it ends with it."""
        self._client = client
        self._folder = folder
        self._store_of_lists = store
        self._jobs: dict[int, Job] = self._stored(store) if store else {}
        self._lock = threading.Lock()
        self._downloading = threading.Lock()

    def start(self, request: dict[str, Any], sweep: int = 0, cell: int = 0) -> Job:
        """Submit a job, as a cell of a sweep if `sweep` names one. Raises ClientError."""
        job_id = self._client.submit(request, folder=None)
        kept = {name: value for name, value in request.items() if name != "hf_token"}
        with self._lock:
            job = Job(max(self._jobs, default=0) + 1, job_id, kept, sweep, cell)
            self._jobs[job.number] = job
            self._store()
        return job

    def delete(self, number: int) -> None:
        """Forget a job that has ended, and delete its files here; those in the bucket stay. Raises NoFile."""
        if not self.get(number).has_ended:
            raise NoFile("this run has not ended; cancel it first")
        with self._lock:
            del self._jobs[number]
            self._store()
        with self._downloading:
            for path in self._folder.glob(f"{number}-*"):
                path.unlink()

    def archive(self, target: Path) -> None:
        """Write a zip with the files of all jobs. A file that can no longer be had is left out."""
        with zipfile.ZipFile(target, "w") as archive:
            for job in self.all():
                for place, file in enumerate(job.files):
                    with suppress(NoFile, DownloadFailed):
                        path = self.file(job.number, place)
                        archive.write(path, f"run-{job.number}-{_name_of(file)}{path.suffix}")

    # What outlives the process: the list of the jobs, and their files, since the URLs of results expire.

    @staticmethod
    def _stored(store: Store) -> dict[int, Job]:
        """The jobs of the process before this one; none if their list cannot be read."""
        jobs = {}
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            for stored in store.read(_INDEX):
                job = Job(**{name: stored[name] for name in _OF_START if name in stored})
                if stored["answer"]:
                    job.update(stored["answer"])
                elif stored["code"]:
                    job.code, job.error, job.status = stored["code"], stored["error"], "failed"
                job.seconds, job.log = stored["seconds"], stored.get("log", [])
                jobs[job.number] = job
        return jobs

    def _store(self) -> None:
        if self._store_of_lists:
            jobs = [{name: getattr(job, name) for name in _STORED} for job in self._jobs.values()]
            self._store_of_lists.write(_INDEX, jobs)

    def _ended(self, job: Job) -> None:
        with self._lock:
            self._store()
        if self._store_of_lists:
            threading.Thread(target=self._download_all, args=(job,), daemon=True).start()

    def _download_all(self, job: Job) -> None:
        for place in range(len(job.files)):
            with suppress(NoFile, DownloadFailed):  # the page shows why when the file is asked for
                self.file(job.number, place)

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def get(self, number: int) -> Job:
        """Raises NoFile."""
        if number not in self._jobs:
            raise NoFile("this playground does not have this job; it was restarted since")
        return self._jobs[number]

    def refresh(self, number: int) -> Job:
        """The job with its present status. Raises NoFile."""
        job = self.get(number)
        if job.has_ended:
            return job
        try:
            answer = self._client.poll(job.id)
        except Unreachable as error:
            with self._lock:
                job.unanswered(error, LOCAL_PATIENCE if self._client.is_local else PATIENCE)
        except JobNotFound as error:
            with self._lock:
                job.fail(error, _FORGOTTEN if self._client.is_local else "")
        except (NotAuthorized, Refused) as error:
            with self._lock:
                job.fail(error, f"{error}. The job may still run; the endpoint's requests in RunPod's console tell")
        else:
            with self._lock:
                job.update(answer)
        if job.has_ended:
            self._ended(job)
        return job

    @property
    def served_model(self) -> str | None:
        """The model id that the latest answer of the worker named, as the one that it serves."""
        named = [job.result["model"] if job.result else job.served_model for job in self.all()]
        return next((name for name in reversed(named) if name), None)

    def cancel(self, number: int) -> Job:
        """Cancel the job. Raises NoFile, ClientError."""
        job = self.get(number)
        if not job.has_ended:
            self._client.cancel(job.id)
        return self.refresh(number)

    def file(self, number: int, place: int) -> Path:
        """A file of a job, downloaded or copied at its first use. Raises NoFile, DownloadFailed."""
        files = self.get(number).files
        if place >= len(files):
            raise NoFile("the job does not have this file")
        url = urlsplit(files[place].url)
        target = self._folder / f"{number}-{place}{Path(unquote(url.path)).suffix.lower()}"
        if target.suffix not in CONTENT_TYPES:
            raise NoFile("the job's file is neither a video nor an image")
        if url.scheme == "file" and urlsplit(self._client.url).hostname not in LOOPBACK:
            raise NoFile("the file is on the worker's own disk; give the worker a bucket to see it here")
        with self._downloading:
            return target if target.exists() else self._client.download_file(files[place], self._folder, target.name)

    def playable(self, number: int, place: int) -> Path:
        """An MP4 of a zip of frames, since browsers do not play those. Raises NoFile, DownloadFailed, BadInput."""
        output, source = self.get(number).output(place), self.file(number, place)
        target = self._folder / f"{number}-{place}-frames.mp4"
        with self._downloading:
            if not target.exists():
                frames = read_clip(source).frames
                part = target.with_suffix(".part.mp4")
                encode([frames], part, VIDEO["mp4"], output.fps, len(frames))
                part.rename(target)
        return target


def _name_of(file: File) -> str:
    """`seed-42` of a video, `seed-42-poster` of its picture."""
    kind = f"seed-{file.seed}" if isinstance(file, Output) else file.kind if isinstance(file, Picture) else "file"
    return f"prompt-{file.prompt_index + 1}-{kind}"


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="playground-")
