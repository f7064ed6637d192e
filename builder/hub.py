"""A client of the Hugging Face Hub: lists a repo at one commit, and downloads its files with retries, resumes and checksums.

It does not decide which files to download, nor where they are stored; fetch_checkpoints.py does. No torch in this file.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status, is_offline_mode
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile, RepoSibling
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers  # type: ignore[attr-defined] # they load lazily
from tqdm import tqdm

from builder.retry import FetchError, TryAgain, retry
from worker.net.statuses import is_refusal

T = TypeVar("T")

TESTED_WITH = "2.4.0"
"""The version of huggingface_hub, of which all names used here but `constants.HF_HUB_OFFLINE` are public."""

_WRONG_DOWNLOADS = 3
"""Complete downloads with a wrong size or checksum, after which the file is given up."""
_SECONDS_OF_SILENCE = constants.HF_HUB_DOWNLOAD_TIMEOUT
_CHUNK = 1024**2
_REDIRECTS = 10

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class Stopped(Exception):
    """The download was stopped, because another one has failed."""


class _WrongContent(Exception):
    """The bytes that were downloaded are not those that the Hub lists."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo at a commit, as the Hub lists it."""

    repo: str
    commit: str
    path: str
    size: int
    """In bytes; -1 is not known."""
    sum: str
    """Hexadecimal: the sha256 of a large file, the git blob id (sha1) of a small one; "" is not known."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"

    @property
    def url(self) -> str:
        return hf_hub_url(self.repo, self.path, revision=self.commit, endpoint=constants.ENDPOINT)


def ignore_offline_mode() -> None:
    """Allow requests, though the image sets HF_HUB_OFFLINE for the worker. Raises FetchError where that has no effect."""
    constants.HF_HUB_OFFLINE = False
    if is_offline_mode():
        installed = metadata.version("huggingface_hub")
        raise FetchError(
            f"huggingface_hub {installed} no longer reads constants.HF_HUB_OFFLINE: install huggingface_hub {TESTED_WITH} (the "
            "tested version), or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        )


class Hub:
    """The Hugging Face Hub, or the server in HF_ENDPOINT. Every answer is checked before it is used."""

    def __init__(self, token: str | None = None) -> None:
        self._token = token
        self._api = HfApi(endpoint=constants.ENDPOINT, token=token)
        self.stop = threading.Event()
        """Once set, everything that waits or downloads raises Stopped."""

    def files_at(self, repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """Return the commit that `revision` is now, and its files by path. Raises FetchError."""
        timeout = _SECONDS_OF_SILENCE
        info = self._ask(
            repo, revision, lambda: self._api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        )
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision) and commit != revision):
            raise FetchError(f"the Hub returned {commit or 'no commit'} for {repo} at {revision}; it must be that commit")
        if info.siblings:
            entries = [(file.rfilename, *_size_and_sum(file)) for file in info.siblings]
        else:
            tree = self._ask(repo, commit, lambda: list(self._api.list_repo_tree(repo, recursive=True, revision=commit)))
            entries = [(item.path, *_size_and_sum(item)) for item in tree if isinstance(item, RepoFile)]
        return commit, {path: RemoteFile(repo, commit, path, size, sum) for path, size, sum in entries}

    def complete(self, file: RemoteFile) -> RemoteFile:
        """Return the file with its size and checksum, which a listing can leave out. Raises FetchError."""
        if file.size >= 0 and file.sum:
            return file
        headers = self._ask(file.repo, file.commit, lambda: self._headers_of(file))
        if "X-Linked-Etag" in headers:  # a large file, which is elsewhere
            size, sum = headers.get("X-Linked-Size", ""), headers["X-Linked-Etag"]
        else:
            size, sum = headers.get("Content-Length", ""), headers.get("ETag", "")
        if file.size < 0 and not size.isdecimal():
            raise FetchError(f"the Hub does not say how large {file} is, so it cannot be downloaded safely")
        return replace(file, size=int(size) if file.size < 0 else file.size, sum=file.sum or _checksum(sum.strip('W/"')))

    def download(self, file: RemoteFile, out: BinaryIO, on_bytes: Callable[[int], object]) -> str:
        """Download what `out` does not hold yet of the file, and return the sha256 of the whole.

        `on_bytes` is called with the number of bytes gained, or lost (negative) when the download starts over. Raises
        FetchError when the Hub refuses the file, fails repeatedly, or returns other content than it lists; and Stopped.
        """
        content = _Content(file, out, on_bytes)

        def attempt() -> str:
            if not content.is_complete():
                self._read(file, content)
            if not content.is_complete():
                raise TryAgain(f"it ended after {content.size} of {file.size} bytes")
            return content.sha256

        for _ in range(_WRONG_DOWNLOADS):
            try:
                return retry(str(file), attempt, self._pause, progress=lambda: content.most)
            except _WrongContent as error:
                content.restart()
                reason = error
        raise FetchError(f"{file}: {reason}, {_WRONG_DOWNLOADS} times; try again later, or another --revision")

    def _read(self, file: RemoteFile, content: _Content) -> None:
        """Make one request for the bytes that are still missing."""
        headers = self._request_headers()
        if content.size:
            headers["Range"] = f"bytes={content.size}-"
        with (
            _translated_errors(file.repo, file.commit, file.path),
            get_session().stream("GET", file.url, headers=headers, timeout=_SECONDS_OF_SILENCE) as response,
        ):
            if response.status_code not in (200, 206):
                response.read()
                if response.status_code == 416:  # the range is not in the file
                    content.restart()
                hf_raise_for_status(response)
                raise TryAgain(f"the Hub answered with status {response.status_code}")
            if content.size and not _continues(response, content.size):
                content.restart()
                if response.status_code == 206:
                    raise TryAgain("the server returned another range than requested")
            for chunk in response.iter_bytes():
                if self.stop.is_set():
                    raise Stopped
                content.write(chunk)

    def _headers_of(self, file: RemoteFile) -> Mapping[str, str]:
        """Return the Hub's own headers of the file: those before the redirect to a CDN, after any from a repo's old name."""
        url, headers = file.url, self._request_headers()
        for _ in range(_REDIRECTS):
            response = get_session().head(url, headers=headers, follow_redirects=False, timeout=_SECONDS_OF_SILENCE)
            hf_raise_for_status(response)
            if "X-Linked-Etag" in response.headers or not response.has_redirect_location:
                return response.headers
            target = urljoin(url, response.headers["Location"])
            if urlsplit(target)[:2] != urlsplit(url)[:2]:
                headers.pop("authorization", None)  # the token is for the Hub alone
            url = target
        raise httpx2.TooManyRedirects(f"{_REDIRECTS} redirects")

    def _request_headers(self) -> dict[str, str]:
        """Return headers with the token. Compressed content is not wanted: an interrupted download of it cannot be resumed."""
        return {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}

    def _ask(self, repo: str, revision: str, question: Callable[[], T]) -> T:
        """Return what `question` returns, after retries."""

        def attempt() -> T:
            try:
                with _translated_errors(repo, revision):
                    return question()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TryAgain(f"the Hub's answer cannot be parsed ({type(error).__name__})") from error

        return retry(f"{repo} at {revision}", attempt, self._pause)

    def _pause(self, message: str, seconds: float) -> None:
        tqdm.write(message, file=sys.stderr)  # print would break the progress bar
        if self.stop.wait(seconds):
            raise Stopped


def verified_sha256(file: RemoteFile, path: Path) -> str | None:
    """Return the sha256 of the file at `path` if its size and checksum are those that the Hub lists; else None."""
    if not path.is_file() or path.stat().st_size != file.size:
        return None
    with path.open("rb") as opened:
        content = _Content(file, opened, lambda _: None)
    try:
        return content.sha256 if content.is_complete() else None
    except _WrongContent:
        return None


class _Content:
    """The bytes of a file that are there so far, with their checksums."""

    def __init__(self, file: RemoteFile, out: BinaryIO, on_bytes: Callable[[int], object]) -> None:
        self._file, self._out, self._on_bytes = file, out, on_bytes
        self.most = 0
        """The most bytes that were there at any time."""
        self._reset()
        out.seek(0)
        while chunk := out.read(_CHUNK):
            self._count(chunk)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Raises _WrongContent when there are more bytes than listed, FetchError when they cannot be stored."""
        try:
            self._out.write(chunk)
        except OSError as error:
            raise FetchError(f"{self._file} cannot be stored: {error.strerror}") from error
        self._count(chunk)
        if self.size > self._file.size:
            raise _WrongContent(f"the server sent more than the {self._file.size} bytes that the Hub lists")

    def is_complete(self) -> bool:
        """Raises _WrongContent when all bytes are there, and they are not those that the Hub lists."""
        if self.size < self._file.size:
            return False
        if self.size > self._file.size or self._file.sum not in ("", self.sha256, self._blob_id.hexdigest()):
            raise _WrongContent("its content has another size or sum than the Hub lists")
        return True

    def restart(self) -> None:
        """Discard all bytes."""
        self._on_bytes(-self.size)
        self._out.seek(0)
        self._out.truncate()
        self._reset()

    def _reset(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._blob_id = hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)  # as git computes it

    def _count(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        if len(self._file.sum) == 40:
            self._blob_id.update(chunk)
        self.size += len(chunk)
        self.most = max(self.most, self.size)
        self._on_bytes(len(chunk))


@contextmanager
def _translated_errors(repo: str, revision: str, path: str = "") -> Iterator[None]:
    """Turn errors of huggingface_hub and httpx into FetchError or TryAgain."""
    try:
        yield
    except hub_errors.HfHubHTTPError as error:
        raise _as_fetch_error(error, repo, revision, path) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        raise TryAgain(f"the connection broke ({type(error).__name__})") from error


def _as_fetch_error(error: hub_errors.HfHubHTTPError, repo: str, revision: str, path: str) -> FetchError | TryAgain:
    """Translate an error of huggingface_hub. Its text is left out, since it can hold signed URLs."""
    status, headers = error.response.status_code, error.response.headers
    may_pass = status == 416 or not is_refusal(status)
    has_expired = path and error.response.history and not headers.get("X-Error-Code")  # the CDN's URL is signed for a while
    if may_pass or has_expired:
        return TryAgain(f"the Hub answered with status {status}", _requested_pause(headers))
    if isinstance(error, hub_errors.GatedRepoError):
        return FetchError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return FetchError(f"{repo} has no revision {revision}: --revision takes a commit, a branch or a tag of that repo")
    if isinstance(error, hub_errors.EntryNotFoundError):
        return FetchError(f"{repo} has no {path or 'such file'} at revision {revision}")
    if status in (401, 403, 404):
        return FetchError(
            f"the Hub has no {repo} at revision {revision} to read (status {status}): check the spelling; if the repo is "
            "private, set HF_TOKEN to a token that may read it"
        )
    return FetchError(f"the Hub refused {repo}{path and f'/{path}'} at revision {revision} with status {status}")


def _requested_pause(headers: Mapping[str, str]) -> float:
    """Return the seconds that the Hub asks to wait, by its rate limit or by Retry-After (a number or a date); else 0."""
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("Retry-After", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
        return (date - date.now(date.tzinfo)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _continues(response: httpx2.Response, position: int) -> bool:
    """Return whether the response begins at byte `position` of the file, uncompressed."""
    encoding, content_range = (response.headers.get(name, "") for name in ("Content-Encoding", "Content-Range"))
    return response.status_code == 206 and encoding in ("", "identity") and content_range.startswith(f"bytes {position}-")


def _size_and_sum(file: RepoSibling | RepoFile) -> tuple[int, str]:
    """Return what a listing says of a file; -1 and "" where it does not say it."""
    size, sum = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, file.blob_id)
    return size if isinstance(size, int) and size >= 0 else -1, _checksum(sum)


def _checksum(value: object) -> str:
    return value.lower() if isinstance(value, str) and _CHECKSUM.fullmatch(value.lower()) else ""
