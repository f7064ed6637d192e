"""Shared by the client's tests: a valid request, its result, and very short pauses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Client
from client import api as calls
from client import client as polling
from tests.client.endpoint import KEY, Api, Script, serve
from tests.worker.web_server import Web
from tests.worker.web_server import serve as serve_web

REQUEST: dict[str, Any] = {
    "model": "wan21_1b",
    "loras": [{"path": "job/name.safetensors"}],
    "prompts": [{"prompt": "A sailing boat, at sunset!", "seed": 7}],
}
BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "SECONDS_BETWEEN_POLLS", 0.01)
    monkeypatch.setattr(calls, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def web() -> Iterator[Web]:
    """The server of the finished files."""
    with serve_web() as web:
        yield web


def result(*urls: str, **changes: Any) -> dict[str, Any]:
    """The answer of a completed job. `changes` are made to every file."""
    item = {"expires_at": "2999-01-01T00:00:00Z", "key": "job-1/0.mp4", "format": "mp4", "width": 64, "height": 64}
    item |= {"num_frames": 5, "fps": 16, "seed": 7, "bytes": len(BODY), "poster": None, "contact_sheet": None, **changes}
    videos = [{"prompt_index": index, "url": url, **item} for index, url in enumerate(urls)]
    prompts = [{"prompt_index": index, "prompt": REQUEST["prompts"][0]["prompt"]} for index in range(len(urls))]
    output = {"model": "wan21_1b", "outputs": {"images": [], "videos": videos}, "warnings": ["a word"]}
    return {"status": "COMPLETED", "output": output | {"settings": {"prompts": prompts}, "timings": {"total": 1.0}}}


def picture(url: str) -> dict[str, Any]:
    """A poster or contact sheet."""
    item = {"url": url, "expires_at": "2999-01-01T00:00:00Z", "key": "job-1/0.sheet.jpg", "width": 64, "height": 64}
    return item | {"bytes": len(BODY)}


def update(percent: int) -> dict[str, Any]:
    """The answer of a running job."""
    output = {"stage": "denoise", "prompt_index": 0, "prompts": 1, "step": percent // 10, "steps": 10, "percent": percent}
    return {"status": "IN_PROGRESS", "output": output | {"seconds_left": 84.2}}


@pytest.fixture
def script(web: Web) -> Script:
    """A job that waits, runs and completes."""
    web.gives("/0.mp4", BODY)
    return Script({"status": "IN_QUEUE"}, {"status": "IN_PROGRESS"}, update(10), update(60), result(web.url("/0.mp4")))


@pytest.fixture
def api(script: Script) -> Iterator[Api]:
    with serve(script) as api:
        yield api


@pytest.fixture
def said() -> list[str]:
    """The lines that the client reported to the user."""
    return []


@pytest.fixture
def client(api: Api, said: list[str]) -> Client:
    return Client.endpoint("endpoint", KEY, base_url=api.base_url, patience=2, say=said.append)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "videos"
