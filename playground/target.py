"""Where jobs go: a worker's local API, or a RunPod endpoint. Both take /run, /status and /cancel in the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from client.api import Auth

Answer = dict[str, Any]
"""`{"id", "status", "output"?, "error"?}`."""

_TIMEOUT = (5, 60)
"""Seconds to connect, and to answer: a local worker on a busy CPU takes its time, and a cancel waits for a step."""

_MAX_REQUEST = 10_000_000
"""Bytes that RunPod takes at /run."""

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class TargetError(Exception):
    """The target cannot be used now; the text says why and what would do. `again`: whether trying again can help."""

    def __init__(self, text: str, again: bool = True) -> None:
        super().__init__(text)
        self.again = again


@dataclass(frozen=True)
class Target:
    """`base` is the URL in front of /run. `key` goes to that URL and nowhere else."""

    base: str
    endpoint: str | None = None
    key: str = field(default="", repr=False)

    @property
    def is_local(self) -> bool:
        """Whether its file:// URLs are files of this machine."""
        return self.endpoint is None and urlsplit(self.base).hostname in LOCAL_HOSTS

    @property
    def label(self) -> str:
        return f"endpoint {self.endpoint}" if self.endpoint else self.base.partition("://")[2]

    def run(self, input: dict[str, Any]) -> Answer:
        """Start a job; the answer has its `id`. Raises TargetError."""
        size = len(json.dumps(input))
        if self.endpoint and size > _MAX_REQUEST:
            text = f"the request has {size / 1e6:.1f} MB and RunPod takes 10; name the image by its URL, or use a smaller file"
            raise TargetError(text, again=False)
        answer = self._ask("POST", "run", {"input": input})
        if not isinstance(answer.get("id"), str):
            raise TargetError(f"{self.label} took the job, but answered without an id; is it a worker's API?", again=False)
        return answer

    def status(self, job_id: str) -> Answer:
        return self._ask("GET", f"status/{quote(job_id, safe='')}")

    def cancel(self, job_id: str) -> Answer:
        return self._ask("POST", f"cancel/{quote(job_id, safe='')}")

    def _ask(self, method: str, path: str, body: Any = None) -> Answer:
        with requests.Session() as session:
            session.trust_env = self.endpoint is not None  # a proxy leads to the cloud, never to this machine
            session.auth = Auth(self.key or None)  # not a plain header, which a .netrc would replace
            try:
                response = session.request(method, f"{self.base}/{path}", json=body, timeout=_TIMEOUT, allow_redirects=False)
            except requests.Timeout as error:
                raise TargetError(f"{self.label} did not answer in time; try again") from error
            except requests.RequestException as error:
                raise TargetError(self._unreachable()) from error
        if not response.ok:
            raise self._refused(response, path)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise TargetError(f"{self.label} answers, but not as a RunPod API; check the address", again=False)
        return answer

    def _unreachable(self) -> str:
        if self.endpoint:
            return "RunPod cannot be reached; check the network, then try again"
        return f"no worker answers at {self.base}; start one with `make serve`, then try again"

    def _refused(self, response: requests.Response, path: str) -> TargetError:
        status, job = response.status_code, not path.startswith("run")
        if status in (401, 403):
            return TargetError("RunPod does not take the key in RUNPOD_API_KEY for this endpoint; use another", again=False)
        if status == 404 and job:
            return TargetError("the job is no longer known there; RunPod keeps results for 30 minutes", again=False)
        if status == 404:
            return TargetError(f"there is no {self.label}; check its id or address", again=False)
        if status == 405:
            return TargetError(f"{self.label} cannot tell how far a job is; start it from this version", again=False)
        if status == 429:
            return TargetError(f"{self.label} has too many requests at the moment; wait, then try again")
        return TargetError(f"{self.label} answered with status {status}; try again", again=status >= 500)
