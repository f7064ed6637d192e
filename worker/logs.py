"""Logging: one JSON object per line on stderr, with the job's id if there is one.

A line says what was done and how long it took. Results, tokens and signed URLs are never logged. A filter removes them from
the lines of libraries.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("worker")

_SHORTEST_SECRET = 6
"""In characters. A shorter text would match in every other line."""

_LOOKS_SECRET = [
    (re.compile(r"(?<=//)[^/\s@\"'\\]+@"), "…@"),  # user:password@ of a URL
    (re.compile(r"\?[\w%.~\-\[\]]*=[^\s\"'\\<>]*"), "?…"),  # the query of a URL, where signatures are
    (re.compile(r"\b(X-Amz-[\w-]+|Signature|AWSAccessKeyId|token)=[^&\s\"'\\]+", re.IGNORECASE), r"\1=…"),
    (re.compile(r"\bhf_\w{8,}"), "hf_…"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), "AKIA…"),
    (re.compile(r"\b(Bearer|Basic|AWS4-HMAC-SHA256)\s+[\w+/=.~-]{8,}"), r"\1 …"),
]

_hidden: tuple[str, ...] = ()
"""Secrets of the worker and of the running jobs. The tuple is replaced, never changed: other threads iterate over it."""
_hiding = threading.Lock()


def redact(text: str) -> str:
    """Return `text` without known secrets, tokens, and the queries and passwords of URLs."""
    for secret in _hidden:
        text = text.replace(secret, "…")
    for pattern, instead in _LOOKS_SECRET:
        text = pattern.sub(instead, text)
    return text


def hide(secrets: Iterable[str]) -> list[str]:
    """Keep these texts out of the log from now on. Returns those that are long enough to be hidden."""
    global _hidden
    mine = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]
    with _hiding:
        _hidden = (*_hidden, *mine)
    return mine


@contextmanager
def hidden(secrets: Iterable[str]) -> Iterator[None]:
    """Keep these texts out of the log while the block runs."""
    global _hidden
    mine = hide(secrets)
    try:
        yield
    finally:
        with _hiding:
            left = list(_hidden)
            for secret in mine:  # another job may hide the same text: each removes its own
                left.remove(secret)
            _hidden = tuple(left)


class Redacting(logging.Filter):
    """Removes secrets from a record before any handler sees it: from its message, its fields and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = redact(record.getMessage()), None
        except Exception:  # a library logged a line with wrong arguments; log it anyway
            record.msg, record.args = redact(str(record.msg)), None
        if fields := getattr(record, "fields", None):
            record.fields = {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


class _JsonLines(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._of_all = {"gpu": rank} if rank else {}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
            **self._of_all,
        }
        line |= getattr(record, "fields", {})
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(line, ensure_ascii=False, default=str)


class _AroundProgressBars(logging.StreamHandler[TextIO]):
    """Writes lines above a progress bar in the terminal, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        # If a line cannot be written, as when stderr is closed, it is lost. logging's `handleError` would write to stderr too.
        with suppress(Exception):
            tqdm.write(self.format(record), file=self.stream)


def configure(rank: int = 0) -> None:
    """Set up the root logger. Call this before runpod or transformers is imported: they change an unconfigured logger.

    `rank`: of the process; above 0, every line names its GPU.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = _AroundProgressBars(sys.stderr)
    handler.setFormatter(_JsonLines(rank))
    handler.addFilter(Redacting())  # on the handler: a logger's own filter does not see what its children log
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    log.setLevel(logging.INFO)


@contextmanager
def stage(name: str, timings: dict[str, float] | None = None, **fields: Any) -> Iterator[None]:
    """Log one line when the stage ends, even by an error, and add its seconds to `timings`."""
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
