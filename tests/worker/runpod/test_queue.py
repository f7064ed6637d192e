"""The SDK's loop as the worker changes it, without a worker: which jobs are taken, and what an SDK that has moved may do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from runpod.serverless.modules import rp_scale
from runpod.serverless.modules.rp_logger import RunPodLogger

from worker.runpod import queue
from worker.settings import SettingsError

Poll = Callable[[], Awaitable[list[dict[str, Any]] | None]]


class Platform:
    """Answers requests for jobs by a script, runs what is taken, and notes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *polls: Poll) -> None:
        self.polls = list(polls)
        self.is_busy = False
        self.run: list[str] = []
        self.posted: list[dict[str, Any]] = []
        monkeypatch.setattr(queue, "get_job", self.get_job)
        monkeypatch.setattr(queue, "_post", self.post)

    async def get_job(self, session: Any) -> list[dict[str, Any]]:
        poll = self.polls.pop(0) if self.polls else nothing
        return await poll() or []

    async def handler(self, job: dict[str, Any]) -> dict[str, Any]:
        self.run.append(job["id"])
        return {"done": job["id"]}

    async def post(self, session: Any, result: dict[str, Any], job_id: str) -> None:
        self.posted.append(result)

    def loop(self) -> queue._Loop:
        config = {
            "handler": queue._refuse,
            "our_handler": self.handler,
            "wants_a_job": lambda: not self.is_busy,
            "concurrency_modifier": lambda _: 4,
        }
        return queue._Loop(config)


async def nothing() -> None:
    await asyncio.sleep(60)


def after(seconds: float, job_id: str) -> Poll:
    async def poll() -> list[dict[str, Any]]:
        await asyncio.sleep(seconds)
        return [{"id": job_id, "input": {"a": 1}}]

    return poll


async def serve(loop: queue._Loop, seconds: float) -> None:
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(seconds)
    loop.kill_worker()
    await asyncio.wait_for(running, 10)


def test_a_job_that_is_handed_over_after_the_limit_of_a_poll_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_SECONDS_PER_POLL", 0.2)
    platform = Platform(monkeypatch, after(0.5, "late"))
    asyncio.run(serve(platform.loop(), 1.0))
    assert platform.run == ["late"]


def test_a_queue_that_gives_no_job_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def at_once() -> Any:
        nonlocal asked
        asked += 1
        return []

    platform = Platform(monkeypatch, *[at_once] * 1000)
    asyncio.run(serve(platform.loop(), 1.0))
    assert 1 <= asked <= 4
    assert not platform.run


def test_waiting_for_the_gpu_does_not_use_up_the_time_of_a_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK bounds a request for a job; here the worker is busy for longer than that bound."""
    platform = Platform(monkeypatch, after(0.4, "handed over"))
    platform.is_busy = True
    loop = platform.loop()
    loop.jobs_fetcher_timeout = 0.5

    async def go() -> None:
        asyncio.get_running_loop().call_later(0.3, setattr, platform, "is_busy", False)
        await serve(loop, 1.2)

    asyncio.run(go())
    assert platform.run == ["handed over"]


def test_an_old_poll_that_is_answered_while_the_worker_is_busy_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_SECONDS_PER_POLL", 0.1)
    platform = Platform(monkeypatch, after(0.6, "late"))

    async def go() -> None:
        asyncio.get_running_loop().call_later(0.3, setattr, platform, "is_busy", True)
        await serve(platform.loop(), 1.2)

    asyncio.run(go())
    assert platform.run == ["late"]


def test_a_job_that_is_on_its_way_when_the_worker_shuts_down_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(monkeypatch, after(0.6, "on its way"))
    asyncio.run(serve(platform.loop(), 0.3))
    assert platform.run == ["on its way"]


def test_an_idle_worker_shuts_down_in_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Platform(monkeypatch).loop()

    async def go() -> None:
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0.2)
        loop.kill_worker()
        await asyncio.wait_for(running, 2)

    asyncio.run(go())


def test_an_sdk_that_takes_jobs_in_its_own_way_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the SDK had renamed `jobs_fetcher`: four jobs at once would come."""
    platform = Platform(monkeypatch)
    loop = platform.loop()
    jobs = [[{"id": f"{number}", "input": {"a": 1}} for number in range(4)]]

    async def own_fetcher(session: Any, number: int) -> list[dict[str, Any]] | None:
        return jobs.pop() if jobs else await asyncio.sleep(60)

    loop.jobs_fetcher = own_fetcher
    asyncio.run(serve(loop, 0.6))
    assert platform.run == []
    assert [result["error"].split(";")[0] for result in platform.posted] == [
        "INTERNAL: runpod 1.12.0 runs jobs in a way that this worker does not know"
    ] * 4


def test_an_sdk_that_runs_jobs_past_the_loop_meets_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("runpod.serverless.start", lambda config: seen.append(config))
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "https://example.com/job-take/$ID")
    monkeypatch.setattr(rp_scale, "JobScaler", rp_scale.JobScaler)

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        return {"made": True}

    queue.serve(handler, lambda: True, "wan21_1b")
    result = asyncio.run(seen[0]["handler"]({"id": "a"}))
    assert result["error"].startswith(
        "INTERNAL: runpod 1.12.0 runs jobs in a way that this worker does not know; install runpod"
    )


@pytest.mark.parametrize("change", ["gone", "not called"])
def test_a_log_that_cannot_be_redacted_stops_the_start(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    if change == "gone":
        monkeypatch.setattr(RunPodLogger, "error", lambda *_: None)
        monkeypatch.delattr(RunPodLogger, "log")
    else:
        monkeypatch.setattr(RunPodLogger, "log", RunPodLogger.log)
        monkeypatch.setattr(RunPodLogger, "error", lambda self, message, request_id=None: print(message))
    with pytest.raises(SettingsError, match="cannot be redacted; install runpod"):
        queue.redact_the_log()
