"""A playground in this process, and an imitation of RunPod's API for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from client import Client
from playground.server import Playground, server

Request = dict[str, Any]


class Page:
    """Sends the requests that the page's scripts send, from the playground's own origin, without a browser."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(self.url + path, headers=headers, timeout=60)

    def post(self, path: str, body: Any = None, data: bytes | None = None, **headers: str) -> requests.Response:
        return requests.post(self.url + path, json=body, data=data, headers={"Origin": self.url, **headers}, timeout=60)


Serve = Callable[..., AbstractContextManager[Page]]


@contextmanager
def serving(client: Client, folder: Path, **more: Any) -> Iterator[Page]:
    folder.mkdir(exist_ok=True)
    with server(Playground(client, folder, **more), 0) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Page(web.server_address[1])
        finally:
            web.shutdown()
            thread.join()


class FakeCloud:
    """RunPod's /run, /status and /cancel, and a bucket, with scripted answers."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.answer: dict[str, Any] = {"status": "IN_QUEUE"}
        """The answer to /run, /status and /cancel."""
        self.status = 200
        """The HTTP status of all answers but the bucket's."""
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, headers)."""


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.asked.append((self.command, self.path, dict(self.headers)))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            file = fake.files.get(self.path)
            body = file if file is not None else json.dumps({"id": "job-1"} | fake.answer).encode()
            self.send_response(200 if file is not None else fake.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        fake = FakeCloud(web.server_address[1])
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield fake
        web.shutdown()
        thread.join()
