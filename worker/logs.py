"""Logging: one JSON object a line on stderr, with the job's id where there is one.

A line says what was done and how long it took. Results, tokens and signed URLs are never logged; a filter takes them out of
what libraries write.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("worker")

_SHORTEST_SECRET = 6
"""A shorter text is found in every other line."""

_LOOKS_SECRET = [
    (re.compile(r"(?<=//)[^/\s@\"'\\]+@"), "…@"),  # user:password@ of a URL
    (re.compile(r"\?[\w%.~\-\[\]]*=[^\s\"'\\<>]*"), "?…"),  # the query of a URL, where signatures are
    (re.compile(r"\b(X-Amz-[\w-]+|Signature|AWSAccessKeyId|token)=[^&\s\"'\\]+", re.IGNORECASE), r"\1=…"),
    (re.compile(r"\bhf_\w{8,}"), "hf_…"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), "AKIA…"),
    (re.compile(r"\b(Bearer|Basic|AWS4-HMAC-SHA256)\s+[\w+/=.~-]{8,}"), r"\1 …"),
]

_hidden: list[str] = []
"""Secrets of the worker, and of the jobs that are running."""


def redact(text: str) -> str:
    """`text` without known secrets, tokens, and the queries and passwords of URLs."""
    for secret in _hidden:
        text = text.replace(secret, "…")
    for pattern, instead in _LOOKS_SECRET:
        text = pattern.sub(instead, text)
    return text


def hide(secrets: Iterable[str]) -> list[str]:
    """From now on these texts are in no line of the log. Returns those that are long enough for it."""
    mine = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]
    _hidden.extend(mine)
    return mine


@contextmanager
def hidden(secrets: Iterable[str]) -> Iterator[None]:
    """While the block runs, these texts are in no line of the log."""
    mine = hide(secrets)
    try:
        yield
    finally:
        for secret in mine:
            _hidden.remove(secret)


class Redacting(logging.Filter):
    """Takes secrets out of a record before any handler sees it: out of its message, its fields and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = redact(record.getMessage()), None
        except Exception:  # a library's line with wrong arguments is still a line
            record.msg, record.args = redact(str(record.msg)), None
        if fields := getattr(record, "fields", None):
            record.fields = {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_text:
            line["traceback"] = record.exc_text
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
    handler.addFilter(Redacting())  # on the handler: a logger's own filter does not see what its children log
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
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
