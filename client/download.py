"""Downloads a finished file under its own name, completely or not at all.

A presigned URL is a secret and needs no other one: no key is sent with it, and no message repeats it.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
import urllib3

from client.api import TIMEOUT, Auth, Retry
from client.errors import DownloadFailed
from client.result import File
from worker.net.addresses import NotPublic
from worker.net.privates import public_adapter
from worker.net.statuses import is_refusal

_CHUNK = 1 << 20
"""Bytes."""


def download(file: File, folder: Path, name: str, retry: Retry, is_here: bool, private: bool) -> Path:
    """Download `file` into `folder` as `name`, and resume where a connection breaks. Returns its path.

    `is_here`: the worker runs on this computer, and a file:// URL is copied. `private`: the URL may lead to addresses that are
    not public; of an endpoint in the public network it may not. Raises DownloadFailed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as part:
            if urlsplit(file.url).scheme == "file":
                _copy(file, part, is_here)
            else:
                _fetch(file, part, retry, private)
            return _give_name(part, folder, name)
    except OSError as error:
        raise _failed(file, f"{folder} cannot be written to ({error.strerror})") from error


def _failed(file: File, text: str, code: str = "DOWNLOAD_FAILED") -> DownloadFailed:
    return DownloadFailed(code, f"{file.title}: {text}")


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file that is deleted at the end. Unlike one of `tempfile`, it has the permissions that files have by default."""
    path = folder / f".download-{uuid.uuid4().hex}"
    path.open("xb").close()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _copy(file: File, part: Path, is_here: bool) -> None:
    source = Path(url2pathname(urlsplit(file.url).path))
    if not is_here or not source.is_file():
        raise _failed(
            file, f"the file is on the worker's own disk, as {source}, not on this computer; give the worker a bucket"
        )
    shutil.copyfile(source, part)
    if part.stat().st_size != file.bytes:
        raise _failed(file, f"{source} does not have the {file.bytes} bytes that the worker wrote; another job replaced it")


def _fetch(file: File, part: Path, retry: Retry, private: bool) -> None:
    """Write the body of the URL to `part`, in as many attempts as `retry` allows."""
    with requests.Session() as session, part.open("r+b") as opened:
        if not private:
            for scheme in ("http://", "https://"):
                session.mount(scheme, public_adapter())
        transfer = _Transfer(file, opened, retry)
        while True:
            try:
                transfer.attempt(session)
                return
            except _Interrupted as interrupted:
                if not retry.wait(f"{file.title}: {interrupted}"):
                    raise _in_bucket(file, str(interrupted)) from None


class _Interrupted(Exception):
    """The attempt ended early, and another one can continue."""


class _Transfer:
    """A download over several attempts."""

    def __init__(self, file: File, part: BinaryIO, retry: Retry) -> None:
        self._file = file
        self._part = part
        self._retry = retry
        self._etag = ""
        self._furthest = 0
        """Bytes; getting further counts as success."""

    def attempt(self, session: requests.Session) -> None:
        """Download the rest. Raises DownloadFailed and _Interrupted."""
        start = self._part.seek(0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity"}
        if start and self._etag:
            # If-Range: if the file has changed, the server sends all of it, since the rest would not fit.
            headers |= {"Range": f"bytes={start}-", "If-Range": self._etag}
        try:
            with session.get(self._file.url, headers=headers, auth=Auth(None), timeout=TIMEOUT, stream=True) as response:
                _raise_for_refusal(response, self._file)
                if not response.ok:
                    raise _Interrupted(f"status {response.status_code}")
                resumes = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                self._part.truncate(self._part.seek(start if response.status_code == 206 and resumes else 0))
                self._etag = response.headers.get("ETag", "")
                self._read(response)
        except NotPublic:
            raise _in_bucket(self._file, "its URL leads into a private network, and the endpoint is not in it") from None
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError):
            raise _Interrupted("no answer in time") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
            raise _in_bucket(self._file, "its URL is not valid") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            raise _Interrupted("the connection broke") from None

    def _read(self, response: requests.Response) -> None:
        wanted, size = self._file.bytes, self._part.tell()
        # read1 returns what has arrived; `iter_content` waits for a whole chunk, and loses it if the connection breaks.
        while size <= wanted and (chunk := response.raw.read1(_CHUNK, decode_content=True)):
            self._part.write(chunk)
            size += len(chunk)
            if size > self._furthest:
                self._furthest = size
                self._retry.succeeded()
        if size == wanted:
            return
        failure = f"received {size} bytes instead of {wanted}"
        if size > wanted or "Content-Length" in response.headers:  # the connection did not break: this is another file
            raise _in_bucket(self._file, failure)
        raise _Interrupted(failure)


def _in_bucket(file: File, failure: str, code: str = "DOWNLOAD_FAILED") -> DownloadFailed:
    return _failed(file, f"{failure}; the file is in the bucket as {file.key}", code)


def _raise_for_refusal(response: requests.Response, file: File) -> None:
    """Raise DownloadFailed for a status that a retry would not change."""
    if not is_refusal(response.status_code):
        return
    if file.expires_at and datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") >= file.expires_at:
        raise _in_bucket(file, f"its URL expired at {file.expires_at}", "URL_EXPIRED")
    raise _failed(file, f"the bucket answers with status {response.status_code} for {file.key}")


def _give_name(part: Path, folder: Path, name: str) -> Path:
    """Rename `part` to `name`, or to the next free `name-2`, unless an equal file is found on the way. Returns the path."""
    for number in count(1):
        target = folder / (name if number == 1 else f"{Path(name).stem}-{number}{Path(name).suffix}")
        try:
            os.link(part, target)
        except FileExistsError:
            if target.is_file() and filecmp.cmp(part, target, shallow=False):
                return target
            continue
        except OSError:  # the file system has no hard links
            try:
                target.open("xb").close()
            except FileExistsError:
                continue
            part.replace(target)
        return target
    raise AssertionError
