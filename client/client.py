"""One endpoint, or a worker's local API, which has the same calls: submit a job, wait for it, download its files."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from client.api import Api, Retry, Say
from client.download import download
from client.errors import ClientError, JobNotFound, NotAuthorized, Refused, SubmissionUnknown, Unreachable
from client.request import body_of, job_of
from client.result import RUNNING, File, Health, Progress, Result, has_ended, result_of
from worker.net.addresses import is_public
from worker.request import is_url

OnProgress = Callable[[Progress], None]

BASE_URL = "https://api.runpod.ai/v2"
LOCAL_URL = "http://localhost:8000"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Host names of this computer."""

PATIENCE = 1800.0
"""Seconds without an answer until the client gives up: RunPod deletes a job's result after the same time."""
LOCAL_PATIENCE = 60.0
"""The same for a local API. A restarted worker has forgotten its jobs, so waiting longer would not help."""

_SECONDS_TO_SUBMIT = 120.0
_LOCAL_SECONDS_TO_SUBMIT = 5.0
"""A local worker that does not answer was probably not started."""

SECONDS_BETWEEN_POLLS = 1.0
_TIMES_NOT_FOUND = 3
"""404s in a row until a job counts as not found. Right after /run, not every server of RunPod may know the job."""

_log = logging.getLogger("client")


