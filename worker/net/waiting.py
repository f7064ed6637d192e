"""Wait for a call that nobody can interrupt, such as the look-up of a name, and leave it behind when it is time to go."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.5
"""How long nothing may come before `check` is called again."""


def wait_for(work: Callable[[], T], check: Callable[[], None]) -> T:
    """What `work` returns or raises, or what `check` raises before that.

    The work has a thread of its own, which is left behind then: all that it still waits for must have an end.
    """
    check()
    outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="wait_for", daemon=True).start()
    while True:
        try:
            value, error = outcome.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            check()
            continue
        if error is not None:
            raise error
        return value  # type: ignore[return-value]
