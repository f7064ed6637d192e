"""RunPod's job API on loopback, with faults on demand.

    cloud.submit("job", request)
    cloud.fail("result", Status(503), times=4)
    cloud.wait_for("job")["output"]

Hands jobs out to whichever worker asks, takes progress, results and pings, passes on stops, and writes everything down. What
happens only once in a thousand times on the real one, a test asks for: see `fail`, `deliver_again` and `redeliver`.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from tests.faults import DOES_NOT_COUNT, CutShort, Dropped, Fault, Faults, Garbage, Slow, Status, Unanswered

Kind = Literal["take", "stop", "progress", "result", "ping"]
"""What a worker asks for or sends."""

T = TypeVar("T")


@dataclass(frozen=True)
class Delivery:
    """A job went to a worker. Times here and below are of the monotonic clock."""

    job_id: str
    worker: str
    at: float


@dataclass(frozen=True)
class Post:
    """A worker sent progress or a result; `counts` is False when the cloud did not take it."""

    job_id: str
    worker: str
    body: dict[str, Any]
    counts: bool
    at: float

    @property
    def is_result(self) -> bool:
        return self.body.get("status") != "IN_PROGRESS"


@dataclass(frozen=True)
class Ping:
    """A worker is alive, and says which jobs it has."""

    worker: str
    job_ids: list[str]
    unhealthy_because: str
    """Why it cannot start; "" for a worker that works."""
    at: float


class Cloud:
    """One endpoint's queue."""

    def __init__(self, hold: float = 20) -> None:
        """`hold`: seconds for which a request for a job, or for stops, is kept waiting when there is none."""
        self.deliveries: list[Delivery] = []
        self.stops: list[Delivery] = []
        """The stops that reached a worker."""
        self.posts: list[Post] = []
        """Everything the workers posted, in the order of arrival: progress and results, taken or not."""
        self.pings: list[Ping] = []
        self.faults = Faults()
        self.asked: Counter[str] = Counter()
        """How often each worker has asked for a job."""
        self._hold = hold
        self._jobs: dict[str, dict[str, Any]] = {}
        self._waiting: deque[str] = deque()
        self._done: set[str] = set()
        self._stopped: set[str] = set()
        self._signals: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, worker: str = "pod") -> dict[str, str]:
        """What RunPod sets in the container of a worker."""
        base = f"http://127.0.0.1:{self._server.server_address[1]}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": "key",
            "RUNPOD_POD_ID": worker,
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        }

    # What a client does.

    def submit(self, job_id: str, request: dict[str, Any], **more: Any) -> None:
        with self._changed:
            self._jobs[job_id] = {"id": job_id, "input": request, **more}
            self._waiting.append(job_id)
            self._changed.notify_all()

    def stop(self, job_id: str) -> bool:
        """Cancel a job: it leaves the queue, and the workers that have it are told. False: it was done already."""
        with self._changed:
            if job_id in self._done:
                return False
            self._stopped.add(job_id)
            self._waiting = deque(waiting for waiting in self._waiting if waiting != job_id)
            self._signals += {(delivery.worker, job_id) for delivery in self.deliveries if delivery.job_id == job_id}
            self._changed.notify_all()
            return True

    def is_over(self, job_id: str) -> bool:
        """Whether the client waits no longer: there is a result, or it has cancelled the job."""
        with self._changed:
            return job_id in self._stopped or job_id in self._done

    # What goes wrong.

    def fail(self, kind: Kind, fault: Fault, times: int = 1) -> None:
        """The next `times` requests of this kind meet `fault`. A job that is lost on its way to the worker waits again."""
        self.faults.order(kind, fault, times)

    def deliver_again(self, job_id: str) -> None:
        """Hand out the job once more, whatever has become of it."""
        with self._changed:
            self._waiting.appendleft(job_id)
            self._changed.notify_all()

    def redeliver(self, worker: str) -> list[str]:
        """The worker is gone: hand out again what it had and gave no result for, and say what that was."""
        with self._changed:
            last = {delivery.job_id: delivery.worker for delivery in self.deliveries}
            lost = [job_id for job_id, has_it in last.items() if has_it == worker and job_id not in self._waiting]
            lost = [job_id for job_id in lost if job_id not in self._done | self._stopped]
            self._waiting.extendleft(reversed(lost))
            self._changed.notify_all()
            return lost

    # What can be seen.

    def wait_for(self, job_id: str, stage: str | None = None, nth: int = 1, seconds: float = 60) -> dict[str, Any]:
        """The job's nth result as it was posted, or with `stage` its nth progress update of that stage."""

        def found() -> dict[str, Any] | None:
            bodies = self.results_of(job_id)
            if stage is not None:
                bodies = [update for update in self.progress_of(job_id) if update["stage"] == stage]
            return bodies[nth - 1] if len(bodies) >= nth else None

        return self.wait(found, f"{stage or 'result'} {nth} of {job_id}", seconds)

    def wait_for_tries(self, job_id: str, count: int, seconds: float = 60) -> list[Post]:
        """What `tries_of` says, once the worker has tried `count` times."""

        def found() -> list[Post]:
            tries = self.tries_of(job_id)
            return tries if len(tries) >= count else []

        return self.wait(found, f"{count} tries to post the result of {job_id}", seconds)

    def wait(self, found: Callable[[], T | None], what: str, seconds: float = 60) -> T:
        """What `found` gives once it gives something; it is asked again whenever anything has arrived."""
        end = time.monotonic() + seconds
        with self._changed:
            while not (value := found()):
                assert time.monotonic() < end, f"no {what} in {seconds} s; the last posts: {self.posts[-3:]}"
                self._changed.wait(0.2)
            return value

    def tries_of(self, job_id: str) -> list[Post]:
        """What was posted as this job's result, taken or not."""
        return [post for post in self.posts if post.job_id == job_id and post.is_result]

    def results_of(self, job_id: str) -> list[dict[str, Any]]:
        return [post.body for post in self.tries_of(job_id) if post.counts]

    def progress_of(self, job_id: str) -> list[dict[str, Any]]:
        return [post.body["output"] for post in self.posts if post.job_id == job_id and not post.is_result and post.counts]

    # What the server asks and tells.

    def _posted(self, post: Post) -> None:
        with self._changed:
            self.posts.append(post)
            if post.is_result and post.counts:
                self._done.add(post.job_id)
            self._changed.notify_all()

    def _pinged(self, ping: Ping) -> None:
        with self._changed:
            self.pings.append(ping)
            self._changed.notify_all()

    def _hand_out(self, worker: str, count: int, is_gone: Callable[[], bool]) -> list[Delivery]:
        """Up to `count` jobs, as soon as there is one; none when there is none for long, or nobody waits for it any more."""
        with self._changed:
            self.asked[worker] += 1
            self._changed.notify_all()
            if not self._until(lambda: bool(self._waiting), is_gone):
                return []
            jobs = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
            deliveries = [Delivery(job_id, worker, time.monotonic()) for job_id in jobs]
            self.deliveries += deliveries
            return deliveries

    def _take_back(self, deliveries: list[Delivery]) -> None:
        """They did not arrive."""
        with self._changed:
            for delivery in reversed(deliveries):
                self.deliveries.remove(delivery)
                if delivery.job_id not in self._stopped:
                    self._waiting.appendleft(delivery.job_id)
            self._changed.notify_all()

    def _stops_for(self, worker: str, is_gone: Callable[[], bool]) -> list[str]:
        with self._changed:
            self._until(lambda: any(told == worker for told, _ in self._signals), is_gone)
            return [job_id for told, job_id in self._signals if told == worker]

    def _stops_arrived(self, worker: str, job_ids: list[str]) -> None:
        with self._changed:
            for job_id in job_ids:
                self._signals.remove((worker, job_id))
                self.stops.append(Delivery(job_id, worker, time.monotonic()))

    def _until(self, ready: Callable[[], bool], is_gone: Callable[[], bool]) -> bool:
        end = time.monotonic() + self._hold
        while not (self._closed or is_gone() or time.monotonic() > end):
            if ready():
                return True
            self._changed.wait(0.1)
        return False


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that is killed hangs up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        _, _, _, channel, worker = url.path.split("/")
        if channel == "job-take":
            self._take(worker, 1, lambda jobs: jobs[0])
        elif channel == "job-take-batch":
            self._take(worker, int(query["batch_size"]), lambda jobs: jobs)
        elif channel == "job-stop":
            self._stop(worker)
        else:
            self._ping(worker, [job_id for job_id in query.get("job_id", "").split(",") if job_id], query.get("reason", ""))

    def do_POST(self) -> None:
        *_, worker, job_id = urlsplit(self.path).path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cloud = self.server.cloud
        fault = cloud.faults.next("progress" if body.get("status") == "IN_PROGRESS" else "result")
        counts = not isinstance(fault, DOES_NOT_COUNT)
        cloud._posted(Post(job_id, worker, body, counts, time.monotonic()))
        self._answer({}, fault)

    def _take(self, worker: str, count: int, form: Callable[[list[dict[str, Any]]], Any]) -> None:
        cloud = self.server.cloud
        if not self._may_go_on("take"):
            return
        deliveries = cloud._hand_out(worker, count, self._is_gone)
        if not deliveries:
            self._answer(None)
            return
        jobs = [cloud._jobs[delivery.job_id] for delivery in deliveries]
        if not self._answer(form(jobs), cloud.faults.next("take", Unanswered, CutShort)):
            cloud._take_back(deliveries)

    def _stop(self, worker: str) -> None:
        cloud = self.server.cloud
        if not self._may_go_on("stop"):
            return
        job_ids = cloud._stops_for(worker, self._is_gone)
        if not job_ids:
            self._answer(None)
        elif self._answer({"jobsToStop": job_ids}, cloud.faults.next("stop", Unanswered, CutShort)):
            cloud._stops_arrived(worker, job_ids)

    def _may_go_on(self, kind: Kind) -> bool:
        """Meet the faults that come before there is anything to hand out."""
        fault = self.server.cloud.faults.next(kind, Slow, *DOES_NOT_COUNT)
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        elif fault:
            self._answer({}, fault)
        return fault is None or isinstance(fault, Slow)

    def _ping(self, worker: str, job_ids: list[str], reason: str) -> None:
        cloud = self.server.cloud
        fault = cloud.faults.next("ping")
        if not isinstance(fault, DOES_NOT_COUNT):
            cloud._pinged(Ping(worker, job_ids, reason, time.monotonic()))
        self._answer({}, fault)

    def _answer(self, body: Any, fault: Fault | None = None) -> bool:
        """Send `body`, or 204 for None, or what the fault makes of it. Returns whether the body has left in whole."""
        status, data = (204, b"") if body is None else (200, json.dumps(body).encode())
        if isinstance(fault, Dropped | Unanswered):
            self.close_connection = True
            return False
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        elif isinstance(fault, Status):
            status, data = fault.code, b'{"error": "a fault on demand"}'
        elif isinstance(fault, Garbage):
            data = b"<html>"
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if isinstance(fault, CutShort) else data)
        except OSError:
            self.close_connection = True
            return False
        if isinstance(fault, CutShort):
            self.close_connection = True
        return fault is None or isinstance(fault, Slow)

    def _is_gone(self) -> bool:
        """Whether the client has hung up: a job handed to it would be lost."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def log_message(self, format: str, *args: Any) -> None:
        pass
