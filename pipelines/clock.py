"""Where the seconds of a start go. No torch in this file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(took: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to `took[name]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        took[name] = round(took.get(name, 0.0) + time.monotonic() - start, 3)
