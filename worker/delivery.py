"""How the files of one job reach their place, whatever happens: tried again for minutes, then kept; and found again.

A job can come twice: delivered again, or again after a worker died. Every object carries a sum of what it was made from, and
the result is stored beside it, so that what exists is not made a second time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, get_args

from worker.errors import Code, Problem, WorkerError
from worker.logs import log
from worker.net.addresses import NotPublic
from worker.net.download import Stopped
from worker.pictures import Kind
from worker.recovery import Kept, Recovery
from worker.storage import NotStored, Storage, Stored

T = TypeVar("T")

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_REFUSALS = 4
"""A place that says no is asked four times: a store that has just come back can refuse what it takes a moment later."""
_RESULT = "result.json"


def _pictures_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """What lies beside a video of a result."""
    return [item[kind] for kind in get_args(Kind) if item.get(kind)]


@dataclass(frozen=True)
class Identity:
    """What makes a job the same when it comes again: its id and its input."""

    sum: str
    """Of both, as hexadecimal digits."""
    recurs: bool
    """Whether the job can come again at all; a local run that names no id is always a new one."""

    @classmethod
    def of(cls, job_id: str | None, raw_input: Any) -> Identity:
        """`job_id`: None where the job has none of its own."""
        body = json.dumps([job_id or secrets.token_hex(), raw_input], sort_keys=True, default=str)
        return cls(hashlib.sha256(body.encode()).hexdigest(), job_id is not None)

    def seed(self, index: int) -> int:
        """A random seed for the prompt `index`: the same one when the job comes again. 0 to 2**31 - 1."""
        return int(hashlib.sha256(f"{self.sum} {index}".encode()).hexdigest(), 16) % 2**31


def patiently(
    attempt: Callable[[], T],
    give_up_at: float,
    stop: threading.Event,
    refusals: int = _REFUSALS,
    longest_pause: float = _LONGEST_PAUSE,
) -> T:
    """What `attempt` gives, tried with growing pauses until `give_up_at` (`time.monotonic`), and after fewer refusals.

    Raises NotStored, Stopped.
    """
    pause = min(_FIRST_PAUSE, longest_pause)
    while True:
        try:
            return attempt()
        except NotStored as error:
            refusals -= error.refused
            if refusals == 0 or time.monotonic() + pause > give_up_at:
                raise
            log.warning("%s; trying again in %g s", error, pause)
        if stop.wait(pause):
            raise Stopped
        pause = min(2 * pause, longest_pause)


class Delivery:
    """The place of one job's files. Blocking; may be used from several threads."""

    def __init__(self, storage: Storage, own: bool, recovery: Recovery, folder: str, identity: Identity) -> None:
        """`own`: `storage` is the worker's, not one that the job brought. `folder`: the first part of every key."""
        self._storage = storage
        self._own = own
        self._recovery = recovery
        self._folder = folder
        self._recurs = identity.recurs
        self._made_from = identity.sum if identity.recurs else ""

    def check(self) -> None:
        """Whether a place that the job brought takes its files; the worker's own was checked at start. Raises WorkerError."""
        if self._own:
            return
        try:
            self._storage.check()
        except NotPublic as error:
            raise WorkerError.of([Problem(Code.INVALID_INPUT, "s3Config.endpointUrl", str(error))]) from error

    def put(self, file: Path, content_type: str, give_up_at: float, stop: threading.Event) -> Stored:
        """Store `file` under its name, trying until `give_up_at` (`time.monotonic`).

        Raises WorkerError with UPLOAD_FAILED, the file being in RECOVERY_DIR then, and Stopped.
        """
        key = self._key(file.name)
        try:
            stored = self._store(file, key, content_type, give_up_at, stop)
        except NotStored as error:
            kept = self._recovery.keep(file, Kept(key, content_type, self._made_from, self._own))
            raise self._kept_error(error) if kept else error from error
        self._recovery.forget(key)  # what was kept when an earlier try failed
        return stored

    def find(self, name: str, content_type: str, give_up_at: float, stop: threading.Event) -> Stored | None:
        """The finished file of that name, if an earlier delivery of this job made it; a kept one is stored now, see `put`."""
        if not self._recurs:
            return None
        key = self._key(name)
        if found := self._storage.find(key, self._made_from):
            return found
        file = self._recovery.find(key, self._made_from)
        if file is None:
            return None
        try:
            stored = self._store(file, key, content_type, give_up_at, stop)
        except NotStored as error:
            raise self._kept_error(error) from error
        except OSError:  # another worker has just brought it there
            return self._storage.find(key, self._made_from)
        self._recovery.forget(key)
        return stored

    def recall(self) -> dict[str, Any] | None:
        """The result of an earlier delivery of this job, with new URLs, if all its files are still there."""
        if not self._recurs:
            return None
        body = self._storage.read(self._key(_RESULT), self._made_from)
        if body is None:
            return None
        result: dict[str, Any] = json.loads(body)
        for item in (*result["outputs"]["images"], *result["outputs"]["videos"]):
            stored = self._storage.find(self._key(PurePosixPath(item["key"]).name), self._made_from)
            if stored is None:
                return None
            item |= {"url": stored.url, "expires_at": stored.expires_at}
            for picture in _pictures_of(item):
                # Not asked for: a bucket that does not answer now must not take a poster from a result.
                again = self._storage.address(self._key(PurePosixPath(picture["key"]).name), picture["bytes"])
                picture |= {"url": again.url, "expires_at": again.expires_at}
        return result

    def remember(self, result: dict[str, Any], folder: Path) -> None:
        """Store the result, without its URLs, beside its files; it is written in `folder` first.

        One that cannot be stored is not missed: see `find`.
        """
        if not self._recurs:
            return
        without_urls = copy.deepcopy(result)
        for item in (*without_urls["outputs"]["images"], *without_urls["outputs"]["videos"]):
            for entry in (item, *_pictures_of(item)):
                entry |= {"url": None, "expires_at": None}
        file = folder / _RESULT
        file.write_text(json.dumps(without_urls, ensure_ascii=False))
        try:
            self._storage.put(file, self._key(_RESULT), "application/json", self._made_from)
        except NotStored:
            log.warning("the result was not stored beside its files", extra={"fields": {"job": self._folder}})

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _store(self, file: Path, key: str, content_type: str, give_up_at: float, stop: threading.Event) -> Stored:
        def attempt() -> Stored:
            return self._storage.put(file, key, content_type, self._made_from)

        return patiently(attempt, give_up_at, stop)

    def _kept_error(self, error: NotStored) -> WorkerError:
        when = "the next worker that starts stores it there" if self._own else "the same job, delivered again, stores it there"
        return WorkerError(Code.UPLOAD_FAILED, f"{error.message}; the file is kept, and {when}")
