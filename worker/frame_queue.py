"""A bounded queue of frames between the GPU's thread and the encoder's."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from worker.errors import Stopped

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3] RGB."""

MAX_BYTES = 500_000_000
"""How much may wait for the encoder: 400 frames of 832x480, or 160 of 1024x1024."""

_POLL_SECONDS = 0.2
"""How often a writer that waits for room looks at its stop event."""


class Abandoned(Exception):
    """The reader has failed and takes no more frames."""


class FrameQueue:
    """One video's frames, in order. One thread puts them in and closes the queue, another reads them."""

    def __init__(self) -> None:
        self._waiting: deque[Frames] = deque()
        self._bytes = 0
        self._complete: bool | None = None
        """None while frames may still come; then whether the whole video was put in."""
        self._abandoned = False
        self._changed = threading.Condition()
        self.seconds_waited = 0.0
        """How long the reader had nothing to do."""

    def put(self, frames: Frames, stop: threading.Event) -> None:
        """Add frames, and wait while too many are waiting already. Raises Abandoned, and Stopped when `stop` is set."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._abandoned or self._bytes <= MAX_BYTES, _POLL_SECONDS):
                if stop.is_set():
                    raise Stopped
            if self._abandoned:
                raise Abandoned
            self._waiting.append(frames)
            self._bytes += frames.nbytes
            self._changed.notify_all()

    def close(self, complete: bool) -> None:
        """Tell the reader that no more frames come. `complete`: all frames of the video were put in."""
        with self._changed:
            self._complete = complete
            self._changed.notify_all()

    def abandon(self) -> None:
        """Take no more frames: from now on `put` raises Abandoned."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def frames(self, stop: threading.Event) -> Iterator[Frames]:
        """Yield the frames as they come. Raises Stopped when `stop` is set between two of them, or the video is incomplete."""
        while True:
            with self._changed:
                started = time.monotonic()
                self._changed.wait_for(lambda: self._waiting or self._complete is not None)
                self.seconds_waited += time.monotonic() - started
                if self._complete is False or stop.is_set():
                    raise Stopped
                if not self._waiting:
                    return
                frames = self._waiting.popleft()
                self._bytes -= frames.nbytes
                self._changed.notify_all()
            yield frames
