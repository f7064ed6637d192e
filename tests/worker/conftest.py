"""What several tests of the worker share: a clean environment, a scripted web server, a real S3 server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests import s3_server
from tests.worker import web_server
from worker.settings import Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them, and no proxy stands before 127.0.0.1."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_server.S3Server]:
    with s3_server.serve() as server:
        yield server


@pytest.fixture
def web() -> Iterator[web_server.Web]:
    with web_server.serve() as web:
        yield web


class NoWait(threading.Event):
    """A stop event that makes the pauses between tries short."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0)


@pytest.fixture
def stop() -> threading.Event:
    return NoWait()
