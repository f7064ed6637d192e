"""A web server with scripted answers on this machine, for tests of downloads."""

from __future__ import annotations

import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Serve = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A web server with scripted answers: each is given once, the last one until there is another."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[tuple[str, dict[str, str]]] = []
        """(path, headers) of everything that was asked."""
        self.uploads: dict[str, bytes] = {}
        """What was PUT, by path."""
        self.left = threading.Event()
        self._scripts: dict[str, list[Serve]] = defaultdict(list)
        self._given: dict[str, int] = defaultdict(int)

    def url(self, path: str) -> str:
        return self.address + path

    def hits(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)

    def headers(self, path: str) -> dict[str, str]:
        """The headers of the last request for `path`."""
        return next(headers for asked, headers in reversed(self.requests) if asked == path)

    def runs(self, path: str, serve: Serve) -> str:
        """`path` is answered by `serve`. Returns its URL, as all that follow."""
        self._scripts[path].append(serve)
        return self.url(path)

    def gives(self, path: str, body: bytes = b"", status: int = 200, declared: bool = True, **headers: str) -> str:
        """A plain answer, with or without Content-Length."""

        def serve(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            if declared:
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return self.runs(path, serve)

    def breaks_off(self, path: str, body: bytes, declared: int, **headers: str) -> str:
        """The connection ends before `declared` bytes have come."""

        def serve(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            for name, value in {"Content-Length": str(declared), **headers}.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        return self.runs(path, serve)

    def in_pieces(self, path: str, pieces: Iterable[bytes], **headers: str) -> str:
        """HTTP/1.1 with chunked encoding; an empty piece is the end, and without one the connection breaks off."""

        def serve(handler: BaseHTTPRequestHandler) -> None:
            handler.protocol_version = "HTTP/1.1"
            handler.close_connection = True
            handler.send_response(200)
            for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            for piece in pieces:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                time.sleep(0.005)  # so that each comes alone

        return self.runs(path, serve)

    def versions(self, path: str, body: bytes, etag: str) -> str:
        """A file with an ETag: 304 for those who have it."""

        def serve(handler: BaseHTTPRequestHandler) -> None:
            unchanged = handler.headers.get("If-None-Match") == etag
            handler.send_response(304 if unchanged else 200)
            handler.send_header("ETag", etag)
            if not unchanged:
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            if not unchanged:
                handler.wfile.write(body)

        return self.runs(path, serve)

    def continues(self, path: str, body: bytes, breaks: Iterable[int] = (), **validators: str) -> str:
        """A file that can be asked for in part. The n-th answer breaks off at the n-th of `breaks`, later ones do not."""
        ends = iter(breaks)

        def serve(handler: BaseHTTPRequestHandler) -> None:
            range, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
            start = int(range[6:-1]) if range and condition in validators.values() else 0
            handler.send_response(206 if start else 200)
            for name, value in validators.items():
                handler.send_header(name.replace("_", "-"), value)
            if start:
                handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            handler.send_header("Content-Length", str(len(body) - start))
            handler.end_headers()
            handler.wfile.write(body[start : next(ends, len(body))])

        return self.runs(path, serve)

    def writes(self, path: str, *parts: bytes, then: bytes = b"", pause: float = 0.0) -> str:
        """Raw bytes, the status line and all; `then` comes after them for ever, `pause` seconds apart, or nothing more does.

        It is the client that hangs up, and `left` is set when it has.
        """

        def serve(handler: BaseHTTPRequestHandler) -> None:
            try:
                for part in parts:
                    handler.wfile.write(part)
                while then:
                    handler.wfile.write(then)
                    time.sleep(pause)
                handler.rfile.read(1)
            finally:
                self.left.set()

        return self.runs(path, serve)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append((handler.path, dict(handler.headers.items())))
        script, given = self._scripts[handler.path], self._given[handler.path]
        if not script:
            handler.send_error(404)
            return
        self._given[handler.path] = min(given + 1, len(script))
        script[min(given, len(script) - 1)](handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what some tests want."""


@contextmanager
def serve(address: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[Web]:
    """Serve while the block runs, with TLS when there is a context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.answer(self)

        def do_PUT(self) -> None:
            if self.headers.get("Expect") == "100-continue":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            web.uploads[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            web.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _Server((address, 0), Handler) as server:
        web = Web(f"{'https' if context else 'http'}://{address}:{server.server_port}")
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
