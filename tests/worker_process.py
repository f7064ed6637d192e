"""The real worker in a process of its own: `python handler.py`, its local API, and RunPod's job loop on a local job API."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import create_server
from typing import Any

import requests

from tests.cloud import Cloud

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
    """A port on which nothing listens, below those that systems give away by themselves: no other test's server gets it."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), create_server(("127.0.0.1", port)):
            return port


@contextmanager
def process(env: dict[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running handler; its whole process group ends with the block, since the SDK's ping process outlives its parent."""
    command = [sys.executable, str(ROOT / "handler.py"), *arguments]
    with log.open("wb") as output:
        worker = subprocess.Popen(command, env=env, cwd=log.parent, stdout=output, stderr=output, start_new_session=True)
    try:
        yield worker
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


class LocalApi:
    """RunPod's local API (`--rp_serve_api`)."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process = process

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /runsync; the answer with its `status`, and `output` or `error`."""
        response = requests.post(f"{self.url}/runsync", json={"input": request}, timeout=300)
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
        yield LocalApi(port, log, worker)


@dataclass(frozen=True)
class Worker:
    """One worker of an endpoint. `temp` is its temporary folder, which no other process uses."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    temp: Path

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def memory(self) -> int:
        """Resident bytes of its main process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


class Endpoint:
    """Workers that take their jobs from one cloud: they come, leave and die as a test wants. A context manager."""

    def __init__(self, cloud: Cloud, env: dict[str, str], folder: Path) -> None:
        """`env`: what all workers have in common, see `environment`. `folder` is for logs and temporary files."""
        self.cloud = cloud
        self.workers: list[Worker] = []
        """All that were ever started."""
        self._env = env
        self._folder = folder
        self._processes = ExitStack()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.is_alive()]

    def start(self, temp: Path | None = None, **changes: str | Path) -> Worker:
        """A new worker, which still has to load its model; `changes` go into its environment.

        `temp`: that of a worker before it, as when a container is started again.
        """
        name = f"worker-{len(self.workers)}"
        log, temp = self._folder / f"{name}.log", temp or self._folder / f"{name}.tmp"
        temp.mkdir(exist_ok=True)
        env = self._env | self.cloud.environment(name) | {"TMPDIR": str(temp)}
        env |= {key: str(value) for key, value in changes.items()}
        worker = Worker(name, self._processes.enter_context(process(env, log)), log, temp)
        self.workers.append(worker)
        return worker

    def wait_until_ready(self, worker: Worker) -> None:
        """Returns when it asks for a job."""
        try:
            self.cloud.wait(lambda: self.cloud.asked[worker.name] or not worker.is_alive(), "ready worker", STARTS_WITHIN)
        finally:
            assert worker.is_alive(), worker.log.read_text()[-4000:]

    def kill(self, worker: Worker) -> list[str]:
        """Kill it as the host of a worker can die, and hand out its jobs again, as RunPod does. Returns their ids."""
        os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        return self.cloud.redeliver(worker.name)

    def leave(self, worker: Worker, seconds: float = 120) -> int:
        """Ask it to leave, and wait for it. Returns its exit status; -9: it had to be killed after `seconds`."""
        worker.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            return worker.process.wait(seconds)
        self.kill(worker)
        return -signal.SIGKILL
