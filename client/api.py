"""HTTP calls to the API: which failures are retried, for how long, and which are final.

The key is sent to the API's host and nowhere else: no redirect is followed, and no answer or error repeats the key.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import requests
import urllib3
from requests.auth import AuthBase

from client.errors import JobNotFound, NotAuthorized, Refused, SubmissionUnknown, Unreachable
from worker.net.statuses import is_refusal

Say = Callable[[str], None]
"""Receives one line of text for the user."""

TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two pieces of an answer. A worker that cancels a job answers after its current step."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds."""
_NO_CONNECTION = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError)
_NOT_STARTED = (429, 503)
"""Statuses of a server that has not begun to handle the request."""


class Auth(AuthBase):
    """Sends the bearer key, or no credentials. Without it, requests would send those in ~/.netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Retry:
    """Waits between attempts, longer each time, and gives up `patience` seconds after the last success."""

    def __init__(self, patience: float, say: Say) -> None:
        self._patience = patience
        self._say = say
        self.succeeded()

    def succeeded(self) -> None:
        self._failing_since: float | None = None
        self._pause = _FIRST_PAUSE

    @property
    def failing_for(self) -> float:
        """Seconds since the first failure after the last success."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    def wait(self, failure: str, at_least: float = 0) -> bool:
        """Sleep before the next attempt, `at_least` seconds; False, at once, if there should be none.

        The first of several failures is reported to the user.
        """
        now = time.monotonic()
        is_first = self._failing_since is None
        self._failing_since = now if self._failing_since is None else self._failing_since
        pause = max(self._pause * random.uniform(0.75, 1.25), at_least)
        if now + pause - self._failing_since > self._patience:
            return False
        if is_first:
            self._say(f"{failure}; retrying")
        time.sleep(pause)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return True


class Api:
    """The API of one endpoint, or a worker's local API, which needs no key."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._key = key
        self._auth = Auth(key)
        self._session = self._new_session()

    def call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        field: str,
        retry: Retry,
        body: bytes | None = None,
        may_repeat: bool = True,
        kind: type = str,
    ) -> dict[str, Any]:
        """Return the JSON object at `path`. It must have a text under `field`, such as `status`, or another `kind`.

        `may_repeat`: a second identical call does no harm. Otherwise a call whose answer is lost is not repeated.
        Raises NotAuthorized, JobNotFound, Refused, Unreachable, and SubmissionUnknown without `may_repeat`.
        """
        # The server may have closed a connection that was kept open. A call sent on it is lost without a trace.
        session = self._session if may_repeat else self._new_session()
        while True:
            try:
                response = session.request(
                    method,
                    f"{self.url}{path}",
                    data=body,
                    headers={"Content-Type": "application/json"} if body is not None else None,
                    auth=self._auth,
                    timeout=TIMEOUT,
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                if isinstance(error, ValueError):
                    raise Unreachable(f"{self.url} is not an http(s) URL") from None
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise Unreachable(f"{self.url} does not have a valid certificate") from None
                failure, may_have_arrived, at_least = _words_for(error), not _never_sent(error), 0.0
            else:
                answer = self._json(response)
                self._raise_for_refusal(response, answer)
                if response.status_code < 300 and isinstance(answer, dict) and isinstance(answer.get(field), kind):
                    retry.succeeded()
                    return answer
                failure, at_least = _words_for_status(response.status_code), _retry_after(response)
                may_have_arrived = response.status_code not in _NOT_STARTED
            if may_have_arrived and not may_repeat:
                raise SubmissionUnknown(failure)
            if not retry.wait(f"{self.url}: {failure}", at_least):
                raise self._unreachable(failure, retry)

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = self._key is not None  # a proxy of the environment does not lead to a local API
        return session

    def _json(self, response: requests.Response) -> Any:
        """The response's JSON without the key, which a server may repeat; None for a body that is not JSON."""
        try:
            answer = json.loads(response.content)
            if self._key:  # as it is after parsing: an answer may have it in escapes
                answer = json.loads(json.dumps(answer).replace(json.dumps(self._key)[1:-1], "***"))
        except (ValueError, RecursionError):
            return None
        return answer

    def _unreachable(self, failure: str, retry: Retry) -> Unreachable:
        tried = f"; gave up after {retry.failing_for:.0f} s" if retry.failing_for >= 1 else ""
        text = f"{self.url}: {failure}{tried}"
        return Unreachable(text if self._key else f"no worker answers at {text}. Start one with `make serve`")

    def _raise_for_refusal(self, response: requests.Response, answer: Any) -> None:
        """Raise for a status that a retry would not change."""
        status = response.status_code
        if status in (401, 403):
            raise NotAuthorized(f"{self.url} rejects the key (status {status}); check RUNPOD_API_KEY and the endpoint's id")
        if status == 404:
            raise JobNotFound(f"{self.url} answers with status 404")
        if status == 405:
            raise Refused(
                f"{self.url} does not support RunPod's API (status 405 for {response.request.method}); this project's worker "
                "does: start it with `python handler.py --rp_serve_api`"
            )
        if 300 <= status < 400:
            raise Refused(f"{self.url} redirects to another address, which the client does not follow; check the URL")
        if is_refusal(status):
            reason = (answer.get("error") or answer.get("detail") or answer) if isinstance(answer, dict) else "no reason given"
            raise Refused(f"{self.url} rejects the request (status {status}): {json.dumps(reason)[:300]}")


def _words_for_status(status: int) -> str:
    if status < 300:
        return "the answer is not one of RunPod's API"
    return "too many requests; wait a little" if status == 429 else f"status {status}"


def _words_for(error: requests.RequestException) -> str:
    """A few words without the address, which can be a secret."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return "no connection" if _never_sent(error) else "the connection broke"


def _never_sent(error: requests.RequestException) -> bool:
    """Whether the request was not sent, because there was no connection."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectTimeout) or isinstance(cause, _NO_CONNECTION)


def _retry_after(response: requests.Response) -> float:
    """Seconds in the Retry-After header, which has a number or a date; an hour at most, 0 without it."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), 3600.0)
