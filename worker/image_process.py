"""Decodes images in separate processes, which can be killed: with limits on time and memory, and without our secrets.

A hostile file can keep Pillow busy for hours or fill gigabytes, and a thread cannot be stopped.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.catalog import Match
from worker.errors import Stopped
from worker.image_decode import Allowance

_ROOT = Path(__file__).parent.parent
_SECONDS = 60.0
"""Limit for one image in wall time: twice its CPU time, since the machine has other work too."""
_MAX_IDLE = 2
_TOO_MUCH = "it takes too long or too much memory to decode; save it anew as PNG, JPEG or WebP"


def decode_in_process(data: bytes, match: Match, allowance: Allowance, stop: threading.Event) -> Image.Image:
    """Run `image_decode.decode` in another process. Raises what that raises, and Stopped within a tenth of a second."""
    process = _take()
    try:
        image = process.decode(data, match, allowance, stop)
    except ValueError:
        _give_back(process)
        raise
    except (EOFError, OSError, _TimedOut):  # it exceeded its limits
        process.kill()
        raise ValueError(_TOO_MUCH) from None
    except BaseException:
        process.kill()
        raise
    _give_back(process)
    return image


class _TimedOut(Exception):
    pass


class _Process:
    def __init__(self) -> None:
        # Not the worker's environment: it has keys, and this process reads untrusted files.
        environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.image_decode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=_ROOT,
            bufsize=0,
        )
        self._rest = b""

    def decode(self, data: bytes, match: Match, allowance: Allowance, stop: threading.Event) -> Image.Image:
        end = time.monotonic() + _SECONDS
        self._write(json.dumps({"match": match, "bytes": len(data)}).encode() + b"\n" + data)
        while True:
            answer = json.loads(self._read_line(end, stop))
            if "error" in answer:
                raise ValueError(answer["error"])
            if "size" in answer:
                width, height = answer["size"]
                return Image.frombytes("RGB", (width, height), self._read_bytes(3 * width * height, end, stop))
            self._write(b"go\n" if allowance.take(answer["pixels"]) else b"no\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def _write(self, data: bytes) -> None:
        assert self._process.stdin
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) :]

    def _read_line(self, end: float, stop: threading.Event) -> bytes:
        while b"\n" not in self._rest:
            self._rest += self._read_some(end, stop)
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _read_bytes(self, count: int, end: float, stop: threading.Event) -> bytes:
        parts, size = [self._rest], len(self._rest)
        while size < count:
            parts.append(self._read_some(end, stop))
            size += len(parts[-1])
        self._rest = b""
        return b"".join(parts)

    def _read_some(self, end: float, stop: threading.Event) -> bytes:
        """Return the bytes that have arrived. Raises Stopped, _TimedOut, EOFError."""
        assert self._process.stdout
        while not select.select([self._process.stdout], [], [], 0.1)[0]:
            if stop.is_set():
                raise Stopped
            if time.monotonic() > end:
                raise _TimedOut
        part: Any = self._process.stdout.read(1 << 20)
        if not part:
            raise EOFError
        return bytes(part)


_idle: list[_Process] = []
_lock = threading.Lock()


def _take() -> _Process:
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.is_alive():
                return process
            process.kill()
    return _Process()


def _give_back(process: _Process) -> None:
    with _lock:
        if len(_idle) < _MAX_IDLE:
            _idle.append(process)
            return
    process.kill()
