"""One call to the API with everything that can go wrong with it: what is tried again, how often, and what is not.

The key goes to the endpoint's host and nowhere else: no redirect is followed, and no message repeats a header or a body.
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
"""Takes a line for whoever waits."""

Answer = dict[str, Any]

_SECONDS_TO_CONNECT = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_NO_CONNECTION = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError)
_DID_NOT_COUNT = (429, 503)
"""By these a server says that it has not begun to handle the request."""


class Auth(AuthBase):
    """The bearer key, or nothing: never what requests would find in ~/.netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Patience:
    """Tries again with growing pauses, until nothing has gone right for so many seconds."""

    def __init__(self, seconds: float, say: Say) -> None:
        self._seconds = seconds
        self._say = say
        self.again()

    def again(self) -> None:
        """Something went right."""
        self._failing_since: float | None = None
        self._pause = _FIRST_PAUSE

    @property
    def tried_for(self) -> float:
        """Seconds since something went right."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    def wait(self, what: str, at_least: float = 0) -> bool:
        """Sleep before the next try. False, at once, when there shall be none; `what` went wrong, in a few words."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._say(f"{what}; trying again")
        pause = max(self._pause * random.uniform(0.75, 1.25), at_least)
        if now + pause - self._failing_since > self._seconds:
            return False
        time.sleep(pause)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return True


class Api:
    """The calls of one endpoint, or of a local API, below `url`."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._key = key
        self._auth = Auth(key)
        self._session = self._new_session()

    def call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        wanted: str,
        patience: Patience,
        body: bytes | None = None,
        may_repeat: bool = True,
        read_timeout: float | None = 30,
    ) -> Answer:
        """The JSON object that `path` answers, with the text that is `wanted` in it, as `status`.

        `may_repeat`: the call can be made twice without harm. Without it, one whose answer is lost is not made again.
        Raises NotAuthorized, JobNotFound, Refused, Unreachable, and SubmissionUnknown without `may_repeat`.
        """
        # A kept connection may have been closed by the server: a call that goes out on it is lost, and nobody can tell.
        session = self._session if may_repeat else self._new_session()
        while True:
            try:
                response = session.request(
                    method,
                    f"{self._url}{path}",
                    data=body,
                    headers={"Content-Type": "application/json"} if body is not None else None,
                    auth=self._auth,
                    timeout=(_SECONDS_TO_CONNECT, read_timeout),
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                if isinstance(error, ValueError):
                    raise Unreachable(f"{self._url} is no http(s) URL") from None
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise Unreachable(f"{self._url} has no valid certificate") from None
                failure, counted, at_least = _words(error), not _never_left(error), 0.0
            else:
                self._raise_for_refusal(response)
                answer = _json_object(response)
                if answer is not None and isinstance(answer.get(wanted), str):
                    patience.again()
                    return answer
                failure, at_least = _words_of(response), _retry_after(response)
                counted = response.status_code not in _DID_NOT_COUNT
            if counted and not may_repeat:
                raise SubmissionUnknown(failure)
            if not patience.wait(f"{self._url}: {failure}", at_least):
                raise Unreachable(f"{self._url}: {failure}; given up after {patience.tried_for:.0f} s")

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = self._key is not None  # a local API is not behind the proxy of the environment
        return session

    def _raise_for_refusal(self, response: requests.Response) -> None:
        """Raises for the answers that will be the same next time."""
        status = response.status_code
        if status in (401, 403):
            raise NotAuthorized(
                f"{self._url} does not take the key (status {status}); check RUNPOD_API_KEY and the endpoint's id"
            )
        if status == 404:
            raise JobNotFound(f"{self._url} answers 404")
        if status == 405:
            raise Refused(
                f"{self._url} does not know RunPod's calls (status 405 for {response.request.method}); the worker of this "
                "project does: start it with `python handler.py --rp_serve_api`"
            )
        if 300 <= status < 400:
            raise Refused(f"{self._url} sends the call on to another address, which is not followed; check the URL")
        if is_refusal(status):
            raise Refused(f"{self._url} refused the call (status {status}){_told(response)}")


def _json_object(response: requests.Response) -> Answer | None:
    if response.status_code >= 300:
        return None
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _told(response: requests.Response) -> str:
    """What a refusal says of itself, cut short."""
    try:
        answer = response.json()
        return f": {json.dumps(answer.get('error') or answer.get('detail') or answer)[:300]}"
    except (ValueError, AttributeError):
        return ""


def _words_of(response: requests.Response) -> str:
    status = response.status_code
    return "the answer was not understood" if status < 300 else "too many requests" if status == 429 else f"status {status}"


def _words(error: requests.RequestException) -> str:
    """A few words without the address, which can be a secret."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return "no connection" if _never_left(error) else "the connection broke off"


def _never_left(error: requests.RequestException) -> bool:
    """Whether there was no connection on which the request could have gone out."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectTimeout) or isinstance(cause, _NO_CONNECTION)


def _retry_after(response: requests.Response) -> float:
    """Seconds, from either form of the header; an hour at most."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), 3600.0)
