"""The Hugging Face Hub, for downloads that are checked: listings at one commit, and files that resume and match their sums.

Used by fetch_checkpoints, which says what to download and where to. No torch in this file.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile, RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers  # type: ignore[attr-defined]
from tqdm import tqdm

from worker.net.statuses import is_refusal

T = TypeVar("T")

_TRIES = 8
"""Consecutive attempts without progress after which a download fails."""
_WRONG_CONTENTS = 3
"""Complete downloads with a wrong sum after which the Hub's copy counts as wrong."""
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_DEMAND = 0.5, 15.0, 300.0
"""Seconds between attempts; the last is the longest Retry-After that is obeyed."""
_SECONDS_OF_SILENCE = constants.HF_HUB_DOWNLOAD_TIMEOUT
_CHUNK = 1024**2
_REDIRECTS = 10

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class FetchError(Exception):
    """One line for the caller: what failed, where, and what to do."""


class Stopped(Exception):
    """Another file has failed."""


class RetryLater(Exception):
    """This request failed or was incomplete; a retry may succeed. `pause`: the seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class WrongContent(Exception):
    """The bytes are not those that the Hub lists."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo at a commit, as the Hub lists it."""

    repo: str
    commit: str
    path: str
    size: int
    sum: str
    """In hexadecimal digits: the sha256 of a large file, the git blob id of a small one; "" where it is not known."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"


class Hub:
    """The Hugging Face Hub, or the mirror that HF_ENDPOINT names. Every answer is checked before it is used."""

    def __init__(self, token: str | None = None) -> None:
        self._token = token
        self._api = HfApi(endpoint=constants.ENDPOINT, token=token)
        self.stop = threading.Event()
        """Setting it makes everything that waits or reads raise Stopped."""

    def list(self, repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """Returns (the commit that `revision` is now, its files by their path). Raises FetchError."""
        info = self._ask(
            repo,
            revision,
            lambda: self._api.model_info(repo, revision=revision, files_metadata=True, timeout=_SECONDS_OF_SILENCE),
        )
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision) and commit != revision):
            raise FetchError(f"the Hub gives {commit or 'no commit'} for {repo} at {revision}; it must be that commit")
        if info.siblings:
            entries = [(file.rfilename, *_identity(file)) for file in info.siblings]
        else:
            tree = self._ask(repo, commit, lambda: list(self._api.list_repo_tree(repo, recursive=True, revision=commit)))
            entries = [(item.path, *_identity(item)) for item in tree if isinstance(item, RepoFile)]
        return commit, {path: RemoteFile(repo, commit, path, size, sum) for path, size, sum in entries}

    def complete(self, file: RemoteFile) -> RemoteFile:
        """Add the size and the sum, which a listing can leave out. Raises FetchError."""
        if file.size >= 0 and file.sum:
            return file
        head = self._ask(file.repo, file.commit, partial(self._head, file)).headers
        size, sum = head.get("X-Linked-Size"), head.get("X-Linked-Etag")
        if sum is None and "Location" not in head:
            size, sum = head.get("Content-Length"), head.get("ETag")
        told = _size(int(size)) if size and size.isdecimal() else -1
        file = replace(file, size=told if file.size < 0 else file.size, sum=file.sum or _sum((sum or "").strip('W/"')))
        if file.size < 0:
            raise FetchError(f"the Hub does not say how large {file} is, so it cannot be fetched safely")
        return file

    def fetch(self, file: RemoteFile, out: BinaryIO, moved: Callable[[int], object]) -> str:
        """Download the file into `out`, after the bytes that it holds already. Returns the sha256.

        `moved` is called with the bytes that were added, or lost by a restart. Raises FetchError when the Hub refuses, does not
        answer for long, or gives another content.
        """
        content = PartialFile(file, out, moved)
        patience = _Retries(str(file), self.stop)
        wrong = 0
        while True:
            try:
                if content.is_whole():
                    return content.sha256
                self._read(file, content)
                if content.size < file.size:
                    raise RetryLater(f"it ended after {content.size} of {file.size} bytes")
            except WrongContent as error:
                content.restart()
                wrong += 1
                if wrong == _WRONG_CONTENTS:
                    raise FetchError(f"{file}: {error}, {wrong} times; fetch it later, or another --revision") from None
            except RetryLater as error:
                patience.wait(error, content.most)

    def _read(self, file: RemoteFile, content: PartialFile) -> None:
        """Send one request for the bytes that are missing."""
        url = hf_hub_url(file.repo, file.path, revision=file.commit, endpoint=constants.ENDPOINT)
        headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        if content.size:
            headers["Range"] = f"bytes={content.size}-"
        try:
            with get_session().stream("GET", url, headers=headers, timeout=_SECONDS_OF_SILENCE) as response:
                if response.status_code not in (200, 206):
                    response.read()
                    if response.status_code == 416:
                        content.restart()
                    _raise_for(response, file.repo, file.commit, file.path)
                if content.size and not _continues(response, content.size):
                    content.restart()
                    if response.status_code == 206:
                        raise RetryLater("the server gave another range than was asked for")
                for chunk in response.iter_bytes():
                    if self.stop.is_set():
                        raise Stopped
                    content.write(chunk)
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise RetryLater(f"the connection broke ({type(error).__name__})") from error

    def _head(self, file: RemoteFile) -> httpx2.Response:
        """The response that describes the file itself: not a CDN's, and not that of a repo under its old name."""
        url = hf_hub_url(file.repo, file.path, revision=file.commit, endpoint=constants.ENDPOINT)
        headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        for _ in range(_REDIRECTS):
            response = get_session().head(url, headers=headers, follow_redirects=False, timeout=_SECONDS_OF_SILENCE)
            hf_raise_for_status(response)
            target = urljoin(url, response.headers.get("Location", ""))
            if "X-Linked-Etag" in response.headers or not response.has_redirect_location:
                return response
            if urlsplit(target)[:2] != urlsplit(url)[:2]:
                headers.pop("authorization", None)
            url = target
        raise httpx2.TooManyRedirects(f"{_REDIRECTS} redirects")

    def _ask(self, repo: str, revision: str, question: Callable[[], T]) -> T:
        """Call `question`, and retry it while the Hub may still answer. Raises FetchError, Stopped."""
        patience = _Retries(f"{repo} at {revision}", self.stop)
        while True:
            try:
                try:
                    return question()
                except hub_errors.HfHubHTTPError as error:
                    raise _as_fetch_error(error, repo, revision) from None
                except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                    raise RetryLater(f"the Hub cannot be reached ({type(error).__name__})") from error
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise RetryLater(f"the Hub's answer makes no sense ({type(error).__name__})") from error
            except RetryLater as error:
                patience.wait(error)


