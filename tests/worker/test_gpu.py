"""The GPU's lock, and what becomes of jobs that wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest

from pipelines.errors import DeviceLost
from worker.gpu import Gpu
from worker.ranks import Ranks


def test_a_job_that_waited_while_another_lost_the_gpu_is_not_begun() -> None:
    gpu, run, begun = Gpu(None, Ranks()), SimpleNamespace(stop=threading.Event()), []  # type: ignore[arg-type]

    def lose() -> None:
        raise DeviceLost

    async def two_jobs() -> None:
        for job in (lose, lambda: begun.append(1)):
            with pytest.raises(DeviceLost):
                await gpu._run(run, job)  # type: ignore[arg-type]

    asyncio.run(two_jobs())
    assert gpu.is_lost
    assert not begun


def test_a_gpu_that_is_lost_while_its_job_is_being_cancelled_takes_no_other_job() -> None:
    gpu, run, begun = Gpu(None, Ranks()), SimpleNamespace(stop=threading.Event()), threading.Event()  # type: ignore[arg-type]

    def lose() -> None:
        begun.set()
        run.stop.wait(5)
        raise DeviceLost

    async def cancelled_job() -> None:
        job = asyncio.create_task(gpu._run(run, lose))  # type: ignore[arg-type]
        await asyncio.to_thread(begun.wait, 5)
        job.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await job

    asyncio.run(cancelled_job())
    assert gpu.is_lost
