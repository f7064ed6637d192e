"""Frames on their way from the GPU's thread to the encoder's, so that neither waits for the other for long."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from worker.net.download import Stopped

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3] RGB."""

MAX_BYTES = 500_000_000
"""What may wait for the encoder: 400 frames of 832x480, or 160 of 1024x1024."""


class Abandoned(Exception):
    """Nobody takes the frames any more: the reader has failed."""


class Handover:
    """One video's frames, in order. One thread puts them in and ends it, another takes them out."""

    def __init__(self) -> None:
        self._waiting: deque[Frames] = deque()
        self._bytes = 0
        self._ended: bool | None = None
        """None while frames may still come; then whether the video is whole."""
        self._left = False
        self._changed = threading.Condition()
        self.seconds_waited = 0.0
        """How long the reader had nothing to do."""

    def put(self, frames: Frames) -> None:
        """Waits while too much is waiting already. Raises Abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._bytes <= MAX_BYTES)
            if self._left:
                raise Abandoned
            self._waiting.append(frames)
            self._bytes += frames.nbytes
            self._changed.notify_all()

    def end(self, whole: bool) -> None:
        """No more frames come: all of the video are in, or the rest was never made."""
        with self._changed:
            self._ended = whole
            self._changed.notify_all()

    def leave(self) -> None:
        """The reader takes no more frames."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def until(self, stop: threading.Event) -> Iterator[Frames]:
        """The frames as they come. Raises Stopped when `stop` is set between two of them, or the video is not whole."""
        while True:
            with self._changed:
                started = time.monotonic()
                self._changed.wait_for(lambda: self._waiting or self._ended is not None)
                self.seconds_waited += time.monotonic() - started
                if self._ended is False or stop.is_set():
                    raise Stopped
                if not self._waiting:
                    return
                frames = self._waiting.popleft()
                self._bytes -= frames.nbytes
                self._changed.notify_all()
            yield frames
