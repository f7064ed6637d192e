"""The process of another GPU ends when nothing can tell it what to do."""

from __future__ import annotations

import os
import threading
from multiprocessing import Pipe
from queue import SimpleQueue

import pytest

from worker import rank


@pytest.mark.parametrize(("sent", "status"), [(None, 0), (b"no command", 1)], ids=["the worker ended", "cannot be read"])
def test_a_rank_ends_when_it_gets_no_more_commands(sent: bytes | None, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    ours, theirs = Pipe()
    ours.send(("denoise", ()))
    if sent:
        ours.send_bytes(sent)
    ours.close()
    commands: SimpleQueue = SimpleQueue()
    with pytest.raises(SystemExit) as ended:
        rank._receive(theirs, commands, threading.Event())
    assert ended.value.code == status
    assert commands.get() == ("denoise", ())
