"""What a soak asks for, and the web server that its LoRAs come from."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """A request and how often it comes; `error`: the code it must fail with. `{job}` in it stands for the job's id."""

    name: str
    weight: int
    request: dict[str, Any]
    error: str = ""
    beside: dict[str, Any] = field(default_factory=dict)
    """What the job has beside its input."""

    def of(self, job_id: str) -> dict[str, Any]:
        return json.loads(json.dumps(self.request).replace("{job}", job_id))


CACHED = "LoRA from the web"
"""The case whose LoRA every worker has in its cache."""

PROMPT = {"prompt": "[trigger] a boat", "width": 64, "height": 64, "num_frames": 5, "sample_steps": 2}


def cases_of(model_id: str, web: str) -> list[Case]:
    """Of wan21_1b or wan22_14b_t2v; `web` is the address of a `lora_server`."""
    loras = {"wan21_1b": _single_loras, "wan22_14b_t2v": _moe_loras}[model_id]

    def case(
        name: str, weight: int, lora: str, *prompts: dict[str, Any], error: str = "", bucket: str = "", **more: Any
    ) -> Case:
        shots = [PROMPT | changes for changes in prompts or ({},)]
        base = {"model": model_id, "trigger_word": "sks", "loras": loras(lora, web), "prompts": shots}
        keys = {"accessId": "id", "accessSecret": "secret", "bucketName": "videos", "endpointUrl": f"{web}/{bucket}"}
        return Case(name, weight, base | more, error, {"s3Config": keys} if bucket else {})

    return [
        case("mp4", 4, "a"),
        case("webp", 3, "b", output_format="webp"),
        case("gif", 2, "a", output_format="gif"),
        case("png", 3, "b", output_format="png"),
        case("three prompts", 3, "a", {}, {"seed": 7}, {"prompt": "a lake", "num_frames": 1}, contact_sheet=True),
        case("one frame", 2, "b", {"num_frames": 1}),
        case("another sampler", 1, "a", {"sampler": "flowmatch"}),
        case("as the trainer", 2, "b", match="preview"),
        case("without guidance", 1, "a", {"guidance_scale": 1.0}),
        case(CACHED, 4, "plain"),
        case("LoRA of its own from the web", 2, "plain/{job}"),
        case("LoRA from a server with errors", 2, "flaky/{job}"),
        case("LoRA whose download breaks off", 2, "cut/{job}"),
        case("LoRA that comes slowly", 1, "slow/{job}"),
        case("LoRA that is not there", 1, "missing", error="LORA_DOWNLOAD_FAILED"),
        case("LoRA that is a page", 1, "page/{job}", error="LORA_INVALID"),
        case("LoRA from a dead server", 1, "dead", error="LORA_DOWNLOAD_FAILED"),
        case("no such LoRA", 1, "nothing", error="LORA_NOT_FOUND"),
        case("no LoRA", 1, "a", loras=[], error="LORA_FILE_REQUIRED"),
        case("bucket that floods", 1, "a", bucket="flood", error="UPLOAD_FAILED"),
        case("bucket that drips", 1, "a", bucket="drip", error="UPLOAD_FAILED"),
        case("bucket that does not answer", 1, "a", bucket="silence", error="UPLOAD_FAILED"),
        case("prompts for megabytes of result", 1, "a", *[{}] * 1001, error="INVALID_INPUT"),
        case("text for a number", 1, "a", {"width": "64"}, error="INVALID_INPUT"),
    ]


_LOCAL = {"a": "rank4", "b": "rank64", "nothing": "nothing"}


def _single_loras(lora: str, web: str) -> list[dict[str, Any]]:
    path = f"wan21_1b/{_LOCAL[lora]}" if lora in _LOCAL else f"{web}/{lora}/wan21_1b/rank16"
    return [{"path": f"{path}.safetensors"}]


def _moe_loras(lora: str, web: str) -> list[dict[str, Any]]:
    """Both sides, or with `b` the low one alone."""
    job = "wan22_14b_t2v" if lora in ("a", "nothing") else "wan22_14b_t2v_mixed"
    folder = "" if lora in _LOCAL else f"{web}/{lora}/"
    end = "x.safetensors" if lora == "nothing" else ".safetensors"
    sides = ["low"] if lora == "b" else ["high", "low"]
    return [{"path": f"{folder}{job}/{job}_{side}_noise{end}", "transformer": side} for side in sides]


@contextmanager
def lora_server(folder: Path) -> Iterator[str]:
    """Serve `folder` under `/MANNER/…/JOB/FILE`, where the manner says what goes wrong. Gives the server's address."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.split("/")
            asked[self.path] += 1
            first = asked[self.path] == 1
            manner = parts[1]
            if manner in ("missing", "dead"):
                self._send(404 if manner == "missing" else 503, b"")
            elif manner == "page":
                self._send(200, b"<!doctype html><html><body>Please log in</body></html>")
            elif manner == "flaky" and asked[self.path] <= 2:
                if first:
                    self._send(500, b"")  # and the second time it hangs up without a word
            else:
                body = folder.joinpath(*parts[-2:]).read_bytes()
                self._give(body, manner, first)

        def do_PUT(self) -> None:
            """A stranger's bucket."""
            manner = self.path.split("/")[1]
            with suppress(OSError):
                if manner != "silence":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000000")
                    self.end_headers()
                for _ in range(1000):
                    time.sleep(0 if manner == "flood" else 0.1)
                    self.wfile.write({"flood": b"x" * 100_000, "drip": b"x", "silence": b""}[manner])
            self.close_connection = True

        def _give(self, body: bytes, manner: str, first: bool) -> None:
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            wanted = self.headers.get("Range", "")
            start = int(wanted[6:-1]) if wanted and self.headers.get("If-Range", etag) == etag else 0
            if self.headers.get("If-None-Match") == etag:
                self._send(304, b"", ETag=etag)
                return
            more = {"ETag": etag, "Content-Length": str(len(body) - start)}
            if start:
                more["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            pieces = [body[start:]]
            if manner == "cut" and first:
                pieces = [body[: len(body) // 2]]
            elif manner == "slow":
                pieces = [body[at : at + 4096] for at in range(start, len(body), 4096)]
            self._send(206 if start else 200, pieces[0], **more)
            for piece in pieces[1:]:
                time.sleep(0.05)
                self.wfile.write(piece)

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A worker that is killed hangs up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
