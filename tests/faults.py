"""What can go wrong with a request, and when: for servers in tests that fail on demand."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """The request is refused: it does not count."""

    code: int


@dataclass(frozen=True)
class Garbage:
    """An answer of 200 with a page instead of what was asked for, as from a proxy; the request does not count."""


@dataclass(frozen=True)
class Dropped:
    """The connection ends before an answer; the request does not count."""


@dataclass(frozen=True)
class Unanswered:
    """The connection ends before an answer, and the request counts: the one who asked cannot know."""


@dataclass(frozen=True)
class CutShort:
    """The connection ends in the middle of the answer; the request counts."""


@dataclass(frozen=True)
class Slow:
    """The answer comes after so many seconds; the request counts."""

    seconds: float


Fault = Status | Garbage | Dropped | Unanswered | CutShort | Slow
DOES_NOT_COUNT = (Status, Garbage, Dropped)


class Faults:
    """What was ordered for each kind of request, in order, and what was met."""

    def __init__(self) -> None:
        self.met_at: list[tuple[float, str, Fault]] = []
        """When (of the monotonic clock), by which kind of request, and what."""
        self._ordered: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._lock = threading.Lock()

    @property
    def met(self) -> Counter[str]:
        """How many, by the kind of request and the name of the fault, as in `take Status`."""
        return Counter(f"{kind} {type(fault).__name__}" for _, kind, fault in self.met_at)

    def order(self, kind: str, fault: Fault, times: int = 1) -> None:
        """The next `times` requests of this kind meet `fault`, after those ordered before."""
        with self._lock:
            self._ordered[kind].extend([fault] * times)

    def forget(self) -> None:
        """What was ordered and not met yet will not come."""
        with self._lock:
            self._ordered.clear()

    def next(self, kind: str, *classes: type) -> Fault | None:
        """The fault that a request of this kind meets now; with `classes` only if it is one of them."""
        with self._lock:
            ordered = self._ordered[kind]
            if not ordered or not isinstance(ordered[0], classes or object):
                return None
            fault = ordered.popleft()
            self.met_at.append((time.monotonic(), kind, fault))
            return fault
