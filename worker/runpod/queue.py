"""RunPod's queue: the SDK's job loop, ahead of the GPU, and without the ways in which it loses something.

The next job is taken shortly before the GPU is free, so that its files are there by then; not sooner, since another worker may
be idle. The last job's file is encoded and uploaded meanwhile.

By itself the SDK posts a result three times and then drops it in silence. Told to leave while it waits for a job, it goes on
waiting for up to 90 s and drops the job that comes. A stop that overtakes the start of its job is forgotten. A queue that fails
is asked again at once, hundreds of times a second.

Imported once the log is set up: the SDK reads its environment when it is imported.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import worker.runpod.sdk  # noqa: F401 it makes the import of the SDK quick

# isort: split

import aiohttp
import runpod
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_fitness, rp_http, rp_scale
from runpod.serverless.modules.rp_job import get_job, run_job
from runpod.serverless.modules.rp_logger import RunPodLogger

from worker.errors import is_refusal
from worker.logs import log, redact

Job = dict[str, Any]
Handler = Callable[[Job], Awaitable[dict[str, Any]]]

_SECONDS_TO_POST = 300.0
_SECONDS_PER_TRY = 30.0
_LONGEST_PAUSE = 15.0
_SECONDS_TO_START = 0.3
"""The loop looks for taken jobs every tenth of a second."""
_REFUSALS = 4
_JOBS_AT_ONCE = 4
"""One on the GPU, one that is being fetched, two that are being uploaded."""
_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_AFTER_A_FAILURE = 0.5


def serve(handler: Handler, wants_a_job: Callable[[], bool]) -> None:
    """Take jobs until the worker is told to leave: by SIGTERM, SIGINT, or the platform. Without RunPod's queue: local modes."""
    rp_scale.JobScaler = _Loop
    if "--rp_serve_api" in sys.argv:
        from worker.runpod import local_api  # brings a web server's libraries, which a worker in the cloud has no use for

        local_api.install()
    config = {"handler": handler, "wants_a_job": wants_a_job, "concurrency_modifier": lambda _: _JOBS_AT_ONCE}
    runpod.serverless.start(config)


def redact_the_log() -> None:
    """The SDK writes its lines past the root logger; whole results at level DEBUG."""
    write = RunPodLogger.log

    def log(self: RunPodLogger, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
        write(self, redact(str(message)), message_level, job_id)

    RunPodLogger.log = log


def report_unhealthy(reason: str) -> NoReturn:
    """Tell the platform why this worker cannot start, by the SDK's way for it, and end with status 1."""

    def start_check() -> None:
        raise RuntimeError(reason)

    runpod.serverless.register_fitness_check(start_check)
    asyncio.run(rp_fitness.run_fitness_checks())
    sys.exit(1)


class _Loop(rp_scale.JobScaler):  # type: ignore[misc]
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_handler = self._run_and_post
        self.jobs_fetcher = self._take_a_job
        self._wants_a_job: Callable[[], bool] = config["wants_a_job"]
        self._not_begun: set[str] = set()
        """Ids of jobs that were taken, of which the handler does not know yet."""

    async def _take_a_job(self, session: aiohttp.ClientSession, wanted: int) -> list[Job] | None:
        while self.is_alive() and (self._not_begun or not self._wants_a_job()):
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        if not self.is_alive():
            return None
        try:
            jobs: list[Job] | None = await get_job(session, 1)
        except TooManyRequests:
            raise  # the SDK waits five seconds
        except Exception:
            await asyncio.sleep(_SECONDS_AFTER_A_FAILURE)  # the SDK would ask again at once, hundreds of times a second
            raise
        self._not_begun.update(job["id"] for job in jobs or [])
        return jobs

    async def _run_and_post(self, session: aiohttp.ClientSession, config: dict[str, Any], job: Job) -> None:
        self._not_begun.discard(job["id"])
        await _post(session, await run_job(config["handler"], job), job["id"])

    async def run(self) -> None:
        async with AsyncClientSession() as session:
            taking = asyncio.create_task(self.get_jobs(session))
            stopping = asyncio.create_task(self.monitor_stop_signals(session))
            await self.run_jobs(session)
            taking.cancel()
            await asyncio.wait([taking])
            await self.run_jobs(session)  # what came in at the last moment
            stopping.cancel()
            await asyncio.wait([stopping])

    async def stop_job(self, job_id: str) -> bool:
        if job_id not in self.jobs_tasks:
            await asyncio.sleep(_SECONDS_TO_START)
        await asyncio.sleep(0)  # a task that is cancelled before its first step does not even clean up
        return bool(await super().stop_job(job_id))


async def _post(session: aiohttp.ClientSession, result: dict[str, Any], job_id: str) -> None:
    """Post a result until it arrives: for minutes, since the GPU time is paid. A refusal (4xx) is final after a few tries."""
    url = rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
    body = json.dumps(result, ensure_ascii=False).encode()
    headers = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job_id}
    timeout = aiohttp.ClientTimeout(total=_SECONDS_PER_TRY)
    give_up_at, pause, refusals = time.monotonic() + _SECONDS_TO_POST, 0.5, 0
    while True:
        try:
            async with session.post(url, data=body, headers=headers, timeout=timeout) as answer:
                if answer.ok:
                    return
                reason = f"the queue answered {answer.status}"
                refusals += is_refusal(answer.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = type(error).__name__
        if refusals == _REFUSALS or time.monotonic() + pause > give_up_at:
            log.error("the result was not taken (%s)", reason, extra={"fields": {"job": job_id}})
            return
        log.warning("the result was not taken (%s), trying again", reason, extra={"fields": {"job": job_id}})
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
