"""RunPod's queue: the SDK's job loop, changed to take jobs before the GPU is free and to lose nothing.

The worker takes the next job shortly before the GPU is free, so that its files are downloaded in time. It does not take it
earlier, since another worker may be idle. Meanwhile the last job's file is encoded and uploaded.

The SDK itself posts a result three times and then silently drops it. It cancels a request for a job after 90 s, and on SIGTERM,
even if the platform has just handed over a job. It forgets a cancellation that arrives before its job has started. If the queue
fails or answers nothing, it asks again at once, hundreds of times a second. It drops a job that it cannot parse.

Import this after the log is set up: the SDK reads the environment when it is imported. Tested with runpod 1.12.0.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any, NoReturn

import worker.runpod.sdk  # noqa: F401 it makes the import of the SDK fast

# isort: split

import aiohttp
import runpod
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_fitness, rp_http, rp_job, rp_scale
from runpod.serverless.modules.rp_job import run_job
from runpod.serverless.modules.rp_logger import RunPodLogger

from worker.logs import log, redact
from worker.net.statuses import is_refusal
from worker.progress import Send, Update
from worker.runpod.bodies import Job, bodies_of, parse_jobs
from worker.settings import SettingsError, is_in_cloud

TESTED_WITH = "1.12.0"
"""The version of runpod whose private names are used here, in `local_api` and in `sdk`."""

Handler = Callable[[Job], Awaitable[dict[str, Any]]]

_SECONDS_TO_POST = 300.0
_SECONDS_PER_TRY = 30.0
_LONGEST_PAUSE = 15.0
_SECONDS_TO_START = 0.3
"""How long a cancellation waits for its job to start: the loop starts taken jobs every tenth of a second."""
_REFUSALS = 4
_JOBS_AT_ONCE = 4
"""One on the GPU, one that downloads, two that upload."""
_SECONDS_BETWEEN_CHECKS = 0.05
_SECONDS_AFTER_A_FAILURE = 0.5
_SECONDS_PER_POLL = 90.0
"""The platform answers a request for a job sooner. A poll that takes longer is not cancelled; another starts beside it."""
_SECONDS_FOR_THE_LAST_POLL = 1.0
"""How long a worker that shuts down waits for a job that may be on its way."""


def serve(handler: Handler, wants_a_job: Callable[[], bool], model_id: str) -> None:
    """Serve jobs until SIGTERM or SIGINT, or until the platform ends the worker. Without RunPod's queue, run a local mode.

    Only the loop below and the local API know the handler. An SDK that bypasses them calls `_refuse` instead: it would run four
    jobs at once, and lose results.
    """
    rp_scale.JobScaler = _Loop
    config = {"handler": _refuse, "our_handler": handler, "wants_a_job": wants_a_job, "model_id": model_id}
    if "--rp_serve_api" in sys.argv:
        from worker.runpod import local_api  # not needed in the cloud: it imports a web server

        local_api.install()
    elif not is_in_cloud():
        config["handler"] = handler  # one local run
    config["concurrency_modifier"] = lambda _: _JOBS_AT_ONCE
    runpod.serverless.start(config)


async def _refuse(job: Job) -> dict[str, Any]:
    version = metadata.version("runpod")
    text = f"runpod {version} runs jobs in a way that this worker does not know; install runpod {TESTED_WITH}"
    log.critical(text)
    return {"error": f"INTERNAL: {text}"}


def redact_the_log() -> None:
    """Redact the lines that the SDK writes without the root logger; at level DEBUG it writes whole results.

    Raises SettingsError if the SDK does not write them through the method that is replaced here.
    """
    seen: list[object] = []
    write = getattr(RunPodLogger, "log", None)
    RunPodLogger.log = lambda self, message, *_: seen.append(message)
    RunPodLogger().error("a line")
    if write is None or seen != ["a line"]:
        raise SettingsError(f"the log of this version of runpod cannot be redacted; install runpod {TESTED_WITH}")

    def log(self: RunPodLogger, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
        write(self, redact(str(message)), message_level, job_id)

    RunPodLogger.log = log


def report_unhealthy(reason: str) -> NoReturn:
    """Tell the platform, by the SDK's fitness checks, why this worker cannot start, and exit with status 1."""

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
        self._handler: Handler = config["our_handler"]
        self._wants_a_job: Callable[[], bool] = config["wants_a_job"]
        self._polls: list[asyncio.Task[list[Job]]] = []
        """Requests for a job that have no answer yet, the newest last."""
        self._not_started: set[str] = set()
        """Ids of jobs that were taken and have not reached the handler yet."""

    async def _take_a_job(self, session: aiohttp.ClientSession, wanted: int) -> list[Job] | None:
        while self.is_alive() and (self._not_started or not self._wants_a_job()):
            if jobs := await self._answer(_SECONDS_BETWEEN_CHECKS):  # to an older poll
                return jobs
        if not self.is_alive():
            return None
        self._polls.append(asyncio.create_task(get_job(session)))
        return await self._answer(_SECONDS_PER_POLL)

    async def _answer(self, seconds: float) -> list[Job] | None:
        """Return the jobs of the first poll that is answered within `seconds`. Raises what the poll raised."""
        if not self._polls:
            await asyncio.sleep(seconds)
            return None
        done, _ = await asyncio.wait(self._polls, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return None
        poll = done.pop()
        self._polls.remove(poll)
        try:
            jobs = poll.result()
        except TooManyRequests:
            raise  # the SDK waits five seconds
        except Exception:
            await asyncio.sleep(_SECONDS_AFTER_A_FAILURE)
            raise
        if not jobs:  # an empty queue answers late; a refusal, an error page or an empty answer comes at once
            await asyncio.sleep(_SECONDS_AFTER_A_FAILURE)
        self._not_started.update(job["id"] for job in jobs)
        return jobs or None

    async def _run_and_post(self, session: aiohttp.ClientSession, config: dict[str, Any], job: Job) -> None:
        taken_here = job["id"] in self._not_started
        self._not_started.discard(job["id"])
        await _post(session, await run_job(self._handler if taken_here else _refuse, job), job["id"])

    async def run(self) -> None:
        async with AsyncClientSession() as session:
            taking = asyncio.create_task(self.get_jobs(session))
            stopping = asyncio.create_task(self.monitor_stop_signals(session))
            await self.run_jobs(session)
            await asyncio.wait([taking], timeout=_SECONDS_FOR_THE_LAST_POLL)
            taking.cancel()
            await asyncio.wait([taking])
            await self.run_jobs(session)  # the job that arrived meanwhile
            stopping.cancel()
            await asyncio.wait([stopping])

    async def stop_job(self, job_id: str) -> bool:
        if job_id not in self.jobs_tasks:
            await asyncio.sleep(_SECONDS_TO_START)
        await asyncio.sleep(0)  # a task that is cancelled before its first step does not clean up
        return bool(await super().stop_job(job_id))


async def get_job(session: aiohttp.ClientSession) -> list[Job]:
    """Ask the platform for jobs. Each has an id. The list is empty if there is none, or if the answer is not a job.

    Raises TooManyRequests, and aiohttp's errors.
    """
    async with session.get(rp_job._job_get_url(1)) as response:
        if response.status == 429:
            raise TooManyRequests(response.request_info, response.history, status=429, message=str(response.reason))
        response.raise_for_status()
        body = await response.read() if response.status == 200 else b""
    jobs, unreadable = await asyncio.to_thread(parse_jobs, body)
    for job_id, text in unreadable:
        await _post(session, {"error": text}, job_id)
    return jobs


@asynccontextmanager
async def progress_sender(job: Job) -> AsyncIterator[Send]:
    """Sends the progress updates of a job that came from the queue."""
    async with AsyncClientSession() as session:

        async def send(update: Update) -> None:
            await rp_http.send_result(session, {"status": "IN_PROGRESS", "output": update}, job)

        yield send


async def _post(session: aiohttp.ClientSession, result: dict[str, Any], job_id: str) -> None:
    """Post a result, and retry for minutes, since the GPU time is paid. After a few refusals, give up."""
    url = rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
    bodies = bodies_of(result)
    body = next(bodies)
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
                if answer.status == 413 and (smaller := next(bodies, None)):
                    body, refusals = smaller, 0
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = type(error).__name__
        if refusals == _REFUSALS or time.monotonic() + pause > give_up_at:
            log.error("the result could not be delivered (%s)", reason, extra={"fields": {"job": job_id}})
            return
        log.warning("the result could not be delivered (%s); retrying", reason, extra={"fields": {"job": job_id}})
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
