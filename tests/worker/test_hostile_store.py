"""A bucket of a stranger's, who wants to keep the worker waiting, or full: every call ends within its limit."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from worker.errors import Stopped
from worker.net import privates
from worker.storage.base import Limit, NotStored
from worker.storage.bucket import Bucket

Behaviour = Callable[[socket.socket], None]

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\nx-amz-meta-made-from: sum\r\n"


def silent(line: socket.socket) -> None:
    """It takes the request, and never answers."""
    while line.recv(1 << 16):
        pass


def deaf(line: socket.socket) -> None:
    """It takes a few kilobytes of the request a second."""
    while line.recv(4096):
        time.sleep(0.2)


def _answer_for_ever(line: socket.socket, start: bytes, piece: bytes, pause: float = 0) -> None:
    line.recv(1 << 16)
    line.sendall(start)
    while True:
        line.sendall(piece)
        time.sleep(pause)


def dripping_headers(line: socket.socket) -> None:
    _answer_for_ever(line, b"HTTP/1.1 200 OK\r\nx: ", b"a", 0.1)


def dripping_body(line: socket.socket) -> None:
    _answer_for_ever(line, _HEAD.replace(b"16", b"1000000") + b"\r\n", b"a", 0.1)


def endless_body(line: socket.socket) -> None:
    _answer_for_ever(line, _HEAD.replace(b"16", b"9999999999") + b"\r\n", b"a" * (1 << 16))


def endless_error(line: socket.socket) -> None:
    start = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 9999999999\r\n\r\n<Error><Code>"
    _answer_for_ever(line, start, b"a" * (1 << 16))


def continues_and_hangs_up(line: socket.socket) -> None:
    """boto3 waits for the rest of such an answer in a loop without an end."""
    line.recv(1 << 16)
    line.sendall(b"HTTP/1.1 100 Continue\r\n")
    line.shutdown(socket.SHUT_RDWR)


def nested_error(line: socket.socket) -> None:
    line.recv(1 << 16)
    body = b"<Error>" + b"<a>" * 100_000
    line.sendall(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def bare(line: socket.socket) -> None:
    """An answer without any of the headers that S3 has."""
    line.recv(1 << 16)
    line.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    line.shutdown(socket.SHUT_WR)


WAITING = [silent, deaf, dripping_headers, dripping_body]
FLOODING = [endless_body, endless_error, continues_and_hangs_up, nested_error, bare]


class Store:
    """A TCP server that does one thing with every connection."""

    def __init__(self, behave: Behaviour) -> None:
        self._is_closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        # For all connections, and before the first bytes come: the system could take in a whole video before it is accepted.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._behave = behave
        self._lines: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._listener.accept()
                if self._is_closed:
                    line.close()
                    return
                self._lines.append(line)
                threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with suppress(OSError), line:
            self._behave(line)

    def close(self) -> None:
        self._is_closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    store = Store(request.param)
    yield store
    store.close()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    file = tmp_path / "0.mp4"
    file.write_bytes(bytes(2_000_000))
    return file


def bucket(store: Store) -> Bucket:
    return Bucket("videos", "id", "secret", store.url, None, "path", "", 60)


def calls(bucket: Bucket, video: Path, limit: Limit) -> dict[str, Callable[[], Any]]:
    return {
        "check": lambda: bucket.check(limit),
        "put": lambda: bucket.put(video, "a/0.mp4", "video/mp4", "sum", limit),
        "find": lambda: bucket.find("a/0.mp4", "sum", limit),
        "read": lambda: bucket.read("a/0.mp4", "sum", limit),
    }


def outcome_of(call: Callable[[], Any]) -> str:
    try:
        return "nothing" if call() is None else "something"
    except NotStored as error:
        return "not stored" if len(str(error)) < 400 else "a long text"


@pytest.mark.parametrize("store", WAITING, indirect=True, ids=lambda behave: behave.__name__)
@pytest.mark.parametrize("call", ["check", "put", "find", "read"])
def test_a_store_that_keeps_the_worker_waiting_is_left_when_time_is_over(store: Store, video: Path, call: str) -> None:
    started = time.monotonic()
    outcome = outcome_of(calls(bucket(store), video, Limit.of(0.5, threading.Event()))[call])
    assert outcome != "something" or (call == "find" and store._behave is dripping_body)  # its headers were all there
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("store", WAITING, indirect=True, ids=lambda behave: behave.__name__)
def test_a_job_that_is_stopped_does_not_wait_for_its_store(store: Store, video: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    with pytest.raises((Stopped, NotStored)):
        bucket(store).put(video, "a/0.mp4", "video/mp4", "sum", Limit(stop))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("store", FLOODING, indirect=True, ids=lambda behave: behave.__name__)
@pytest.mark.parametrize("call", ["check", "put", "find", "read"])
def test_whatever_a_store_answers_is_an_outcome(store: Store, video: Path, call: str) -> None:
    started = time.monotonic()
    outcome = outcome_of(calls(bucket(store), video, Limit.of(20, threading.Event()))[call])
    assert outcome in ("nothing", "something", "not stored")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("store", [deaf, dripping_headers, dripping_body], indirect=True, ids=lambda behave: behave.__name__)
def test_a_thread_that_was_left_behind_ends(store: Store, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privates, "STORE_SECONDS", 1.0)
    monkeypatch.setattr(privates, "STORE_BYTES_PER_SECOND", 10_000_000)
    os.truncate(video, 8_000_000)  # the system's buffers take the first megabytes
    before = set(threading.enumerate())
    call = "put" if store._behave is deaf else "read"
    assert outcome_of(calls(bucket(store), video, Limit.of(0.2, threading.Event()))[call]) != "something"
    end = time.monotonic() + 120  # five seconds for most; at worst every try of boto3 lasts until its socket's timeout
    while left := [thread for thread in set(threading.enumerate()) - before if thread.name == "wait_for"]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


@pytest.mark.parametrize("store", [endless_body, endless_error], indirect=True, ids=lambda behave: behave.__name__)
def test_no_more_of_an_answer_is_read_than_a_result_has(store: Store, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = itertools.count()
    original = privates._PacedAnswer.readinto

    def counted(self: privates._PacedAnswer, buffer: Any) -> int:
        for _ in range(count := original(self, buffer)):
            next(read)
        return count

    monkeypatch.setattr(privates, "STORE_ANSWER_BYTES", 300_000)
    monkeypatch.setattr(privates._PacedAnswer, "readinto", counted)
    bucket(store).read("a/0.mp4", "sum", Limit.of(20, threading.Event()))
    assert next(read) < 1_000_000
