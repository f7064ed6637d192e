"""An imitation of RunPod's API on loopback: /v2/ID/run, /status and /cancel. It checks the key and fails on demand.
/v2/here is a worker's local API, which has the same calls and needs no key.

Its queue is the emulated cloud of real workers, or a script of statuses.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from tests.cloud import Cloud
from tests.faults import DOES_NOT_COUNT, CutShort, Dropped, Fault, Faults, Garbage, Slow, Status, Unanswered

KEY = "rpa_TESTKEY"


class Queue(Protocol):
    def submit(self, job_id: str, request: dict[str, Any], **more: Any) -> None: ...

    def status(self, job_id: str) -> dict[str, Any] | None:
        """The answer to /status without the id; None if the job does not exist."""

    def cancel(self, job_id: str) -> None: ...


class Script:
    """A queue without workers: it gives the answers in order, and repeats the last one."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)
        self.submitted: list[dict[str, Any]] = []

    def submit(self, job_id: str, request: dict[str, Any], **more: Any) -> None:
        self.submitted.append({"id": job_id, "input": request, **more})

    def status(self, job_id: str) -> dict[str, Any] | None:
        known = {job["id"] for job in self.submitted}
        if job_id not in known:
            return None
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def cancel(self, job_id: str) -> None:
        self.answers = [{"status": "CANCELLED"}]


class CloudQueue:
    """The queue of real workers."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self._cancelled: set[str] = set()

    def submit(self, job_id: str, request: dict[str, Any], **more: Any) -> None:
        self.cloud.submit(job_id, request, **more)

    def status(self, job_id: str) -> dict[str, Any] | None:
        cloud = self.cloud
        if job_id in self._cancelled:
            return {"status": "CANCELLED"}
        if results := cloud.results_of(job_id):
            failed = "error" in results[-1]
            return {"status": "FAILED", "error": results[-1]["error"]} if failed else {"status": "COMPLETED", **results[-1]}
        if updates := cloud.progress_of(job_id):
            return {"status": "IN_PROGRESS", "output": updates[-1]}
        delivered = any(delivery.job_id == job_id for delivery in cloud.deliveries)
        return {"status": "IN_PROGRESS" if delivered else "IN_QUEUE"}

    def cancel(self, job_id: str) -> None:
        if self.cloud.stop(job_id):
            self._cancelled.add(job_id)


@dataclass
class Api:
    """A running API. `faults` can be ordered for run, status and cancel."""

    base_url: str
    queue: Queue
    faults: Faults = field(default_factory=Faults)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """(verb, headers) of every request, in order."""
    ports: list[int] = field(default_factory=list)
    """The client's port of every request. Requests with the same port used the same connection."""
    retry_after: str = ""
    """The Retry-After header of every refusal."""

    @property
    def here(self) -> str:
        """The URL of the local API."""
        return f"{self.base_url}/here"

    def times(self, kind: str) -> int:
        return sum(asked == kind for asked, _ in self.asked)


@contextmanager
def serve(queue: Queue) -> Iterator[Api]:
    class Handler(_Handler):
        pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        Handler.api = Api(f"http://127.0.0.1:{server.server_port}/v2", queue)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield Handler.api
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: Api

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, body: bytes) -> None:
        _, _, endpoint, kind, *rest = self.path.split("/")
        api = self.api
        api.asked.append((kind, dict(self.headers.items())))
        api.ports.append(self.client_address[1])
        fault = api.faults.next(kind)
        if self.headers.get("Authorization") != (None if endpoint == "here" else f"Bearer {KEY}"):
            self._answer(401, {"error": "unauthorized"}, fault)
        elif endpoint not in ("endpoint", "here"):
            self._answer(404, {"error": "endpoint not found"}, fault)
        elif isinstance(fault, DOES_NOT_COUNT):
            self._answer(200, {}, fault)
        elif kind == "run":
            job = json.loads(body)
            job_id = f"job-{api.times('run')}"
            api.queue.submit(job_id, job.pop("input"), **job)
            self._answer(200, {"id": job_id, "status": "IN_QUEUE"}, fault)
        else:
            if kind == "cancel":
                api.queue.cancel(rest[0])
            answer = api.queue.status(rest[0])
            self._answer(200 if answer else 404, {"id": rest[0], **answer} if answer else {"error": "job not found"}, fault)

    def _answer(self, status: int, body: dict[str, Any], fault: Fault | None) -> None:
        data = json.dumps(body).encode()
        if isinstance(fault, Dropped | Unanswered):
            self.close_connection = True
            return
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        if isinstance(fault, Status):
            status, data = fault.code, b'{"error": "a fault on demand"}'
        if isinstance(fault, Garbage):
            data = b"<html>"
        self.send_response(status)
        if status >= 400 and self.api.retry_after:
            self.send_header("Retry-After", self.api.retry_after)
        if 300 <= status < 400:
            self.send_header("Location", f"{self.api.base_url}/endpoint/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if isinstance(fault, CutShort) else data)
        self.close_connection |= isinstance(fault, CutShort)

    def log_message(self, format: str, *args: Any) -> None:
        pass
