"""Shows a job's progress on stderr: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
import unicodedata
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from client.result import Progress

_SECONDS_BETWEEN_LINES = 30.0
"""While the stage stays the same, and stderr is not a terminal."""

_WORDS = {"IN_QUEUE": "waiting for a worker", "IN_PROGRESS": "running"}


class Display:
    """Prints progress with `show` and lines with `say`. A context manager: at its end the bar is removed."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._shown = ""
        self._shown_at = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._close()

    def say(self, line: str) -> None:
        tqdm.write(printable(line), file=sys.stderr)
        sys.stderr.flush()

    def show(self, progress: Progress) -> None:
        if progress.status not in _WORDS:
            self._close()  # the paths on stdout start on a new line
            return
        stage = _stage(progress)
        if sys.stderr.isatty() and self._bar is None:
            form = "{desc} {bar} {percentage:3.0f}% {elapsed}{postfix}"
            self._bar = tqdm(total=100, file=sys.stderr, bar_format=form, leave=False, delay=1e-9)
        if self._bar is not None:
            self._bar.set_description_str(printable(stage), refresh=False)
            self._bar.set_postfix_str(_left(progress), refresh=False)
            self._bar.n = _percent(progress) or 0
            self._bar.refresh()
        elif stage != self._shown or time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._shown, self._shown_at = stage, time.monotonic()
            self.say(line_of(progress))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def printable(text: str) -> str:
    """The text for a terminal. What a server sends can hold codes that move the cursor, hide text or turn its direction."""
    return "".join(
        "?" if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") and letter != "\n" else letter for letter in text
    )


def line_of(progress: Progress) -> str:
    """One line, such as `denoise, step 4 of 10, 40%, 1 min 24 s left`."""
    step = f", step {progress.step} of {progress.steps}" if progress.stage == "denoise" else ""
    percent = "" if progress.percent is None else f", {_percent(progress)}%"
    left = _left(progress)
    return f"{_stage(progress)}{step}{percent}{', ' if left else ''}{left}"


def _stage(progress: Progress) -> str:
    if progress.stage is None:
        return _WORDS.get(progress.status, progress.status)
    return (
        progress.stage if progress.prompts == 1 else f"{progress.stage} {(progress.prompt_index or 0) + 1}/{progress.prompts}"
    )


def _percent(progress: Progress) -> int | None:
    """At most 99: after the last step of the denoising, which the worker's percentage counts, the file is still to be made."""
    return None if progress.percent is None else min(progress.percent, 99)


def _left(progress: Progress) -> str:
    minutes, seconds = divmod(round(progress.seconds_left or 0), 60)
    if not minutes and not seconds:
        return ""
    return f"{minutes} min {seconds} s left" if minutes else f"{seconds} s left"
