"""What can end a run, each with a code for programs and a text for people. No key, token or signed URL is in one."""

from __future__ import annotations

import re
from collections.abc import Sequence


class ClientError(Exception):
    """`code` is one word; `str()` says what happened and what to do."""

    job_id: str | None = None
    """Of the job that it happened to, if there was one by then: it may still run."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class InvalidRequest(ClientError):
    """The request breaks the schema; nothing was sent. `problems`: each with its field, the rule and the remedy."""

    def __init__(self, code: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(code, "the request was not sent:\n" + "\n".join(f"  - {problem}" for problem in problems))


class JobFailed(ClientError):
    """The worker's error. `code` is the worker's, as OUT_OF_MEMORY, or JOB_FAILED for a text without one."""

    def __init__(self, text: str) -> None:
        coded = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", text)
        super().__init__(coded[1] if coded else "JOB_FAILED", text)


class JobStopped(ClientError):
    """The job was cancelled, or its time ran out. `code`: CANCELLED or TIMEOUT."""


class Unreachable(ClientError):
    """No usable answer for as long as the client is patient."""

    def __init__(self, message: str) -> None:
        super().__init__("UNREACHABLE", message)


class NotAuthorized(ClientError):
    """The endpoint does not take the key."""

    def __init__(self, message: str) -> None:
        super().__init__("NOT_AUTHORIZED", message)


class JobNotFound(ClientError):
    """There is no such endpoint or job, or the job's result is no longer kept."""

    def __init__(self, message: str) -> None:
        super().__init__("NOT_FOUND", message)


class Refused(ClientError):
    """The server does not take the request, for another reason than its key."""

    def __init__(self, message: str) -> None:
        super().__init__("REFUSED", message)


class SubmissionUnknown(ClientError):
    """The request left, and its answer was lost: a job may run."""

    def __init__(self, message: str) -> None:
        super().__init__("SUBMISSION_UNKNOWN", message)


class DownloadFailed(ClientError):
    """A finished file could not be fetched. `code`: DOWNLOAD_FAILED or URL_EXPIRED."""
