"""The client's errors: each has a code for programs and a text for people. None contains a key, a token or a signed URL."""

from __future__ import annotations

import re
from collections.abc import Sequence

from worker.errors import Code, Problem, WorkerError

_CODED = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
"""The start of a worker's error, as in `OUT_OF_MEMORY: …`."""


class BadInput(Exception):
    """A file of this computer cannot be used; the text says why, and what to do."""


class ClientError(Exception):
    """`code` is one word; `str()` says what happened and what to do."""

    job_id: str | None = None
    """The job that failed, if one was started. It may still run."""

    problems: tuple[Problem, ...] = ()
    """The problems of the request. Each has a `code`, a `field` such as `prompts[1].width`, and a `text`."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class InvalidRequest(ClientError):
    """The request breaks the schema and was not sent; see `problems`. `code` is the worker's for it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [f"\n  - {problem} ({problem.code})" for problem in problems]
        super().__init__(WorkerError.of(problems).code, f"the request was not sent:{''.join(lines)}")


class JobFailed(ClientError):
    """The worker's error. `code` is the worker's, such as OUT_OF_MEMORY, or JOB_FAILED for a text without one.

    `problems` are those that the text lists.
    """

    def __init__(self, text: str) -> None:
        coded = _CODED.match(text)
        self.problems = _problems_in(text)
        super().__init__(coded[1] if coded else "JOB_FAILED", text)


class JobStopped(ClientError):
    """The job was cancelled, or it ran out of time. `code`: CANCELLED or TIMEOUT."""


class Unreachable(ClientError):
    """No usable answer came for `patience` seconds."""

    def __init__(self, message: str) -> None:
        super().__init__("UNREACHABLE", message)


class NotAuthorized(ClientError):
    """The endpoint rejects the key."""

    def __init__(self, message: str) -> None:
        super().__init__("NOT_AUTHORIZED", message)


class JobNotFound(ClientError):
    """The endpoint or the job does not exist, or the job's result was deleted."""

    def __init__(self, message: str) -> None:
        super().__init__("NOT_FOUND", message)


class Refused(ClientError):
    """The server rejects the request for another reason than its key."""

    def __init__(self, message: str) -> None:
        super().__init__("REFUSED", message)


class SubmissionUnknown(ClientError):
    """The request was sent, but its answer was lost: the job may run."""

    def __init__(self, message: str) -> None:
        super().__init__("SUBMISSION_UNKNOWN", message)


class DownloadFailed(ClientError):
    """A finished file could not be downloaded. `code`: DOWNLOAD_FAILED or URL_EXPIRED."""


def _problems_in(text: str) -> tuple[Problem, ...]:
    """The problems in a worker's error, which `WorkerError.of` wrote; none in any other text."""
    coded = _CODED.match(text)
    if not coded or coded[1] not in Code.__members__:
        return ()
    code, text = Code[coded[1]], text[coded.end() :]
    parts = []
    if several := re.match(r"(\d{1,3}) problems: \(1\) ", text):
        text = text[several.end() :]
        for number in range(2, int(several[1]) + 1):
            part, _, text = text.partition(f"; ({number}) ")
            parts.append(part)
    return tuple(_problem(part, code) for part in [*parts, text])


def _problem(text: str, code: Code) -> Problem:
    own = _CODED.match(text)
    if own and own[1] in Code.__members__:
        code, text = Code[own[1]], text[own.end() :]
    field = re.match(r"`([^`]+)`: ", text)
    return Problem(code, field[1], text[field.end() :]) if field else Problem(code, "", text)
