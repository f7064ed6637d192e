"""What a command does when the reader of its output leaves, as `| head` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

READER_LEFT = 141
"""128 + SIGPIPE, as a shell reports it."""


def until_reader_leaves(command: Callable[[], int]) -> int:
    """Run a command and return its exit status, or READER_LEFT, without a word."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more at its end
        return READER_LEFT
