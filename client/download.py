"""A finished output → a file of its own name, whole or not there.

A presigned URL is a secret that needs no other: no key goes with it, and no message repeats it.
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

from client.api import Auth, Patience
from client.errors import DownloadFailed
from client.result import File
from worker.net.statuses import is_refusal

_CHUNK = 1 << 20
_TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two chunks."""


def download(output: File, folder: Path, name: str, patience: Patience, here: bool) -> Path:
    """Fetch `output` into `folder` as `name`, going on where a connection broke off. Returns where it is.

    `here`: file:// URLs are of this computer. Raises DownloadFailed.
    """
    what = output.what
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as part:
            if urlsplit(output.url).scheme == "file":
                _copy(output, part, here, what)
            else:
                _fetch(output, part, patience, what)
            return _placed(part, folder, name)
    except OSError as error:
        raise DownloadFailed("DOWNLOAD_FAILED", f"{what}: {folder} cannot be written to ({error.strerror})") from error


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file with the permissions of any other, which those of `tempfile` have not; gone with the block."""
    path = folder / f".download-{uuid.uuid4().hex}"
    path.open("xb").close()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _copy(output: File, part: Path, here: bool, what: str) -> None:
    source = Path(url2pathname(urlsplit(output.url).path))
    if not here or not source.is_file():
        text = f"{what}: the worker left it on its own disk, as {source}, which is not here; give the worker a bucket"
        raise DownloadFailed("DOWNLOAD_FAILED", text)
    shutil.copyfile(source, part)
    if part.stat().st_size != output.bytes:
        text = f"{what}: {source} has not the {output.bytes} bytes that the worker wrote; is it another's?"
        raise DownloadFailed("DOWNLOAD_FAILED", text)


def _fetch(output: File, part: Path, patience: Patience, what: str) -> None:
    """Write the body of the URL to `part`, in as many attempts as it takes."""
    with requests.Session() as session, part.open("r+b") as file:
        transfer = _Transfer(output, file, patience, what)
        while True:
            try:
                transfer.attempt(session)
                return
            except _Interrupted as interrupted:
                if not patience.wait(f"{what}: {interrupted}"):
                    raise _lost(output, what, str(interrupted)) from None


class _Interrupted(Exception):
    """Another attempt can bring the rest."""


class _Transfer:
    """What has come of a file so far."""

    def __init__(self, output: File, file: BinaryIO, patience: Patience, what: str) -> None:
        self._output = output
        self._file = file
        self._patience = patience
        self._what = what
        self._etag = ""
        self._furthest = 0

    def attempt(self, session: requests.Session) -> None:
        """Fetch the rest. Raises DownloadFailed and _Interrupted."""
        start = self._file.seek(0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity"}
        if start and self._etag:
            # If-Range: to another version of the file the rest would not fit, and a server sends the whole.
            headers |= {"Range": f"bytes={start}-", "If-Range": self._etag}
        try:
            with session.get(self._output.url, headers=headers, auth=Auth(None), timeout=_TIMEOUT, stream=True) as response:
                _raise_for_refusal(response, self._output, self._what)
                if not response.ok:
                    raise _Interrupted(f"status {response.status_code}")
                goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                self._file.truncate(self._file.seek(start if response.status_code == 206 and goes_on else 0))
                self._etag = response.headers.get("ETag", "")
                self._read(response)
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError):
            raise _Interrupted("no answer in time") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
            raise _lost(self._output, self._what, "its URL is none") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            raise _Interrupted("the connection broke off") from None

    def _read(self, response: requests.Response) -> None:
        wanted, size = self._output.bytes, self._file.tell()
        # read1 gives what is there; `iter_content` waits for a whole chunk, and loses it when the connection breaks.
        while size <= wanted and (chunk := response.raw.read1(_CHUNK, decode_content=True)):
            self._file.write(chunk)
            size += len(chunk)
            if size > self._furthest:
                self._furthest = size
                self._patience.again()
        if size == wanted:
            return
        failure = f"{size} bytes came instead of {wanted}"
        if size > wanted or "Content-Length" in response.headers:  # not cut short: it is another file
            raise _lost(self._output, self._what, failure)
        raise _Interrupted(failure)


def _lost(output: File, what: str, failure: str) -> DownloadFailed:
    return DownloadFailed("DOWNLOAD_FAILED", f"{what}: {failure}; the file lies in the bucket as {output.key}")


def _raise_for_refusal(response: requests.Response, output: File, what: str) -> None:
    """Raises DownloadFailed for the answers that will be the same next time."""
    status = response.status_code
    if not is_refusal(status):
        return
    if output.expires_at and datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") >= output.expires_at:
        text = f"{what}: its URL expired at {output.expires_at}; the file lies in the bucket as {output.key}"
        raise DownloadFailed("URL_EXPIRED", text)
    raise DownloadFailed("DOWNLOAD_FAILED", f"{what}: the bucket answers with status {status} for {output.key}")


def _placed(part: Path, folder: Path, name: str) -> Path:
    """Give `part` its name, or that of the same file that is there already, or the next free one."""
    for number in count(1):
        target = folder / (name if number == 1 else f"{Path(name).stem}-{number}{Path(name).suffix}")
        try:
            os.link(part, target)
        except FileExistsError:
            if target.is_file() and filecmp.cmp(part, target, shallow=False):
                return target
            continue
        except OSError:  # a file system without links
            try:
                target.open("xb").close()
            except FileExistsError:
                continue
            part.replace(target)
        return target
    raise AssertionError
