"""Waits for a call that cannot be interrupted, such as looking up a name, and leaves it behind when time is over."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.5
"""How often `check` is called while the call runs."""


def wait_for(work: Callable[[], T], check: Callable[[], None]) -> T:
    """Return or raise what `work` does, or raise what `check` raises before that.

    `work` runs in its own thread. If `check` raises, the thread is left behind, so `work` must end by itself at some time.
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
