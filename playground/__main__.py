"""Serve the playground.

python -m playground --url http://localhost:8000     a worker's local API (`make serve`)
RUNPOD_API_KEY=… python -m playground --endpoint ID  a RunPod endpoint
python -m playground --tiny .tiny                    starts a worker of its own, with tiny checkpoints (`make playground`)
"""

from __future__ import annotations

import argparse
import json
import os
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

from playground.jobs import temporary_folder
from playground.server import Playground, server
from playground.target import Target

ROOT = Path(__file__).parent.parent
_TINY_MODEL = "wan22_14b_t2v"
_STARTS_WITHIN = 120
"""Seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the worker and the temporary files go with this process
    try:
        _serve(args)
    except KeyboardInterrupt:
        print()
    except _CannotStart as error:
        print(f"playground: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(args: argparse.Namespace) -> None:
    """Until the process is told to end. Raises _CannotStart."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        if args.tiny:
            target = Target(stack.enter_context(tiny_worker(args.tiny)))
            playground = Playground(target, folder, tiny_example(), args.tiny / "loras")
        else:
            target = _target(args)
            playground = Playground(target, folder, loras=args.loras)
        try:
            web = stack.enter_context(server(playground, args.port))
        except OSError as error:
            raise _CannotStart(f"port {args.port}: {error.strerror}; choose another with --port") from error
        print(f"the playground: http://127.0.0.1:{web.server_address[1]}/  ({target.label}; Ctrl+C ends it)", flush=True)
        web.serve_forever()


class _CannotStart(Exception):
    """One line for the terminal."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m playground", description="A page on this machine to try the worker with.")
    to = parser.add_mutually_exclusive_group()
    to.add_argument("--url", default="http://localhost:8000", help="a worker's local API (default: %(default)s)")
    to.add_argument("--endpoint", metavar="ID", help="a RunPod endpoint; needs RUNPOD_API_KEY in the environment")
    to.add_argument(
        "--tiny", metavar="DIR", type=Path, help="start a worker with the checkpoints of builder/tiny_checkpoints.py"
    )
    parser.add_argument("--port", type=int, default=8080, help="of the page, on 127.0.0.1 (default: %(default)s)")
    parser.add_argument("--loras", metavar="DIR", type=Path, help="the worker's LORA_DIR, to suggest the files in it")
    return parser


def _target(args: argparse.Namespace) -> Target:
    if not args.endpoint:
        if not args.url.startswith(("http://", "https://")):
            raise _CannotStart(f"--url {args.url}: is no http(s) URL; use one such as http://localhost:8000")
        return Target(args.url.rstrip("/"))
    key = os.environ.get("RUNPOD_API_KEY")
    if not key:
        raise _CannotStart("RUNPOD_API_KEY is not set; set it to an API key of the account that owns the endpoint")
    base = os.environ.get("RUNPOD_ENDPOINT_BASE_URL", "https://api.runpod.ai/v2").rstrip("/")  # the SDK's variable for it
    return Target(f"{base}/{args.endpoint}", args.endpoint, key)


def tiny_example() -> dict[str, Any]:
    request: dict[str, Any] = json.loads((ROOT / "test_input.json").read_text())["input"]
    return request


@contextmanager
def tiny_worker(tiny: Path) -> Iterator[str]:
    """A worker that serves the tiny 14B T2V; yields the URL of its local API."""
    if not (tiny / "loras").is_dir():
        raise _CannotStart(f"{tiny}: no tiny checkpoints; make them with python builder/tiny_checkpoints.py {tiny}")
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"DEVICE": "cpu", "CHECKPOINT_DIR": str(tiny.resolve()), "LORA_DIR": str((tiny / "loras").resolve())}
    command = [sys.executable, str(ROOT / "handler.py"), "--rp_serve_api", "--rp_api_port", str(port)]
    print("starting a worker with tiny checkpoints …", flush=True)
    env |= {"MODEL_ID": _TINY_MODEL}
    with subprocess.Popen(command, env=os.environ | env, start_new_session=True) as worker:  # noqa: S603 it is our own
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
    give_up_at = time.monotonic() + _STARTS_WITHIN
    while worker.poll() is None and time.monotonic() < give_up_at:
        try:
            requests.get(url, timeout=5)
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise _CannotStart("the worker did not start; its last lines above say why")


if __name__ == "__main__":
    sys.exit(main())
