"""Serve the playground.

python -m playground --url http://localhost:8000     for a worker's local API (`make serve`)
RUNPOD_API_KEY=… python -m playground --endpoint ID  for a RunPod endpoint
python -m playground --tiny .tiny                    starts a worker with tiny checkpoints (`make playground`)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import create_server
from typing import Any

import requests

from client import Client, ClientError
from playground.jobs import temporary_folder
from playground.server import Playground, server

ROOT = Path(__file__).parent.parent
_TINY_MODEL = "wan22_14b_t2v"
_SECONDS_TO_START = 120


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the worker and the temporary files are cleaned up
    try:
        _serve(args)
    except KeyboardInterrupt:
        print()
    except (_CannotStart, ClientError) as error:
        print(f"playground: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(args: argparse.Namespace) -> None:
    """Serve until the process is stopped. Raises _CannotStart, ClientError."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        if args.tiny:
            url = stack.enter_context(tiny_worker(args.tiny))
            runs = _folder_for(args.runs, "tiny")
            playground = Playground(Client.local(url, patience=0), folder, tiny_example(), args.tiny / "loras", runs)
        else:
            client = _client(args)
            playground = Playground(client, folder, None, args.loras, _folder_for(args.runs, client.url.partition("://")[2]))
        try:
            web = stack.enter_context(server(playground, args.port))
        except OSError as error:
            raise _CannotStart(f"port {args.port}: {error.strerror}; choose another with --port") from error
        print(f"the playground: http://127.0.0.1:{web.server_address[1]}/  ({playground.name}; Ctrl+C stops it)", flush=True)
        web.serve_forever()


class _CannotStart(Exception):
    """The playground cannot start; the text is one line for the terminal."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m playground", description="Serve a page to try the worker.")
    to = parser.add_mutually_exclusive_group()
    to.add_argument("--url", default="http://localhost:8000", help="a worker's local API (default: %(default)s)")
    to.add_argument("--endpoint", metavar="ID", help="a RunPod endpoint; needs RUNPOD_API_KEY in the environment")
    to.add_argument("--tiny", metavar="DIR", type=Path, help="start a worker with the tiny checkpoints in this folder")
    parser.add_argument("--port", type=int, default=8080, help="port of the page on 127.0.0.1 (default: %(default)s)")
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        default=Path(".playground"),
        help="keep the runs and their files here, for the next start (default: %(default)s)",
    )
    parser.add_argument("--loras", metavar="DIR", type=Path, help="the worker's LORA_DIR; the form suggests the files in it")
    return parser


def _folder_for(runs: Path, target: str) -> Path:
    """The folder of one worker's runs: another worker knows nothing of them. Raises _CannotStart."""
    folder = runs / re.sub(r"[^\w.-]+", "-", target)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _CannotStart(f"{folder}: {error.strerror}; choose another folder with --runs") from error
    return folder


def _client(args: argparse.Namespace) -> Client:
    """A client that never retries, since the page shows each failure and retries. Raises ClientError."""
    if args.endpoint:
        return Client.endpoint(args.endpoint, os.environ.get("RUNPOD_API_KEY", ""), patience=0)
    return Client.local(args.url, patience=0)


def tiny_example() -> dict[str, Any]:
    request: dict[str, Any] = json.loads((ROOT / "test_input.json").read_text())["input"]
    return request


@contextmanager
def tiny_worker(tiny: Path, model_id: str = _TINY_MODEL) -> Iterator[str]:
    """Run a worker with a tiny model; yields the URL of its local API."""
    if not (tiny / "loras").is_dir():
        raise _CannotStart(f"{tiny} has no tiny checkpoints; make them with python builder/tiny_checkpoints.py {tiny}")
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"DEVICE": "cpu", "CHECKPOINT_DIR": str(tiny.resolve()), "LORA_DIR": str((tiny / "loras").resolve())}
    command = [sys.executable, str(ROOT / "handler.py"), "--rp_serve_api", "--rp_api_port", str(port)]
    print("starting a worker with tiny checkpoints …", flush=True)
    env |= {"MODEL_ID": model_id}
    with subprocess.Popen(command, env=os.environ | env, start_new_session=True) as worker:  # noqa: S603 the command is ours
        try:
            _wait_for(worker, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(worker.pid, signal.SIGTERM)
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)


def _wait_for(worker: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while worker.poll() is None and time.monotonic() < deadline:
        try:
            requests.get(url, timeout=5)
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise _CannotStart("the worker did not start; its last lines above say why")


if __name__ == "__main__":
    sys.exit(main())
