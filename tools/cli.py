"""Exit statuses and one-line errors for the commands of this package."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from client.closed_pipe import until_reader_leaves
from client.errors import BadInput as BadInput


class Main(Protocol):
    """`argv`: arguments without the program's name; None for the process's own. Returns the exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


FITS, DIFFERS, BAD_INPUT = 0, 1, 2
"""Exit statuses of every command; see `closed_pipe` for one more."""


def one_line_errors(main: Main) -> Main:
    """Turn BadInput and OSError into one line on stderr and exit status 2."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return until_reader_leaves(lambda: main(argv))
        except BadInput as error:
            text = str(error)
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{Path(inspect.getfile(main)).stem}: {text}", file=sys.stderr)
        return BAD_INPUT

    return guarded
