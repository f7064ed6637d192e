"""A Hugging Face Hub on this machine, as far as its client asks for it, with all the faults that a network has and some more.

Large files are answered by a redirect to a CDN, which is the same server on another port: another origin, to which no token may
go. Faults are given per file and used up one by one; the last one stays when it is wrapped in `always`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Fault = Callable[["Handler", bytes], None]
"""Answers a request for a file in place of the server; given the whole file."""


class HubServer:
    """Repos by their id: for each commit its files, and `main` as the last one that was put."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.main: dict[str, str] = {}
        self.gated: dict[str, str] = {}
        """Repo to the token that may read it."""
        self.faults: dict[str, list[Fault]] = {}
        """By the last parts of a path: of a file, or of a listing."""
        self.lists_blobs = True
        """Whether listings have sizes and sums."""
        self.lists_siblings = True
        self.relative_redirects = False
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        """Bytes of files that were sent."""
        self.lock = threading.Lock()
        self.address = self.cdn = ""

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """Another commit of the repo, which is `main` from now on."""
        commit = hashlib.sha1(f"{repo} {len(self.repos.get(repo, ()))}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.main[repo] = commit
        return commit

    def fails(self, path: str, *faults: Fault) -> None:
        self.faults[path] = list(faults)

    def fault_for(self, path: str) -> Fault | None:
        with self.lock:
            for end, faults in self.faults.items():
                if path.endswith(end) and faults:
                    return faults[0] if getattr(faults[0], "always", False) else faults.pop(0)
        return None

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of all requests whose path holds `part`."""
        return [headers for path, headers in self.requests if part in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((f"{self.command} {path}", {name.lower(): value for name, value in self.headers.items()}))
        with suppress(ConnectionError):
            if path.startswith("/api/models/"):
                self.answer_api(path.removeprefix("/api/models/"))
            elif path.startswith("/cdn/"):
                repo, commit, name = self.split(path.removeprefix("/cdn/"))
                self.answer_file(name, self.hub.repos[repo][commit][name])
            elif "/resolve/" in path:
                self.resolve(path.lstrip("/"))
            else:
                self.give(404)

    def split(self, path: str) -> tuple[str, str, str]:
        """ORG/NAME[/resolve]/REVISION/PATH"""
        org, name, revision, rest = path.replace("/resolve/", "/").split("/", 3)
        return f"{org}/{name}", revision, rest

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit; None when an error was given instead."""
        if repo not in self.hub.repos:
            self.give(401, x_error_message="Invalid username or password.")
        elif repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.gated[repo]}":
            message = f"Access to model {repo} is restricted."
            self.give(403 if self.headers.get("Authorization") else 401, x_error_code="GatedRepo", x_error_message=message)
        else:
            commit = self.hub.main[repo] if revision == "main" else revision
            if commit in self.hub.repos[repo]:
                return commit
            self.give(404, x_error_code="RevisionNotFound", x_error_message=f"Invalid rev id: {revision}")
        return None

    def answer_api(self, path: str) -> None:
        if fault := self.hub.fault_for(path):
            return fault(self, b"{}")
        org, name, kind, revision, *_ = path.split("/")
        repo = f"{org}/{name}"
        commit = self.commit_of(repo, revision)
        if commit is None:
            return None
        files = self.hub.repos[repo][commit]
        if kind == "tree":
            tree = [{"type": "directory", "path": "vae", "oid": "0" * 40}]
            tree += [{"type": "file", "path": path, **listing_of(path, body, "oid", "oid")} for path, body in files.items()]
            return self.give(200, json.dumps(tree).encode())
        siblings: list[dict[str, Any]] = [
            {"rfilename": path} | (listing_of(path, body, "blobId", "sha256") if self.hub.lists_blobs else {})
            for path, body in files.items()
        ]
        info = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.give(200, json.dumps(info | ({"siblings": siblings} if self.hub.lists_siblings else {})).encode())

    def resolve(self, path: str) -> None:
        repo, revision, name = self.split(path)
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        files = self.hub.repos[repo][commit]
        if name not in files:
            self.give(404, x_error_code="EntryNotFound", x_repo_commit=commit)
        elif is_large(name):
            headers = {
                "x_linked_size": str(len(files[name])),
                "x_linked_etag": f'"{sha256_of(files[name])}"',
                "x_repo_commit": commit,
            }
            headers |= {"x_xet_hash": "0" * 64, "etag": '"of-the-redirect"'}
            to = "" if self.hub.relative_redirects else self.hub.cdn
            self.give(302, location=f"{to}/cdn/{repo}/{commit}/{name}?Signature=secret", **headers)
        else:
            self.answer_file(name, files[name], x_repo_commit=commit, etag=f'"{blob_of(files[name])}"')

    def answer_file(self, name: str, body: bytes, **headers: str) -> None:
        fault = self.hub.fault_for(name) if self.command == "GET" else None
        if fault:
            return fault(self, body)
        start = self.start
        if start >= len(body) > 0:
            return self.give(416, content_range=f"bytes */{len(body)}")
        if "Range" in self.headers:
            return self.give(206, body[start:], content_range=f"bytes {start}-{len(body) - 1}/{len(body)}", **headers)
        return self.give(200, body, **headers)

    @property
    def start(self) -> int:
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def give(self, status: int, body: bytes = b"", declared: int | None = None, **headers: str) -> None:
        """An answer; with more bytes `declared` than there are, the connection ends early."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if declared is None else declared))
        self.end_headers()
        if self.command != "HEAD":
            for at in range(0, len(body), 65536):
                piece = body[at : at + 65536]
                self.wfile.write(piece)
                self.hub.sent += len(piece) if status in (200, 206) and "/api/" not in self.path else 0
        self.close_connection = self.close_connection or (declared or 0) > len(body)


def is_large(path: str) -> bool:
    """Whether the Hub keeps such a file with LFS."""
    return path.endswith((".safetensors", ".bin", ".model"))


def sha256_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def blob_of(body: bytes) -> str:
    """The name that git gives it."""
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


def listing_of(path: str, body: bytes, blob: str, sum: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": len(body), blob: blob_of(body)}
    if is_large(path):
        entry[blob] = blob_of(b"a pointer")
        entry["lfs"] = {"size": len(body), sum: sha256_of(body), "pointerSize": 134}
    return entry


def always(fault: Fault) -> Fault:
    """A fault that is never used up."""

    def serve(handler: Handler, body: bytes) -> None:
        fault(handler, body)

    serve.always = True  # type: ignore[attr-defined]
    return serve


def rest(handler: Handler, body: bytes) -> dict[str, Any]:
    """What an honest server would give, as arguments of `Handler.give`."""
    start = handler.start
    if "Range" not in handler.headers:
        return {"status": 200, "body": body}
    return {"status": 206, "body": body[start:], "content_range": f"bytes {start}-{len(body) - 1}/{len(body)}"}


def drops(handler: Handler, body: bytes) -> None:
    """The connection breaks in the middle of what is left."""
    honest = rest(handler, body)
    left = honest.pop("body")
    handler.give(body=left[: len(left) // 2], declared=len(left), **honest)


def ends_early(handler: Handler, body: bytes) -> None:
    """The first half of what is left, as if that were all."""
    honest = rest(handler, body)
    left = honest.pop("body")
    handler.give(body=left[: len(left) // 2], **honest)


def ends_at_once(handler: Handler, body: bytes) -> None:
    handler.give(**rest(handler, body) | {"body": b""})


def lies(handler: Handler, body: bytes) -> None:
    """Other bytes, as many."""
    honest = rest(handler, body)
    handler.give(**honest | {"body": bytes(255 - byte for byte in honest["body"])})


def gives_more(handler: Handler, body: bytes) -> None:
    handler.give(**rest(handler, body + b"more"))


def gives_a_page(handler: Handler, body: bytes) -> None:
    handler.give(200, b"<html>Please log in to this network</html>", content_type="text/html")


def ignores_range(handler: Handler, body: bytes) -> None:
    handler.give(200, body)


def ignores_range_and_drops(handler: Handler, body: bytes) -> None:
    handler.give(200, body[: len(body) // 2], declared=len(body))


def gives_another_range(handler: Handler, body: bytes) -> None:
    handler.give(206, body[1:], content_range=f"bytes 1-{len(body) - 1}/{len(body)}")


def in_chunks(handler: Handler, body: bytes) -> None:
    """No Content-Length."""
    honest = rest(handler, body)
    handler.send_response(honest.pop("status"))
    left = honest.pop("body")
    for name, value in honest.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(f"{len(left):x}\r\n".encode() + left + b"\r\n0\r\n\r\n")
    handler.hub.sent += len(left)


def half_in_chunks(handler: Handler, body: bytes) -> None:
    """A chunked answer without its end."""
    half = body[: len(body) // 2]
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(f"{len(half):x}\r\n".encode() + half + b"\r\n")
    handler.close_connection = True


def gzipped(handler: Handler, body: bytes) -> None:
    """Compressed, though it was not asked for."""
    handler.give(200, gzip.compress(body), content_encoding="gzip")


def badly_gzipped(handler: Handler, body: bytes) -> None:
    handler.give(200, body, content_encoding="gzip")


def without_length(handler: Handler, body: bytes) -> None:
    """HTTP/1.0: half of the body, and the end of the connection is the end of the file."""
    handler.protocol_version = "HTTP/1.0"
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def hangs_up(handler: Handler, body: bytes) -> None:
    handler.close_connection = True


def with_status(status: int, **headers: str) -> Fault:
    def serve(handler: Handler, body: bytes) -> None:
        handler.give(status, b"no", **headers)

    return serve


def stalls(seconds: float) -> Fault:
    """Half, and then nothing for a while."""

    def serve(handler: Handler, body: bytes) -> None:
        drops(handler, body)
        handler.wfile.flush()
        time.sleep(seconds)

    return serve


def redirects_to(location: str) -> Fault:
    def serve(handler: Handler, body: bytes) -> None:
        handler.give(302, location=location)

    return serve


def gives(body: bytes) -> Fault:
    """Exactly this."""

    def serve(handler: Handler, _: bytes) -> None:
        handler.give(200, body)

    return serve


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    bound = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server, ThreadingHTTPServer(("127.0.0.1", 0), bound) as cdn:
        for each in (server, cdn):
            each.daemon_threads = True
            threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        hub.address, hub.cdn = (f"http://127.0.0.1:{each.server_port}" for each in (server, cdn))
        yield hub
        for each in (server, cdn):
            each.block_on_close = False  # some answers stall on purpose
            each.shutdown()
