"""RunPod's API on your own machine (`--rp_serve_api`), with the calls of the cloud: run, status, cancel, health.

The SDK's own local API runs a job when its status is requested, reports no progress, and cannot cancel. Here /run starts the
job, GET /status reports its progress, as in the cloud, and /cancel stops it. POST /status, which only the SDK's local API has,
waits for the end of the job, as there.

Web pages in a browser on this machine must not reach it. So it answers only when it is called by a name that no web page can
have (an address, or a name without a dot), which prevents DNS rebinding, and never to a page of another origin. It calls no
webhook: whoever may start a job could make it call any address.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from runpod.serverless.modules import rp_fastapi
from runpod.serverless.modules.rp_fastapi import DefaultRequest
from runpod.serverless.modules.rp_job import run_job

from worker.logs import log
from worker.progress import Update

Answer = dict[str, Any]
"""`{"id", "status", "output"?, "error"?}`, as RunPod answers."""

_KEPT = 100
"""How many of the latest results are kept. Each has a few kilobytes."""


def install() -> None:
    """Make the SDK serve this API instead of its own."""
    rp_fastapi.WorkerAPI = _LocalApi


class _Job:
    """One job, from /run until its result is dropped."""

    def __init__(self, handler: Callable[[dict[str, Any]], Awaitable[Any]], input: dict[str, Any]) -> None:
        self.id = f"test-{uuid.uuid4()}"
        self._latest: Update = {}
        self.task = asyncio.create_task(run_job(handler, {"id": self.id, "input": input, "send": self._take}))

    async def _take(self, update: Update) -> None:
        self._latest = update

    def answer(self) -> Answer:
        if not self.task.done():
            return {"id": self.id, "status": "IN_PROGRESS", **({"output": self._latest} if self._latest else {})}
        if self.task.cancelled():
            return {"id": self.id, "status": "CANCELLED"}
        done = self.task.result()
        return {"id": self.id, "status": "FAILED" if done.get("error") else "COMPLETED", **done}


class _LocalApi(rp_fastapi.WorkerAPI):  # type: ignore[misc]
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config | {"handler": config["our_handler"]})
        self._jobs: dict[str, _Job] = {}
        self.rp_app.add_api_route(
            "/status/{job_id}", self._status, methods=["GET"], summary="Returns the progress of a job, or its result."
        )
        self.rp_app.add_api_route("/cancel/{job_id}", self._cancel, methods=["POST"], summary="Stops a job.")
        self.rp_app.add_api_route("/health", self._health, methods=["GET"], summary="The jobs, the worker, and its model.")
        self.rp_app.middleware("http")(_only_for_this_machine)

    async def _sim_run(self, job_request: DefaultRequest) -> Answer:
        return self._start(job_request).answer()

    async def _sim_runsync(self, job_request: DefaultRequest) -> Answer:
        return await self._sim_status(self._start(job_request).id)

    def _start(self, job_request: DefaultRequest) -> _Job:
        if job_request.webhook:
            log.warning("the local API ignores `webhook`; ask for the job's status instead")
        for job_id in [job_id for job_id, job in self._jobs.items() if job.task.done()][: -_KEPT + 1]:
            del self._jobs[job_id]
        job = _Job(self.config["handler"], job_request.input)
        self._jobs[job.id] = job
        return job

    async def _status(self, job_id: str) -> Answer:
        return self._job(job_id).answer()

    async def _sim_status(self, job_id: str) -> Answer:
        job = self._job(job_id)
        await asyncio.wait([job.task])
        return job.answer()

    async def _cancel(self, job_id: str) -> Answer:
        """Cancel the job, and return when it has stopped. A running job stops at its next step."""
        job = self._job(job_id)
        job.task.cancel()
        await asyncio.wait([job.task])
        return job.answer()

    async def _health(self) -> Answer:
        """As RunPod answers, with one worker; and `model`, which RunPod does not know."""
        busy = sum(not job.task.done() for job in self._jobs.values())
        jobs = {"completed": 0, "failed": 0, "inProgress": busy, "inQueue": 0, "retried": 0}
        for job in self._jobs.values():
            if job.task.done():
                jobs["completed" if job.answer()["status"] == "COMPLETED" else "failed"] += 1
        workers = {
            "idle": int(not busy),
            "initializing": 0,
            "ready": 1,
            "running": int(busy > 0),
            "throttled": 0,
            "unhealthy": 0,
        }
        return {"jobs": jobs, "workers": workers, "model": self.config["model_id"]}

    def _job(self, job_id: str) -> _Job:
        if job_id not in self._jobs:
            raise HTTPException(404, "no such job here; a worker that was restarted has forgotten its jobs")
        return self._jobs[job_id]


async def _only_for_this_machine(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if not _is_private_name(host):
        text = "the local API does not answer to this host name; use localhost, or the machine's address"
    elif origin is not None and urlsplit(origin).netloc != host:
        text = "the local API does not answer to pages of other origins"
    else:
        return await answer(request)
    return JSONResponse({"error": text}, 403)


def _is_private_name(host: str) -> bool:
    """Return whether a `Host` is an address, or a name that nobody can register: without a dot, or of a local network."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith((".localhost", ".local", ".internal")))
    return True
