"""The real worker in a process of its own: `python handler.py`, its local API, and RunPod's job loop on a local job API."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests

ROOT = Path(__file__).parent.parent
STARTS_WITHIN = 120
"""Seconds; a start takes five on a quiet machine."""


def environment(tiny: Path, model_id: str, **more: str | Path) -> dict[str, str]:
    """What a worker needs to serve `model_id` from tiny checkpoints on a CPU."""
    wanted = {"MODEL_ID": model_id, "CHECKPOINT_DIR": tiny, "LORA_DIR": tiny / "loras", "DEVICE": "cpu", **more}
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    return inherited | {name: str(value) for name, value in wanted.items()}


def run_handler(env: dict[str, str], *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python handler.py` to its end."""
    command = [sys.executable, str(ROOT / "handler.py"), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def process(env: dict[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running handler; its whole process group ends with the block, since the SDK's ping process outlives its parent."""
    command = [sys.executable, str(ROOT / "handler.py"), *arguments]
    with log.open("wb") as output:
        worker = subprocess.Popen(command, env=env, cwd=log.parent, stdout=output, stderr=output, start_new_session=True)
    try:
        yield worker
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


class LocalApi:
    """RunPod's local API (`--rp_serve_api`)."""

    def __init__(self, port: int, log: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self.log = log

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /runsync; the answer with its `status`, and `output` or `error`."""
        response = requests.post(f"{self._url}/runsync", json={"input": request}, timeout=300)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def local_api(env: dict[str, str], folder: Path) -> Iterator[LocalApi]:
    port, log = free_port(), folder / "worker.log"
    with process(env, log, "--rp_serve_api", "--rp_api_port", str(port)) as worker:
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except requests.ConnectionError:
                assert worker.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield LocalApi(port, log)


class Cloud:
    """RunPod's job API on loopback: hands out jobs, takes results and progress, passes on stops."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        """(job id, body) of everything the worker posted, in the order of arrival: progress and results."""
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stops: queue.Queue[str] = queue.Queue()
        self._arrived = threading.Condition()
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/job-take" in self.path:
                    self._long_poll(cloud._jobs)
                elif "/job-stop" in self.path:
                    self._long_poll(cloud._stops)
                else:
                    self._answer(200, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with cloud._arrived:
                    cloud.posts.append((parse_qs(urlsplit(self.path).query)["job"][0], body))
                    cloud._arrived.notify_all()
                self._answer(200, {})

            def _long_poll(self, waiting: queue.Queue[Any]) -> None:
                try:
                    item = waiting.get(timeout=1)
                except queue.Empty:
                    self._answer(204, None)
                    return
                self._answer(200, {"jobsToStop": [item]} if isinstance(item, str) else item)

            def _answer(self, status: int, body: Any) -> None:
                data = b"" if body is None else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What RunPod sets in a worker's container."""
        base = f"http://127.0.0.1:{self._server.server_address[1]}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none&job=$ID",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_AI_API_KEY": "key",
            "RUNPOD_POD_ID": "pod",
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        }

    def submit(self, job_id: str, request: dict[str, Any], **more: Any) -> None:
        self._jobs.put({"id": job_id, "input": request, **more})

    def stop(self, job_id: str) -> None:
        self._stops.put(job_id)

    def wait_for(self, job_id: str, stage: str | None = None, seconds: float = 180) -> dict[str, Any]:
        """The job's result, or with `stage` its first progress update of that stage."""

        def found() -> dict[str, Any] | None:
            for posted_for, body in self.posts:
                progress = body.get("status") == "IN_PROGRESS"
                if posted_for == job_id and (
                    body["output"]["stage"] == stage if stage and progress else not stage and not progress
                ):
                    return body
            return None

        with self._arrived:
            assert self._arrived.wait_for(lambda: found() is not None, seconds), (
                f"{job_id}: nothing in {seconds} s: {self.posts}"
            )
            body = found()
            assert body is not None
            return body

    def progress_of(self, job_id: str) -> list[dict[str, Any]]:
        return [
            body["output"] for posted_for, body in self.posts if posted_for == job_id and body.get("status") == "IN_PROGRESS"
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