class PartialFile:
    """The bytes of a file that are there so far, with their sums."""

    def __init__(self, file: RemoteFile, out: BinaryIO, moved: Callable[[int], object]) -> None:
        self._file, self._out, self._moved = file, out, moved
        self.size = self.most = 0
        """Bytes that are there now, and the most that ever were."""
        self._start_sums()
        out.seek(0)
        while chunk := out.read(_CHUNK):
            self._count(chunk)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Raises WrongContent when there are more bytes than the Hub lists, FetchError when they cannot be stored."""
        try:
            self._out.write(chunk)
        except OSError as error:
            raise FetchError(f"{self._file} cannot be stored: {error.strerror}") from error
        self._count(chunk)
        if self.size > self._file.size:
            raise WrongContent(f"more than the {self._file.size} bytes came that the Hub lists")

    def is_whole(self) -> bool:
        """Raises WrongContent when the file is complete and not the one that the Hub lists."""
        if self.size < self._file.size:
            return False
        sums = ("", self._sha256.hexdigest(), self._blob.hexdigest())
        if self.size > self._file.size or self._file.sum not in sums:
            raise WrongContent("what came has another size or sum than the Hub lists")
        return True

    def restart(self) -> None:
        self._moved(-self.size)
        self._out.seek(0)
        self._out.truncate()
        self.size = 0
        self._start_sums()

    def _start_sums(self) -> None:
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)  # git names small files by it

    def _count(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        if len(self._file.sum) == 40:
            self._blob.update(chunk)
        self.size += len(chunk)
        self.most = max(self.most, self.size)
        self._moved(len(chunk))


class _Retries:
    """Waits between attempts, longer each time, and gives up after several without progress."""

    def __init__(self, what: str, stop: threading.Event) -> None:
        self._what, self._stop = what, stop
        self._tries = 0
        self._most = 0

    def wait(self, reason: RetryLater, most: int = 0) -> None:
        """`most`: the most bytes that there ever were. Raises FetchError, Stopped."""
        if most > self._most:
            self._most, self._tries = most, 0
        self._tries += 1
        if self._tries >= _TRIES:
            raise FetchError(f"{self._what}: {reason}, {self._tries} times in a row; call it again later, and it goes on")
        pause = max(min(_FIRST_PAUSE * 2 ** (self._tries - 1), _LONGEST_PAUSE), min(reason.pause, _LONGEST_DEMAND))
        tqdm.write(f"{self._what}: {reason}; next try in {pause:.1f} s", file=sys.stderr)
        if self._stop.wait(pause):
            raise Stopped


def _raise_for(response: httpx2.Response, repo: str, revision: str, path: str) -> None:
    """Raises FetchError or RetryLater for a response without the file."""
    try:
        hf_raise_for_status(response)
    except hub_errors.HfHubHTTPError as error:
        raise _as_fetch_error(error, repo, revision, path, is_redirected=bool(response.history)) from None
    raise RetryLater(f"the Hub answered with status {response.status_code}")


def _as_fetch_error(
    error: hub_errors.HfHubHTTPError, repo: str, revision: str, path: str = "", is_redirected: bool = False
) -> FetchError | RetryLater:
    """The error that the Hub's stands for. Its text is not repeated: it can contain signed URLs."""
    status = error.response.status_code
    may_pass = status == 416 or not is_refusal(status)
    if may_pass or (is_redirected and not error.response.headers.get("X-Error-Code")):  # a signed URL is good for a while
        return RetryLater(f"the Hub answered with status {status}", _demanded(error.response.headers))
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
            f"the Hub has no {repo} at revision {revision} to read (status {status}): check the spelling; for a private repo "
            "set HF_TOKEN to a token that may read it"
        )
    return FetchError(f"the Hub refused {repo}{path and f'/{path}'} at revision {revision} with status {status}")


def _demanded(headers: Mapping[str, str]) -> float:
    """The seconds that the Hub asks to wait: by its rate limit, or by Retry-After with a number or a date."""
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
    """Whether the response begins at byte `position`, uncompressed."""
    is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
    return (
        is_plain and response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {position}-")
    )


def _identity(file: RepoSibling | RepoFile) -> tuple[int, str]:
    """(size, sum) of a listed file; -1 and "" where the listing does not give them."""
    return (_size(file.lfs.size), _sum(file.lfs.sha256)) if file.lfs else (_size(file.size), _sum(file.blob_id))


def _size(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else -1


def _sum(value: object) -> str:
    return value.lower() if isinstance(value, str) and _SUM.fullmatch(value.lower()) else ""
