"""One endpoint, or one local API of a worker, which takes the same calls: submit a job, follow it, fetch its files."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from client.api import Api, Patience, Say
from client.download import download
from client.errors import (
    ClientError,
    JobFailed,
    JobNotFound,
    JobStopped,
    NotAuthorized,
    Refused,
    SubmissionUnknown,
    Unreachable,
)
from client.request import body_of, job_of
from client.result import Output, Picture, Progress, Result

OnProgress = Callable[[Progress], None]

BASE_URL = "https://api.runpod.ai/v2"
LOCAL_URL = "http://localhost:8000"

PATIENCE = 1800.0
"""Seconds without an answer after which a job is given up: as long as RunPod keeps the result of one."""
PATIENCE_HERE = 60.0
"""The same for a local API: a worker that was started again has forgotten its jobs."""

_SECONDS_TO_SUBMIT = 120.0
_SECONDS_TO_SUBMIT_HERE = 5.0
"""Nothing is lost yet, and on this machine there is little that would come back by itself."""

_SECONDS_BETWEEN_POLLS = 1.0
_TIMES_NOT_FOUND = 3
"""In a row, until a job counts as unknown: one that has just been submitted may not be known everywhere."""

_log = logging.getLogger("client")


class Client:
    """Jobs of one endpoint or local API."""

    def __init__(self, url: str, key: str | None, here: bool, patience: float, say: Say) -> None:
        """Use `endpoint` or `local`."""
        self._api = Api(url, key)
        self._here = here
        self._patience = patience
        self._say = say

    @classmethod
    def endpoint(
        cls,
        endpoint_id: str,
        key: str,
        base_url: str | None = None,
        patience: float = PATIENCE,
        say: Say = _log.warning,
    ) -> Client:
        """A RunPod Serverless endpoint. `base_url`: in place of RUNPOD_ENDPOINT_BASE_URL, or RunPod's own.

        `patience`: seconds without any answer after which a running job is given up. `say` gets a line when the connection is
        lost. Raises NotAuthorized for a key that is none, and Refused for an address that the key must not be sent to.
        """
        url = (base_url or os.environ.get("RUNPOD_ENDPOINT_BASE_URL") or BASE_URL).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise Refused(f"the key would go to {parts.hostname} unencrypted; use an https URL")
        if not re.fullmatch(r"[\w-]+", endpoint_id):
            raise Refused("an endpoint's id has only letters, digits and hyphens; it is in the endpoint's URL")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise NotAuthorized("there is no usable API key; set RUNPOD_API_KEY to one from the console's settings")
        return cls(f"{url}/{endpoint_id}", key, False, patience, say)

    @classmethod
    def local(cls, url: str = LOCAL_URL, patience: float = PATIENCE_HERE, say: Say = _log.warning) -> Client:
        """A worker's local API (`python handler.py --rp_serve_api`). No key is sent, and files are copied."""
        return cls(url.rstrip("/"), None, True, patience, say)

    def run(self, request: dict[str, Any], on_progress: OnProgress | None = None) -> Result:
        """`submit` and `wait`."""
        return self.wait(self.submit(request), on_progress)

    def submit(self, request: dict[str, Any], folder: Path | None = None) -> str:
        """Check the request and send it. Returns the job's id.

        `request`: a job's `input`, or an object with `input` and what RunPod takes beside it. Images that are files of this
        computer, relative to `folder`, are sent along.

        Raises InvalidRequest, NotAuthorized, JobNotFound, Refused, Unreachable, and SubmissionUnknown: RunPod takes no
        key against doubles, so a request whose answer was lost is not sent again.
        """
        body = body_of(job_of(request, folder or Path(), self._here))
        patience = self._new_patience(_SECONDS_TO_SUBMIT_HERE if self._here else _SECONDS_TO_SUBMIT)
        try:
            answer = self._api.call("POST", "/run", "id", patience, body, may_repeat=False, read_timeout=60)
        except JobNotFound as error:
            what = "no local API of a worker" if self._here else "no such endpoint for this key; check its id"
            raise JobNotFound(f"{error}: there is {what}") from None
        except Unreachable as error:
            hint = "; start a worker's local API there, or name a RunPod endpoint" if self._here else ""
            raise Unreachable(f"{error}{hint}; nothing was started") from None
        except SubmissionUnknown as error:
            raise SubmissionUnknown(
                f"the request was sent, but its answer was lost ({error}): the job may run, or it may not. Look at the "
                "endpoint's requests in RunPod's console, or at a local worker's log, and run it again if it is not there"
            ) from None
        return str(answer["id"])

    def wait(self, job_id: str, on_progress: OnProgress | None = None) -> Result:
        """Wait for a job's end, through lost connections; `on_progress` is called about once a second.

        Raises JobFailed, JobStopped, JobNotFound, NotAuthorized, Refused and Unreachable.
        """
        try:
            return _result_of(job_id, self._polled(job_id, on_progress))
        except ClientError as error:
            error.job_id = job_id
            raise

    def status(self, job_id: str) -> Progress:
        """How far the job is."""
        return Progress.of(job_id, self._status(job_id, self._new_patience()))

    def cancel(self, job_id: str) -> str:
        """Stop the job. Returns its status: CANCELLED, or what it had come to before."""
        return str(self._of_job("POST", "cancel", job_id, self._new_patience())["status"])

    def download(self, result: Result, folder: Path, posters: bool = False) -> list[Path]:
        """Fetch all files of a result into `folder`, each under a name of its own. Raises DownloadFailed.

        After a video come its contact sheet, if the request asked for one, and with `posters` its first frame. A file that is
        there already is not written again, and none is overwritten.
        """
        paths: list[Path] = []
        for output in result.outputs:
            paths.append(video := self.download_one(output, folder))
            paths += [self.download_picture(picture, video) for picture in output.pictures(posters)]
        return paths

    def download_one(self, output: Output, folder: Path) -> Path:
        """Fetch one video or image."""
        return download(output, folder, output.name(), self._new_patience(), self._here)

    def download_picture(self, picture: Picture, video: Path) -> Path:
        """Fetch a picture of a video to its side."""
        return download(picture, video.parent, f"{video.stem}{picture.suffix}", self._new_patience(), self._here)

    def _new_patience(self, most: float = float("inf")) -> Patience:
        return Patience(min(self._patience, most), self._say)

    def _polled(self, job_id: str, on_progress: OnProgress | None) -> dict[str, Any]:
        patience = self._new_patience()
        while True:
            answer = self._status(job_id, patience)
            if on_progress:
                on_progress(Progress.of(job_id, answer))
            if answer["status"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"):
                return answer
            time.sleep(_SECONDS_BETWEEN_POLLS)

    def _status(self, job_id: str, patience: Patience) -> dict[str, Any]:
        for _ in range(_TIMES_NOT_FOUND - 1):
            with suppress(JobNotFound):
                return self._of_job("GET", "status", job_id, patience)
            time.sleep(_SECONDS_BETWEEN_POLLS)
        return self._of_job("GET", "status", job_id, patience)

    def _of_job(self, method: Literal["GET", "POST"], what: str, job_id: str, patience: Patience) -> dict[str, Any]:
        try:
            return self._api.call(method, f"/{what}/{quote(job_id, safe='')}", "status", patience)
        except JobNotFound:
            raise JobNotFound(
                f"there is no job {job_id}: RunPod keeps a result for 30 minutes, and a local worker until it ends; what was "
                f"finished lies in the bucket, or in OUTPUT_DIR, under {job_id}/ for longer"
            ) from None


def _result_of(job_id: str, answer: dict[str, Any]) -> Result:
    """Raises JobFailed and JobStopped."""
    status = answer["status"]
    if status == "CANCELLED":
        raise JobStopped("CANCELLED", "the job was cancelled")
    if status == "TIMED_OUT":
        raise JobStopped("TIMEOUT", "RunPod ended the job, since its time ran out; see the endpoint's execution timeout")
    if status == "FAILED":
        text = _error_text(answer.get("error"))
        if re.match("(CANCELLED|TIMEOUT): ", text):
            raise JobStopped(text.partition(":")[0], text)
        raise JobFailed(text)
    if answer.get("output") is None:
        raise JobFailed(f"the job completed, but its result was lost; its files may lie in the bucket under {job_id}/")
    try:
        return Result.of(job_id, answer["output"])
    except ValueError as error:
        raise JobFailed(f"the job completed with {error}; is another worker behind this address?") from None


def _error_text(error: Any) -> str:
    """RunPod passes an exception that escaped from a worker on as JSON with a traceback in it."""
    try:
        escaped = json.loads(error) if isinstance(error, str) else error
        return str(escaped["error_message"])
    except (ValueError, TypeError, KeyError):
        return str(error or "RunPod gives no reason; look at the worker's log")