class Client:
    """Submits jobs to one endpoint or local API, and follows them. Create it with `endpoint` or `local`."""

    def __init__(self, url: str, key: str | None, patience: float, say: Say) -> None:
        self.url = url
        """The API's address, to which `/run` is added."""
        self.is_local = key is None
        """Whether this is a local API."""
        self._api = Api(url, key)
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
        """A RunPod Serverless endpoint.

        `base_url`: the default is the environment's RUNPOD_ENDPOINT_BASE_URL, or else RunPod's address. `patience`: seconds
        without an answer until the client gives up; 0 never retries. `say` receives a line when the connection is lost.
        Raises NotAuthorized for a key that cannot be valid, and Refused for an id or address that cannot be used.
        """
        url = (base_url or os.environ.get("RUNPOD_ENDPOINT_BASE_URL") or BASE_URL).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname not in LOOPBACK:
            raise Refused(f"{parts.hostname} would receive the key unencrypted; use an https URL")
        if not re.fullmatch(r"[\w-]+", endpoint_id):
            raise Refused("an endpoint's id has only letters, digits and hyphens; copy it from the endpoint's URL")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise NotAuthorized("there is no usable API key; set RUNPOD_API_KEY to one from the settings of RunPod's console")
        return cls(f"{url}/{endpoint_id}", key, patience, say)

    @classmethod
    def local(cls, url: str = LOCAL_URL, patience: float = LOCAL_PATIENCE, say: Say = _log.warning) -> Client:
        """A worker's local API (`python handler.py --rp_serve_api`). No key is sent, and files are copied, not downloaded.

        Raises Refused for a `url` that is not an http(s) URL.
        """
        if not is_url(url):
            raise Refused(f"{url} is not an http(s) URL; use one such as {LOCAL_URL}")
        return cls(url.rstrip("/"), None, patience, say)

    def run(self, request: dict[str, Any], on_progress: OnProgress | None = None) -> Result:
        """`submit`, then `wait`."""
        return self.wait(self.submit(request), on_progress)

    def submit(self, request: dict[str, Any], folder: Path | None = Path()) -> str:
        """Check the request and send it. Returns the job's id.

        `request`: a job's `input`, or an object with `input` and RunPod's own fields beside it. Control images that are files
        of this computer are sent inside it; their paths are relative to `folder`. With None, no file is read.

        Raises InvalidRequest, NotAuthorized, JobNotFound, Refused, Unreachable, and SubmissionUnknown: RunPod has no
        idempotency key, and a retry may bill twice, so a request whose answer is lost is not sent again.
        """
        body = body_of(job_of(request, folder, self.is_local))
        retry = self._new_retry(_LOCAL_SECONDS_TO_SUBMIT if self.is_local else _SECONDS_TO_SUBMIT)
        try:
            answer = self._api.call("POST", "/run", "id", retry, body, may_repeat=False)
        except JobNotFound as error:
            missing = "no local API of a worker" if self.is_local else "no such endpoint for this key; check its id"
            raise JobNotFound(f"{error}: there is {missing}") from None
        except Unreachable as error:
            raise Unreachable(f"no job was started: {error}") from None
        except SubmissionUnknown as error:
            raise SubmissionUnknown(
                f"the request was sent, but its answer was lost ({error}): the job may run, or it may not. Look for it among "
                "the endpoint's requests in RunPod's console, or in a local worker's log; if it is not there, run it again"
            ) from None
        return str(answer["id"])

    def wait(self, job_id: str, on_progress: OnProgress | None = None) -> Result:
        """Wait until a job has ended, through lost connections. `on_progress` is called about once a second.

        Raises JobFailed, JobStopped, JobNotFound, NotAuthorized, Refused and Unreachable.
        """
        try:
            for answer in self.answers(job_id):
                if on_progress:
                    on_progress(Progress.of(job_id, answer))
                if has_ended(answer):
                    return result_of(job_id, answer)
                time.sleep(SECONDS_BETWEEN_POLLS)
        except ClientError as error:
            error.job_id = job_id
            raise
        raise AssertionError

    def answers(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Ask for the job's status at every `next`, through lost connections, until the job has ended: to follow several jobs.

        Yields RunPod's answers for `Progress.of`, the last one for `result_of`. The caller waits between two of them. Raises
        JobNotFound, NotAuthorized, Refused and Unreachable.
        """
        retry, unknown = self._new_retry(), self._new_retry()
        while True:
            answer = self._poll(job_id, retry)
            yield answer
            if has_ended(answer):
                return
            if answer["status"] in RUNNING:
                unknown.succeeded()
            elif not unknown.wait(text := f"{self.url}: the status {answer['status'][:40]!r} is not one of RunPod's"):
                raise Unreachable(text)

    def status(self, job_id: str) -> Progress:
        """The job's progress. Raises JobNotFound, NotAuthorized, Refused and Unreachable."""
        return Progress.of(job_id, self.poll(job_id))

    def poll(self, job_id: str) -> dict[str, Any]:
        """RunPod's answer to /status, for `Progress.of` and `result_of`. Raises the errors of `status`."""
        return self._poll(job_id, self._new_retry())

    def cancel(self, job_id: str) -> str:
        """Cancel the job. Returns its status: CANCELLED, or the one that it ended with before."""
        return str(self._call_for_job("POST", "cancel", job_id, self._new_retry())["status"])

    def health(self) -> Health:
        """What works there. Raises JobNotFound for an endpoint that does not exist, NotAuthorized, Refused and Unreachable."""
        return Health.of(self._api.call("GET", "/health", "workers", self._new_retry(), kind=dict))

    def download(self, result: Result, folder: Path, posters: bool = False) -> list[Path]:
        """Download the files of a result into `folder`, and name them after prompt and seed. Raises DownloadFailed.

        Each video is followed by its contact sheet, if the request asked for one, and with `posters` by its first frame. No
        file is overwritten, and an equal file that exists already is not written again.
        """
        paths: list[Path] = []
        for output in result.outputs:
            paths.append(video := self.download_file(output, folder, output.name()))
            paths += [self.download_file(picture, folder, picture.name_for(video)) for picture in output.pictures(posters)]
        return paths

    def download_file(self, file: File, folder: Path, name: str) -> Path:
        """Download one file into `folder` as `name`, or as `name` with a number. Returns its path. Raises DownloadFailed."""
        addresses = self._addresses()
        is_here = self.is_local and bool(addresses) and all(ip_address(address).is_loopback for address in addresses)
        private = any(not is_public(address) for address in addresses)
        return download(file, folder, name, self._new_retry(), is_here, private)

    def _addresses(self) -> set[str]:
        """The API's own. They tell what it may name: an API in the public network names nothing in this one."""
        try:
            found = socket.getaddrinfo(urlsplit(self.url).hostname, None)
        except (OSError, UnicodeError):
            return set()
        return {str(address[0]).partition("%")[0] for *_, address in found}

    def _new_retry(self, longest: float = float("inf")) -> Retry:
        return Retry(min(self._patience, longest), self._say)

    def _poll(self, job_id: str, retry: Retry) -> dict[str, Any]:
        for _ in range(_TIMES_NOT_FOUND - 1):
            with suppress(JobNotFound):
                return self._call_for_job("GET", "status", job_id, retry)
            time.sleep(SECONDS_BETWEEN_POLLS)
        return self._call_for_job("GET", "status", job_id, retry)

    def _call_for_job(self, method: Literal["GET", "POST"], verb: str, job_id: str, retry: Retry) -> dict[str, Any]:
        try:
            return self._api.call(method, f"/{verb}/{quote(job_id, safe='')}", "status", retry)
        except JobNotFound:
            raise JobNotFound(
                f"there is no job {job_id}: RunPod keeps a result for 30 minutes, and a local worker until it shuts down. "
                f"Finished files are kept longer, below {job_id}/ in the bucket or in OUTPUT_DIR"
            ) from None
