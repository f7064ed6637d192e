"""The jobs of this playground: what was asked, how far each is, and the files that it named."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests

from playground.check import Finding, findings
from playground.target import Target, TargetError
from tools.frames import read_clip
from worker.video import VIDEO, encode

_STATUS = {"IN_QUEUE": "queued", "IN_PROGRESS": "running", "COMPLETED": "done", "FAILED": "failed"}
_STATUS |= {"CANCELLED": "cancelled", "TIMED_OUT": "failed"}
_FINAL = ("done", "failed", "cancelled")

CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".zip": "application/zip",
}
"""Of the files that a job can have; no other is served."""

_MAX_BYTES = 2 * 1024**3


class NoFile(Exception):
    """There is no such file here; the text says why."""


@dataclass
class Job:
    """One job. `files`: URLs that its result names, in the order in which they are numbered in /files."""

    number: int
    id: str
    request: dict[str, Any]
    began: float
    status: str = "queued"
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    problems: list[Finding] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)

    def take(self, answer: dict[str, Any]) -> None:
        """What the target says of it now."""
        if self.status in _FINAL:
            return
        self.status = _STATUS.get(str(answer.get("status")), "running")
        self.seconds = round(time.time() - self.began, 1)
        output = answer.get("output")
        if self.status == "running" and isinstance(output, dict) and "stage" in output:
            self.progress = output
        elif self.status == "done":
            self.result = self._with_files(output) if isinstance(output, dict) else {}
        elif self.status == "failed":
            self.error = str(answer.get("error") or "TIMEOUT: RunPod ended the job, which took longer than the endpoint allows")
            self.problems = findings(self.error)

    def _with_files(self, output: dict[str, Any]) -> dict[str, Any]:
        """The result, each of its files and pictures with the path at which this process serves it."""
        groups = output.get("outputs")
        for item in [item for group in (groups.values() if isinstance(groups, dict) else []) for item in group]:
            item["file"] = self._named(item.get("url"))
            item["play"] = (
                f"{item['file']}.mp4" if item.get("format") == "png" and item.get("num_frames", 1) > 1 else item["file"]
            )
            for picture in (item.get("poster"), item.get("contact_sheet")):
                if isinstance(picture, dict):
                    picture["file"] = self._named(picture.get("url"))
        return output

    def _named(self, url: Any) -> str:
        self.files.append(str(url))
        return f"/files/{self.number}/{len(self.files) - 1}"

    def public(self) -> dict[str, Any]:
        hidden = {"files", "began"}
        shown = {name: value for name, value in vars(self).items() if name not in hidden}
        return shown | {"problems": [vars(problem) for problem in self.problems]}


class Jobs:
    """All jobs since the process started. Methods may be called from any thread."""

    def __init__(self, target: Target, folder: Path) -> None:
        """`folder`: for files that come from elsewhere."""
        self.target = target
        self._folder = folder
        self._jobs: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._fetching = threading.Lock()

    def start(self, request: dict[str, Any]) -> Job:
        """Raises TargetError."""
        answer = self.target.run(request)
        kept = {name: value for name, value in request.items() if name != "hf_token"}
        with self._lock:
            job = Job(len(self._jobs) + 1, answer["id"], kept, time.time())
            self._jobs[job.number] = job
        job.take(answer)
        return job

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def get(self, number: int) -> Job:
        """Raises NoFile."""
        if number not in self._jobs:
            raise NoFile("this playground has no such job; it was started again since")
        return self._jobs[number]

    def look(self, number: int) -> Job:
        """The job as it is now. Raises NoFile, TargetError."""
        return self._told(number, self.target.status)

    def cancel(self, number: int) -> Job:
        return self._told(number, self.target.cancel)

    def _told(self, number: int, ask: Any) -> Job:
        job = self.get(number)
        if job.status not in _FINAL:
            answer = ask(job.id)
            with self._lock:
                job.take(answer)
        return job

    def file(self, number: int, place: int) -> Path:
        """The file that a job named. Raises NoFile, TargetError."""
        files = self.get(number).files
        if place >= len(files):
            raise NoFile("the job has no such file")
        url = urlsplit(files[place])
        suffix = Path(unquote(url.path)).suffix.lower()
        if suffix not in CONTENT_TYPES:
            raise NoFile("the job's file is neither a video nor an image")
        if url.scheme == "file" and self.target.is_local:
            return _existing(Path(unquote(url.path)))
        if url.scheme in ("http", "https"):
            return self._fetched(files[place], self._folder / f"{number}-{place}{suffix}")
        raise NoFile("the file is on the machine of the worker; give the worker a bucket to see it here")

    def playable(self, number: int, place: int) -> Path:
        """An MP4 of a zip of frames, which no browser plays."""
        target = self._folder / f"{number}-{place}-frames.mp4"
        source = self.file(number, place)
        with self._fetching:
            if not target.exists():
                items = [item for item in _items(self.get(number)) if item["file"] == f"/files/{number}/{place}"]
                frames = read_clip(source).frames
                fps = int(items[0].get("fps", 16)) if items else 16
                encode([frames], _part(target), VIDEO["mp4"], fps, len(frames))
                _part(target).rename(target)
        return target

    def _fetched(self, url: str, target: Path) -> Path:
        """A file behind a presigned URL, once. No key goes there."""
        with self._fetching:
            if target.exists():
                return target
            try:
                with requests.get(url, stream=True, timeout=(5, 60)) as response, _part(target).open("wb") as file:
                    if not response.ok:
                        raise NoFile(f"the bucket answered with status {response.status_code}; the URL may have expired")
                    for block in response.iter_content(1 << 20):
                        file.write(block)
                        if file.tell() > _MAX_BYTES:
                            raise NoFile("the file is larger than 2 GB")
            except requests.RequestException as error:
                raise TargetError("the result's file cannot be fetched; check the network, then try again") from error
            _part(target).rename(target)
        return target


def _items(job: Job) -> list[dict[str, Any]]:
    outputs = (job.result or {}).get("outputs", {})
    return [item for group in outputs.values() for item in group]


def item_of(job: Job, place: int) -> dict[str, Any]:
    """The output whose file has this number. Raises NoFile."""
    for item in _items(job):
        if item["file"] == f"/files/{job.number}/{place}":
            return item
    raise NoFile("the job has no such output")


def _part(target: Path) -> Path:
    return target.with_name(f"{target.stem}.part{target.suffix}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NoFile("the file is gone; the worker's OUTPUT_DIR was emptied, or is on another machine")
    return path


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="playground-")
