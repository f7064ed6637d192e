"""Jobs and results as JSON. Every job that RunPod hands out gets an answer, whatever a client put into it.

The SDK silently drops a job that Python's parser rejects, and a result that is not valid JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from worker.errors import Code

Job = dict[str, Any]

_LONGEST_NUMBER = 4000
"""In digits. Python reads no integer with more than 4,300; a longer one becomes 1e9999, which no field accepts."""
_TOO_DEEP = f"{Code.INVALID_INPUT}: the input nests lists or objects deeper than can be read; a request has four levels"
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{}:,]', re.DOTALL)


def parse_jobs(body: bytes) -> tuple[list[Job], list[tuple[str, str]]]:
    """Return the jobs in the platform's answer, and the id and the error of each job that cannot be read.

    A job without an id cannot be answered, and is dropped.
    """
    try:
        found = json.loads(body, parse_int=_integer) if body.strip() else []
    except RecursionError:
        return [], [(job_id, _TOO_DEEP) for job_id in _ids_in(body)]
    except ValueError:  # a proxy's error page, or half an answer
        return [], []
    jobs = found if isinstance(found, list) else [found]
    return [job for job in jobs if isinstance(job, dict) and isinstance(job.get("id"), str) and job["id"]], []


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else float(f"{digits[:2]}e9999")


def _ids_in(body: bytes) -> Iterator[str]:
    """Yield the `id` of each job: of the outermost object, or of the objects in the outermost list."""
    outermost = 2 if body.lstrip()[:1] == b"[" else 1
    depth, last, is_id = 0, b"", False
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            depth -= 1
        elif token == b":":
            is_id = depth == outermost and last == b'"id"'
            continue
        elif token[:1] == b'"' and is_id:
            yield str(json.loads(token))
        last, is_id = token, False


def bodies_of(result: dict[str, Any]) -> Iterator[bytes]:
    """Yield the result as the platform expects it; then, if that is too large, a result without details; then an error."""
    yield _encoded(result)
    output = result.get("output")
    if isinstance(output, dict) and "settings" in output:
        said = "the result was too large for the platform; settings and warnings are in result.json beside the files"
        yield _encoded(result | {"output": {**output, "settings": {}, "warnings": [said]}})
    yield _encoded({"error": f"{Code.INTERNAL}: the result is too large for the platform; its files are in the bucket"})


def _encoded(result: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # numbers that JSON does not have
        text = json.dumps({"error": f"{Code.INTERNAL}: the result cannot be written as JSON"})
    return text.encode("utf-8", "replace")
