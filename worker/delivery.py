"""Deliver the files of one job: retry uploads for minutes, keep what cannot be uploaded, and find what was stored before.

A job can come twice: delivered twice, or again after a worker died. Every object carries a sum of what it was made from, and
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

from worker.errors import Code, Problem, Stopped, WorkerError
from worker.logs import log
from worker.net.addresses import NotPublic
from worker.pictures import Kind
from worker.recovery import Kept, Recovery
from worker.storage import NotStored, Storage, Stored

T = TypeVar("T")

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_REFUSALS = 4
"""How many refusals are final: a store that has just restarted can refuse what it takes a moment later."""
_RESULT = "result.json"


def _pictures_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures of a result's video."""
    return [item[kind] for kind in get_args(Kind) if item.get(kind)]


@dataclass(frozen=True)
class Identity:
    """Identifies a job that is delivered again: by its id and its input."""

    sum: str
    """The sha256 of both, in hexadecimal digits."""
    recurs: bool
    """Whether the job can be delivered again. A local run without an id is always a new job."""

    @classmethod
    def of(cls, job_id: str | None, raw_input: Any) -> Identity:
        """`job_id`: None for a job without an id."""
        body = json.dumps([job_id or secrets.token_hex(), raw_input], sort_keys=True, default=str)
        return cls(hashlib.sha256(body.encode()).hexdigest(), job_id is not None)

    def seed(self, index: int) -> int:
        """A random seed for the prompt `index`, 0 to 2**31 - 1. It is the same when the job is delivered again."""
        return int(hashlib.sha256(f"{self.sum} {index}".encode()).hexdigest(), 16) % 2**31


def retry_until(
    attempt: Callable[[], T],
    give_up_at: float,
    stop: threading.Event,
    refusals: int = _REFUSALS,
    longest_pause: float = _LONGEST_PAUSE,
) -> T:
    """Call `attempt` until it succeeds, with growing pauses, and return its value.

    Raises NotStored once `give_up_at` (`time.monotonic`) is reached or `refusals` attempts were refused, and Stopped.
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
    """The place for one job's files. Its calls block; several threads may use it."""

    def __init__(self, storage: Storage, own: bool, recovery: Recovery, folder: str, identity: Identity) -> None:
        """`own`: `storage` is the worker's, not the job's own. `folder`: the first part of every key."""
        self._storage = storage
        self._own = own
        self._recovery = recovery
        self._folder = folder
        self._recurs = identity.recurs
        self._made_from = identity.sum if identity.recurs else ""

    def check(self) -> None:
        """Check that a bucket of the job's own takes files; the worker's was checked at start. Raises WorkerError."""
        if self._own:
            return
        try:
            self._storage.check()
        except NotPublic as error:
            raise WorkerError.of([Problem(Code.INVALID_INPUT, "s3Config.endpointUrl", str(error))]) from error

    def put(self, file: Path, content_type: str, give_up_at: float, stop: threading.Event) -> Stored:
        """Store `file` under its name, and retry until `give_up_at` (`time.monotonic`).

        Raises WorkerError with UPLOAD_FAILED, after the file was kept in RECOVERY_DIR, and Stopped.
        """
        key = self._key(file.name)
        try:
            stored = self._store(file, key, content_type, give_up_at, stop)
        except NotStored as error:
            kept = self._recovery.keep(file, Kept(key, content_type, self._made_from, self._own))
            raise self._kept_error(error) if kept else error from error
        self._recovery.delete(key)  # kept when an earlier try failed
        return stored

    def find(self, name: str) -> Stored | None:
        """The stored file of that name, if an earlier delivery of this job made it."""
        return self._storage.find(self._key(name), self._made_from) if self._recurs else None

    def is_kept(self, name: str) -> bool:
        """Whether an earlier delivery of this job made the file and could only keep it in RECOVERY_DIR."""
        return self._recurs and self._recovery.find(self._key(name), self._made_from) is not None

    def store_kept(self, name: str, content_type: str, give_up_at: float, stop: threading.Event) -> Stored:
        """Store a kept file, as `put` does. Raises WorkerError with UPLOAD_FAILED, and Stopped."""
        key = self._key(name)
        try:
            file = self._recovery.find(key, self._made_from)
            if file is None:
                raise FileNotFoundError(key)
            stored = self._store(file, key, content_type, give_up_at, stop)
        except NotStored as error:
            raise self._kept_error(error) from error
        except OSError as error:  # another worker has uploaded and deleted it meanwhile
            if found := self._storage.find(key, self._made_from):
                return found
            raise WorkerError(Code.UPLOAD_FAILED, f"the kept file of `{key}` is gone; send the job again") from error
        self._recovery.delete(key)
        return stored

    def load_previous_result(self) -> dict[str, Any] | None:
        """The result of an earlier delivery of this job, with new URLs, if all its files are still there."""
        body = self._storage.read(self._key(_RESULT), self._made_from) if self._recurs else None
        if body is None:
            return None
        result: dict[str, Any] = json.loads(body)
        for item in (*result["outputs"]["images"], *result["outputs"]["videos"]):
            stored = self._storage.find(self._key(PurePosixPath(item["key"]).name), self._made_from)
            if stored is None:
                return None
            item |= {"url": stored.url, "expires_at": stored.expires_at}
            for picture in _pictures_of(item):
                # Without a look into the bucket: one that does not answer now must not cost the result its poster.
                again = self._storage.address(self._key(PurePosixPath(picture["key"]).name), picture["bytes"])
                picture |= {"url": again.url, "expires_at": again.expires_at}
        return result

    def save_result(self, result: dict[str, Any], folder: Path) -> None:
        """Store the result, without its URLs, beside its files. `folder` takes the file that is uploaded.

        A failure is only logged: the job is done, and if it is delivered again, `find` finds its files.
        """
        if not self._recurs:
            return
        without_urls = copy.deepcopy(result)
        for item in (*without_urls["outputs"]["images"], *without_urls["outputs"]["videos"]):
            for entry in (item, *_pictures_of(item)):
                entry |= {"url": None, "expires_at": None}
        file = folder / _RESULT
        try:
            file.write_text(json.dumps(without_urls, ensure_ascii=False))
            self._storage.put(file, self._key(_RESULT), "application/json", self._made_from)
        except (NotStored, OSError) as error:
            text = f"the result was not stored beside its files ({type(error).__name__})"
            log.warning(text, extra={"fields": {"job": self._folder}})

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _store(self, file: Path, key: str, content_type: str, give_up_at: float, stop: threading.Event) -> Stored:
        def attempt() -> Stored:
            return self._storage.put(file, key, content_type, self._made_from)

        return retry_until(attempt, give_up_at, stop)

    def _kept_error(self, error: NotStored) -> WorkerError:
        when = "the next worker that starts uploads it" if self._own else "the same job, delivered again, uploads it"
        return WorkerError(Code.UPLOAD_FAILED, f"{error.message}; the file is kept, and {when}")
