"""Which HTTP statuses are final. No dependencies: the worker, the client and the fetcher of checkpoints share it."""

from __future__ import annotations

_TRY_LATER = (408, 425, 429)
"""Request timeout, too early, too many requests."""


def is_refusal(status: int) -> bool:
    """Whether a status rejects the request for good (most of 4xx). After any other failure a retry may succeed."""
    return 400 <= status < 500 and status not in _TRY_LATER
