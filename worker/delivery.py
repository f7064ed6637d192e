"""Deliver the files of one job: retry uploads for minutes, keep what cannot be uploaded, and find what was stored before.

RunPod can deliver a job twice, or again after a worker died. Every object carries a checksum of what it was made from, and the
result is stored beside it, so that nothing is made a second time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, get_args

from worker.errors import Code, Problem, Stopped, WorkerError
from worker.logs import log
from worker.net.addresses import NotPublic
from worker.pictures import Kind
from worker.recovery import Kept, Recovery
from worker.storage.base import Limit, NotStored, Storage, Stored

T = TypeVar("T")

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_REFUSALS = 4
"""After so many refusals an upload fails. One is not enough: a store that has just restarted can refuse for a moment."""
_SECONDS_UNTIL_KEPT = 5.0
"""When an upload takes longer, its file is copied to RECOVERY_DIR meanwhile: the process may be killed before it ends."""
_SECONDS_TO_SEARCH = 15.0
"""Limit for all searches for files of an earlier delivery. After it, the job goes on as if there were none."""
_SECONDS_TO_CHECK = 30.0
"""Limit for the check of a job's own bucket."""
_SECONDS_TO_SAVE = 10.0
"""Limit for storing the result beside its files. The files can be found without it."""
_RESULT = "result.json"


def _pictures_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pictures of a video in a result."""
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
        self._seconds_to_search = _SECONDS_TO_SEARCH

    def check(self, stop: threading.Event) -> None:
        """Check that the job's own bucket accepts files; the worker's was checked at start. Raises WorkerError, Stopped."""
        if self._own:
            return
        try:
            self._storage.check(Limit.of(_SECONDS_TO_CHECK, stop))
        except NotPublic as error:
            raise WorkerError.of([Problem(Code.INVALID_INPUT, "s3Config.endpointUrl", str(error))]) from error

    def put(self, file: Path, content_type: str, give_up_at: float, limit: Limit) -> Stored:
        """Store `file` under its name. Retry until `give_up_at` (`time.monotonic`), and end within the limit in any case.

        If the first try fails, or takes longer than some seconds, the file is in RECOVERY_DIR until it is stored: the process
        may be killed. Raises WorkerError with UPLOAD_FAILED, and Stopped.
        """
        key = self._key(file.name)
        keeper = _Keeper(lambda: self._recovery.keep(file, Kept(key, content_type, self._made_from, self._own)))

        def attempt() -> Stored:
            try:
                return self._storage.put(file, key, content_type, self._made_from, limit)
            except NotStored:
                keeper.now()
                raise

        try:
            try:
                stored = retry_until(attempt, give_up_at, limit.stop)
            finally:
                keeper.end()
        except NotStored as error:
            raise self._kept_error(error) if keeper.now() else error from error
        except Stopped:
            self._recovery.delete(key)  # the job was cancelled: nobody needs the file
            raise
        self._recovery.delete(key)
        return stored

    def find(self, name: str, stop: threading.Event) -> Stored | None:
        """Return the stored file of that name, if an earlier delivery of this job made it. Raises Stopped."""
        with self._search(stop) as limit:
            return self._storage.find(self._key(name), self._made_from, limit) if self._recurs else None

    def is_kept(self, name: str) -> bool:
        """Return whether an earlier delivery of this job made the file, but could only keep it in RECOVERY_DIR."""
        return self._recurs and self._recovery.find(self._key(name), self._made_from) is not None

    def store_kept(self, name: str, content_type: str, give_up_at: float, limit: Limit) -> Stored:
        """Store a kept file, as `put` does. Raises WorkerError with UPLOAD_FAILED, and Stopped."""
        key = self._key(name)
        try:
            file = self._recovery.find(key, self._made_from)
            if file is None:
                raise FileNotFoundError(key)
            stored = retry_until(
                lambda: self._storage.put(file, key, content_type, self._made_from, limit), give_up_at, limit.stop
            )
        except NotStored as error:
            raise self._kept_error(error) from error
        except OSError as error:  # another worker has uploaded and deleted it meanwhile
            if found := self.find(name, limit.stop):
                return found
            raise WorkerError(Code.UPLOAD_FAILED, f"the kept file of `{key}` is gone; send the job again") from error
        self._recovery.delete(key)
        return stored

    def load_previous_result(self, stop: threading.Event) -> dict[str, Any] | None:
        """Return the result of an earlier delivery of this job, with new URLs, if all its files still exist. Raises Stopped."""
        if not self._recurs:
            return None
        with self._search(stop) as limit:
            body = self._storage.read(self._key(_RESULT), self._made_from, limit)
        try:
            return None if body is None else self._with_new_urls(json.loads(body), stop)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            log.warning("the result that was stored beside the job's files is damaged", extra={"fields": {"job": self._folder}})
            return None

    def _with_new_urls(self, result: dict[str, Any], stop: threading.Event) -> dict[str, Any] | None:
        json.dumps(result, ensure_ascii=False, allow_nan=False).encode()  # the platform silently drops invalid JSON
        for item in (*result["outputs"]["images"], *result["outputs"]["videos"]):
            stored = self.find(PurePosixPath(item["key"]).name, stop)
            if stored is None:
                return None
            item |= {"url": stored.url, "expires_at": stored.expires_at}
            for picture in _pictures_of(item):
                # Without asking the bucket: if it does not answer now, the result must not lose its poster.
                again = self._storage.address(self._key(PurePosixPath(picture["key"]).name), picture["bytes"])
                picture |= {"url": again.url, "expires_at": again.expires_at}
        return result

    def save_result(self, result: dict[str, Any], folder: Path, stop: threading.Event) -> None:
        """Store the result, without its URLs, beside its files. `folder` takes the file that is uploaded. Raises Stopped.

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
            limit = Limit.of(_SECONDS_TO_SAVE, stop)
            self._storage.put(file, self._key(_RESULT), "application/json", self._made_from, limit)
        except (NotStored, OSError) as error:
            text = f"the result was not stored beside its files ({type(error).__name__})"
            log.warning(text, extra={"fields": {"job": self._folder}})

    @contextmanager
    def _search(self, stop: threading.Event) -> Iterator[Limit]:
        """Give a search its limit, and take the time it needed off the limit of all searches."""
        started = time.monotonic()
        try:
            yield Limit.of(self._seconds_to_search, stop)
        finally:
            self._seconds_to_search -= time.monotonic() - started

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _kept_error(self, error: NotStored) -> WorkerError:
        when = "the next worker that starts uploads it" if self._own else "the same job, delivered again, uploads it"
        return WorkerError(Code.UPLOAD_FAILED, f"{error.message}; the file is kept, and {when}")


class _Keeper:
    """Copies a file to RECOVERY_DIR, once: when `now` is called, or by itself after some seconds."""

    def __init__(self, keep: Callable[[], bool]) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._is_kept: bool | None = None
        self._timer = threading.Timer(_SECONDS_UNTIL_KEPT, self.now)
        self._timer.daemon = True
        self._timer.start()

    def now(self) -> bool:
        """Copy the file, unless that was done before. Returns whether the copy succeeded."""
        with self._lock:
            if self._is_kept is None:
                self._is_kept = self._keep()
            return self._is_kept

    def end(self) -> None:
        """Stop the timer: from now on only `now` copies the file."""
        self._timer.cancel()
        self._timer.join()
