"""What every storage does, and within which limits.

Every call is one attempt. `delivery` decides about retries, and keeps a file that cannot be stored.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from worker.errors import Code, Stopped, WorkerError


@dataclass(frozen=True)
class Stored:
    """Where to download a file. `expires_at` is UTC in ISO 8601; None for a local file. `bytes` is its size."""

    url: str
    key: str
    expires_at: str | None
    bytes: int


class NotStored(WorkerError):
    """UPLOAD_FAILED. `refused`: the storage answered and rejected the call."""

    def __init__(self, message: str, refused: bool) -> None:
        super().__init__(Code.UPLOAD_FAILED, message)
        self.refused = refused


@dataclass(frozen=True)
class Limit:
    """How long a call may take."""

    stop: threading.Event
    """When set, the call raises Stopped."""
    ends: float = float("inf")
    """At this time of `time.monotonic()` the call raises NotStored."""

    @classmethod
    def of(cls, seconds: float, stop: threading.Event) -> Limit:
        """Return a limit that ends `seconds` from now."""
        return cls(stop, time.monotonic() + seconds)

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped
        if time.monotonic() > self.ends:
            raise NotStored("the bucket did not answer in time; check its endpoint", refused=False)


class Storage(Protocol):
    """A place for files. A call that exceeds its limit raises NotStored or Stopped."""

    def check(self, limit: Limit) -> None:
        """Write a small file and delete it again. Raises NotStored."""

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        """Store `file` under `key`, with `made_from` as a note unless it is "". Raises NotStored."""

    def find(self, key: str, made_from: str, limit: Limit) -> Stored | None:
        """Return the file under `key` if its `made_from` is the same; None otherwise, and if the storage does not answer."""

    def read(self, key: str, made_from: str, limit: Limit) -> bytes | None:
        """Return the content of what `find` finds; for small files."""

    def address(self, key: str, size: int) -> Stored:
        """Return a new URL for a file that is known to exist under `key` with `size` bytes. Does not ask the storage."""
