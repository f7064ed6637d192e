"""The GPU's lock, and what becomes of jobs that wait for it."""

from __future__ import annotations

import asyncio
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
