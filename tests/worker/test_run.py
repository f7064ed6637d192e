"""Blocking work in threads: it stops when its job does, and one that does not is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from worker import run
from worker.run import in_thread, left_behind


@pytest.fixture(autouse=True)
def _none_left_behind() -> Iterator[None]:
    yield
    left_behind.clear()


def outcome_of(work: threading.Event, stop: threading.Event, seconds_to_stop: float) -> str:
    async def go() -> str:
        try:
            async with asyncio.timeout(0.1):
                await in_thread(stop, work.wait, 20, seconds_to_stop=seconds_to_stop)
        except TimeoutError:
            return "out of time"
        return "done"

    return asyncio.run(go())


def test_a_thread_that_stops_in_time_is_waited_for() -> None:
    stop = threading.Event()
    assert outcome_of(stop, stop, 10) == "out of time"  # the stop ends the work
    assert not left_behind.is_set()


def test_a_thread_that_outlives_its_stop_is_left_behind_and_the_job_is_answered() -> None:
    work, started = threading.Event(), time.monotonic()
    assert outcome_of(work, threading.Event(), 0.3) == "out of time"
    assert time.monotonic() - started < 5
    assert left_behind.is_set()
    work.set()


def test_the_time_to_stop_is_half_a_minute() -> None:
    assert run._SECONDS_TO_STOP == 30
