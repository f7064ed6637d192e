"""Retries of downloads, with longer pauses each time. No dependencies: every download in builder/ uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_REQUESTED_PAUSE = 1.0, 15.0, 300.0
"""Seconds. A server can request a pause, for example by Retry-After."""


class FetchError(Exception):
    """A download failed for good. The message is one line: what failed, where, and what to do."""


class TryAgain(Exception):
    """An attempt failed, and another one may succeed."""

    def __init__(self, reason: str, requested_pause: float = 0.0) -> None:
        """`requested_pause`: the seconds that the server asks to wait."""
        super().__init__(reason)
        self.requested_pause = requested_pause


def retry(
    what: str,
    attempt: Callable[[], T],
    pause: Callable[[str, float], object],
    attempts: int = 8,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Call `attempt` until it raises no TryAgain, and return what it returns.

    Raises FetchError after `attempts` consecutive attempts in which `progress` (bytes) has not grown. `pause` prints a message
    and waits some seconds.
    """
    failures = most = 0
    while True:
        try:
            return attempt()
        except TryAgain as error:
            if progress() > most:
                most, failures = progress(), 0
            failures += 1
            if failures >= attempts:
                raise FetchError(f"{what}: {error}, {failures} times in a row; run the command again later") from None
            grown = min(_FIRST_PAUSE * 2 ** (failures - 1), _LONGEST_PAUSE)
            seconds = max(grown, min(error.requested_pause, _LONGEST_REQUESTED_PAUSE))
            pause(f"{what}: {error}; next attempt in {seconds:.1f} s", seconds)
