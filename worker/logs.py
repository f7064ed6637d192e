"""Logging: one JSON object a line on stderr, with the job's id where there is one.

A line says what was done and how long it took. Results, tokens and URLs are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("worker")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _AroundProgressBars(logging.StreamHandler[TextIO]):
    """Lines go above a progress bar in the terminal, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


def configure() -> None:
    """Set up the root logger. Call it before runpod or transformers is imported: they look at what is set up already."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = _AroundProgressBars(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)


@contextmanager
def stage(name: str, timings: dict[str, float] | None = None, **fields: Any) -> Iterator[None]:
    """Log one line when the stage ends, well or not, and add its seconds to `timings`."""
    start = time.monotonic()
    outcome = "done"
    try:
        yield
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        seconds = round(time.monotonic() - start, 3)
        if timings is not None:
            timings[name] = round(timings.get(name, 0.0) + seconds, 3)
        log.info("%s %s", name, outcome, extra={"fields": {**fields, "stage": name, "seconds": seconds}})
