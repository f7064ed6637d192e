"""What a stranger's image can do to the worker: nothing but cost its own process its limits."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from worker import image_process
from worker.errors import Stopped
from worker.image_decode import MAX_PIXELS_OF_A_JOB, Allowance, decode
from worker.image_process import decode_in_process


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


NOISE = Image.effect_noise((64, 48), 80).convert("RGB")
JPEG = encoded(NOISE, "JPEG")


@pytest.fixture(autouse=True)
def fresh_processes() -> Any:
    def end_all() -> None:
        while image_process._idle:
            image_process._idle.pop().kill()

    end_all()
    yield
    end_all()


def apart(data: bytes, allowance: Allowance | None = None, stop: threading.Event | None = None) -> Image.Image:
    return decode_in_process(data, "documented", allowance or Allowance(), stop or threading.Event())


def seconds(work: Any) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_it_gives_what_is_decoded_here(format: str) -> None:
    data = encoded(NOISE, format)
    assert apart(data).tobytes() == decode(data).tobytes()


def test_one_process_decodes_many_and_several_at_once_have_their_own() -> None:
    apart(JPEG)
    [process] = image_process._idle
    for _ in range(3):
        with pytest.raises(ValueError, match="not an image"):
            apart(b"no image")
        apart(JPEG)
    assert image_process._idle == [process]
    with ThreadPoolExecutor(6) as pool:
        assert len({image.tobytes() for image in pool.map(apart, [JPEG] * 12)}) == 1
    assert len(image_process._idle) <= image_process._MAX_IDLE


def test_the_jobs_allowance_is_asked_before_the_pixels_are_decoded() -> None:
    allowance = Allowance(64 * 48)
    apart(JPEG, allowance)
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS_OF_A_JOB // 10**6} million pixels together"):
        apart(JPEG, allowance)
    assert apart(JPEG).size == (64, 48)


def test_the_process_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "s3cr3t")
    apart(JPEG)
    [process] = image_process._idle
    with open(f"/proc/{process._process.pid}/environ", "rb") as file:  # noqa: PTH123
        assert b"s3cr3t" not in file.read()


@pytest.mark.parametrize("cut", [len(JPEG) // 2, len(JPEG) - 2])
def test_a_run_of_fill_bytes_costs_no_more_than_its_length(cut: int) -> None:
    short, long = (JPEG[:cut] + b"\xff" * count for count in (100_000, 1_600_000))

    def tried(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            decode(data)

    tried(short)
    assert seconds(lambda: tried(long)) < 2  # a scan whose cost grows with the square would take an hour


def test_a_process_that_dies_of_its_limits_is_an_error_and_the_next_image_is_decoded() -> None:
    apart(JPEG)
    [process] = image_process._idle
    os.kill(process._process.pid, signal.SIGSTOP)
    threading.Timer(0.3, lambda: os.kill(process._process.pid, signal.SIGKILL)).start()
    with pytest.raises(ValueError, match="too long or too much memory to decode; save it anew"):
        apart(JPEG)
    assert apart(JPEG).size == (64, 48)


def test_a_process_that_hangs_is_ended_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    apart(JPEG)
    monkeypatch.setattr(image_process, "_SECONDS", 0.3)
    [process] = image_process._idle
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="too long or too much memory"):
        apart(JPEG)
    assert not process.is_alive()


def test_a_job_that_is_stopped_does_not_wait_for_its_image() -> None:
    apart(JPEG)
    [process] = image_process._idle
    os.kill(process._process.pid, signal.SIGSTOP)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        apart(JPEG, stop=stop)
    assert time.monotonic() - started < 5
    assert not process.is_alive()


def test_an_image_that_needs_more_memory_than_there_is_is_an_error() -> None:
    """A PNG whose text chunk unpacks to gigabytes, or whose profile does, is held by Pillow's or by the process's limits."""
    kinds = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0"}
    for kind, head in kinds.items():
        content = head + zlib.compress(bytes(200_000_000))
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        data = encoded(NOISE)
        bomb = data[:33] + chunk * 20 + data[33:]
        with contextlib.suppress(ValueError):
            assert apart(bomb).size == (64, 48)
    assert apart(JPEG).size == (64, 48)
