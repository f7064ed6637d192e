"""Fetch the files that a model id needs from the Hugging Face Hub: only these, at one commit per repo, checked by their sums.

    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --parts text_encoder,tokenizer
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --dry-run

leaves `DIR/ORG/NAME` per repo, in the layout of the Hub, with a manifest of what was fetched. What is interrupted goes on from
the bytes that are there when it is called again; what is there and right is not fetched. A repo stays at the commit in its
manifest until `--revision` names another. The token is HF_TOKEN, or the file /run/secrets/HF_TOKEN. No torch in this file.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile, RepoSibling
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, parse_ratelimit_headers
from tqdm import tqdm

from pipelines.catalog import MODELS, ModelSpec
from pipelines.manifest import NAME, Entry, Manifest
from pipelines.weights import STEM_OF, file_names
from worker.net.statuses import is_refusal

T = TypeVar("T")

SECRET = Path("/run/secrets/HF_TOKEN")
INDEX = "model_index.json"

THEN = 315532800
"""1980-01-01: when everything that is written was last changed, so that the same bytes make the same layer of an image."""

_AT_ONCE = 8
_TRIES = 8
"""In a row that bring no byte."""
_WRONG_CONTENTS = 3
"""That are fetched in whole before the Hub is believed to have no other."""
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_DEMAND = 0.5, 15.0, 300.0
"""Seconds between tries; the last is what a server may ask for by Retry-After."""
_SECONDS_OF_SILENCE = constants.HF_HUB_DOWNLOAD_TIMEOUT
_CHUNK = 1024**2
_REDIRECTS = 10

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_SMALL_FILE = re.compile(r"[^/]+\.(json|model|txt|jinja)")
"""What a component without weights is made of; a folder can also hold pictures, or the same in another library's format."""


class FetchError(Exception):
    """One line for whoever called: what, where, and what to do."""


class _Stopped(Exception):
    """Another file has failed."""


class _Again(Exception):
    """This request brought not all; another may. `pause`: the seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _Wrong(Exception):
    """What came is not what the Hub lists."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo at a commit, as the Hub lists it."""

    repo: str
    commit: str
    path: str
    size: int
    sum: str
    """In hexadecimal digits: the sha256 of a large file, the name of its git blob for a small one; "" is not known."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"


class Hub:
    """The Hugging Face Hub, or what HF_ENDPOINT names. Its answers are not believed before they are checked."""

    def __init__(self, token: str | None = None) -> None:
        self._token = token
        self._api = HfApi(endpoint=constants.ENDPOINT, token=token)
        self.stop = threading.Event()
        """Ends everything that waits or reads, with _Stopped."""

    def list(self, repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """(the commit that `revision` is now, its files by their path). Raises FetchError."""
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
        """The file with its size and sum, which a listing can leave out. Raises FetchError."""
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
        """Bring `out` to hold the file, beginning with the bytes that it holds; `moved` is told of bytes won and lost.

        Returns the sha256. Raises FetchError when the Hub refuses, is silent for long, or gives another content.
        """
        content = _Content(file, out, moved)
        patience = _Patience(str(file), self.stop)
        wrong = 0
        while True:
            try:
                if content.is_whole():
                    return content.sha256
                self._read(file, content)
                if content.size < file.size:
                    raise _Again(f"it ended after {content.size} of {file.size} bytes")
            except _Wrong as error:
                content.restart()
                wrong += 1
                if wrong == _WRONG_CONTENTS:
                    raise FetchError(f"{file}: {error}, {wrong} times; fetch it later, or another --revision") from None
            except _Again as error:
                patience.wait(error, content.most)

    def _read(self, file: RemoteFile, content: _Content) -> None:
        """One request for what is still missing."""
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
                        raise _Again("the server gave another range than was asked for")
                for chunk in response.iter_bytes():
                    if self.stop.is_set():
                        raise _Stopped
                    content.write(chunk)
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise _Again(f"the connection broke ({type(error).__name__})") from error

    def _head(self, file: RemoteFile) -> httpx2.Response:
        """The answer that tells of the file itself: not that of a CDN, and not that of a repo under its old name."""
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
        """The answer to a question about a repo."""
        patience = _Patience(f"{repo} at {revision}", self.stop)
        while True:
            try:
                try:
                    return question()
                except hub_errors.HfHubHTTPError as error:
                    raise _of(error, repo, revision) from None
                except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                    raise _Again(f"the Hub cannot be reached ({type(error).__name__})") from error
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise _Again(f"the Hub's answer makes no sense ({type(error).__name__})") from error
            except _Again as error:
                patience.wait(error)


class _Content:
    """The bytes of a file that came so far, with their sums."""

    def __init__(self, file: RemoteFile, out: BinaryIO, moved: Callable[[int], object]) -> None:
        self._file, self._out, self._moved = file, out, moved
        self.size = self.most = 0
        """Bytes that are there now, and that were there at most."""
        self._start_sums()
        out.seek(0)
        while chunk := out.read(_CHUNK):
            self._count(chunk)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Raises _Wrong when there are more than there should be, FetchError when they cannot be stored."""
        try:
            self._out.write(chunk)
        except OSError as error:
            raise FetchError(f"{self._file} cannot be stored: {error.strerror}") from error
        self._count(chunk)
        if self.size > self._file.size:
            raise _Wrong(f"more than the {self._file.size} bytes came that the Hub lists")

    def is_whole(self) -> bool:
        """Raises _Wrong when there are enough bytes, and not those that the Hub lists."""
        if self.size < self._file.size:
            return False
        sums = ("", self._sha256.hexdigest(), self._blob.hexdigest())
        if self.size > self._file.size or self._file.sum not in sums:
            raise _Wrong("what came has another size or sum than the Hub lists")
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


class _Patience:
    """Waits between tries, longer each time, and gives up after several that bring nothing."""

    def __init__(self, what: str, stop: threading.Event) -> None:
        self._what, self._stop = what, stop
        self._tries = 0
        self._most = 0

    def wait(self, reason: _Again, most: int = 0) -> None:
        """`most`: the bytes that came so far. Raises FetchError, _Stopped."""
        if most > self._most:
            self._most, self._tries = most, 0
        self._tries += 1
        if self._tries >= _TRIES:
            raise FetchError(f"{self._what}: {reason}, {self._tries} times in a row; call it again later, and it goes on")
        pause = max(min(_FIRST_PAUSE * 2 ** (self._tries - 1), _LONGEST_PAUSE), min(reason.pause, _LONGEST_DEMAND))
        tqdm.write(f"{self._what}: {reason}; next try in {pause:.1f} s", file=sys.stderr)
        if self._stop.wait(pause):
            raise _Stopped


def _raise_for(response: httpx2.Response, repo: str, revision: str, path: str) -> None:
    """Raises FetchError or _Again for an answer that is none."""
    try:
        hf_raise_for_status(response)
    except hub_errors.HfHubHTTPError as error:
        raise _of(error, repo, revision, path, is_redirected=bool(response.history)) from None
    raise _Again(f"the Hub answered with status {response.status_code}")


def _of(
    error: hub_errors.HfHubHTTPError, repo: str, revision: str, path: str = "", is_redirected: bool = False
) -> FetchError | _Again:
    """What an error of the Hub's means. Never its text, which can hold signed URLs."""
    status = error.response.status_code
    may_pass = status == 416 or not is_refusal(status)
    if may_pass or (is_redirected and not error.response.headers.get("X-Error-Code")):  # a signed URL is good for a while
        return _Again(f"the Hub answered with status {status}", _demanded(error.response.headers))
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
            f"the Hub has no {repo} at revision {revision} to read (status {status}): is it spelled so, and private? Then set "
            "HF_TOKEN to a token that may read it"
        )
    return FetchError(f"the Hub refused {repo}{path and f'/{path}'} at revision {revision} with status {status}")


def _demanded(headers: Mapping[str, str]) -> float:
    """Seconds that the Hub asks to wait: by its rate limit, or by Retry-After with a number or a date."""
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
    """Whether an answer begins at byte `position`, uncompressed."""
    is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
    return (
        is_plain and response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {position}-")
    )


def _identity(file: RepoSibling | RepoFile) -> tuple[int, str]:
    """Size and sum of a listed file; -1 and "" where the listing does not tell them."""
    return (_size(file.lfs.size), _sum(file.lfs.sha256)) if file.lfs else (_size(file.size), _sum(file.blob_id))


def _size(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else -1


def _sum(value: object) -> str:
    return value.lower() if isinstance(value, str) and _SUM.fullmatch(value.lower()) else ""


@dataclass(frozen=True)
class Plan:
    """What a call of this program is to leave in its folder."""

    model_id: str
    files: tuple[RemoteFile, ...]
    listings: Mapping[str, Mapping[str, RemoteFile]]
    """Everything that each repo holds at its commit."""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def make_plan(hub: Hub, spec: ModelSpec, parts: Iterable[str], revisions: Mapping[str, str]) -> Plan:
    """Which files the model needs for `parts`; `revisions`: by repo, main by default. Raises FetchError."""
    parts_of: dict[str, list[str]] = {}
    for part in parts:
        parts_of.setdefault(spec.sources[part].repo, []).append(part)
    files: list[RemoteFile] = []
    listings = {}
    for repo, names in parts_of.items():
        commit, listing = hub.list(repo, revisions.get(repo, "main"))
        listings[repo] = listing
        paths = [path for name in names for path in _paths_of(hub, spec, name, commit, listing)]
        if not spec.needs_toolkit and repo == spec.sources["vae"].repo:
            paths.append(INDEX)
        missing = [path for path in paths if path not in listing]
        if missing:
            raise FetchError(f"{repo} at {commit} lacks what {spec.id} needs: {', '.join(missing)}")
        files += [hub.complete(listing[path]) for path in sorted(set(paths))]
    return Plan(spec.id, tuple(files), listings)


def _paths_of(hub: Hub, spec: ModelSpec, part: str, commit: str, listing: Mapping[str, RemoteFile]) -> list[str]:
    """The paths, in the repo, of the component's files: what the loaders read, and nothing else of its folder."""
    subfolder = spec.sources[part].subfolder
    prefix = f"{subfolder}/" if subfolder else ""
    if part not in STEM_OF:
        paths = [path for path in listing if path.startswith(prefix) and _SMALL_FILE.fullmatch(path.removeprefix(prefix))]
        if not paths:
            raise FetchError(f"{spec.sources[part]} at {commit} holds nothing that {spec.id} can read")
        return paths
    index = f"{prefix}{STEM_OF[part]}.safetensors.index.json"
    with tempfile.TemporaryDirectory() as folder:
        if index in listing:
            with (Path(folder) / Path(index).name).open("w+b") as file:
                hub.fetch(hub.complete(listing[index]), file, lambda _: None)
        try:
            weights = file_names(Path(folder), part)
        except (ValueError, KeyError, TypeError) as error:
            raise FetchError(f"{listing[index]} at {commit} is no index of weights") from error
    return [*(prefix + name for name in ("config.json", *weights)), *([index] if index in listing else [])]


class Checkpoints:
    """The folder that is filled: repos with their manifests, and unfinished files aside."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unfinished = root / ".unfinished"

    def revisions(self, repos: Iterable[str]) -> dict[str, str]:
        """The commit that each repo is at, as far as its manifest tells."""
        manifests = {repo: self._manifest(repo) for repo in repos}
        return {repo: manifest.revision for repo, manifest in manifests.items() if manifest}

    def begin(self, plan: Plan) -> None:
        """Note the commits, and let go of what was fetched at another one and is different at this. Raises FetchError."""
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            for repo in plan.listings:
                (self.root / repo).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(f"--to: the folder cannot be written to: {error.strerror}") from error
        for file in {file.repo: file for file in plan.files}.values():
            before = self._manifest(file.repo)
            kept: dict[str, Entry] = {}
            for path, entry in before.files.items() if before else ():
                listed = plan.listings[file.repo].get(path)
                if (before and before.revision == file.commit) or (listed and listed.sum and self.has(listed)):
                    kept[path] = entry
                else:
                    (self.root / file.repo / path).unlink(missing_ok=True)
            self._write(Manifest(file.repo, file.commit, kept))

    def has(self, file: RemoteFile) -> str | None:
        """The sha256 of the file when it is there and right; else None."""
        path = self.root / file.repo / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            return None
        with path.open("rb") as opened:
            content = _Content(file, opened, lambda _: None)
        try:
            return content.sha256 if content.is_whole() else None
        except _Wrong:
            return None

    def missing_bytes(self, files: Iterable[RemoteFile]) -> int:
        """How much the disk would have to hold beyond what is free."""
        there = {file: self._partial(file) for file in files}
        needed = sum(file.size - (path.stat().st_size if path.is_file() else 0) for file, path in there.items())
        return needed - shutil.disk_usage(self.root).free

    def take(self, file: RemoteFile) -> None:
        """Put the file, which is whole, to its place."""
        path = self.root / file.repo / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._partial(file)
        with suppress(OSError):  # some volumes allow neither
            unfinished.chmod(0o644)
            os.utime(unfinished, (THEN, THEN))
        unfinished.replace(path)

    @contextmanager
    def unfinished(self, file: RemoteFile, stop: threading.Event) -> Iterator[BinaryIO]:
        """The file as far as it came, for this process alone: several workers may fill one volume."""
        path = self._partial(file)
        while True:
            path.parent.mkdir(exist_ok=True)  # another one that has finished takes it away
            with path.open("a+b") as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if stop.wait(0.5):
                        raise _Stopped from None
                    continue
                except OSError:  # a volume without locks: two at once would spoil the file, which its sum shows
                    pass
                if path.exists() and os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                    yield opened
                    return

    def finish(self, plan: Plan, sums: Mapping[RemoteFile, str]) -> None:
        """Write the manifests, clear up, and give every folder the time that the files have. `sums`: sha256 of each file."""
        for repo in plan.listings:
            fetched = {file.path: Entry(file.size, sums[file]) for file in plan.files if file.repo == repo}
            before = self._manifest(repo)
            files = {**(before.files if before else {}), **fetched}
            commit = next(file.commit for file in plan.files if file.repo == repo)
            self._write(Manifest(repo, commit, dict(sorted(files.items()))))
        for leftover in self._unfinished.glob("*"):
            with suppress(OSError), leftover.open("rb") as opened:  # what another process still fills is locked
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        with suppress(OSError):
            self._unfinished.rmdir()
        for folder in {parent for file in plan.files for parent in (self.root / file.repo / file.path).parents}:
            if folder.is_relative_to(self.root) and folder.stat().st_mtime != THEN:
                with suppress(OSError):
                    os.utime(folder, (THEN, THEN))

    def _partial(self, file: RemoteFile) -> Path:
        return self._unfinished / hashlib.sha256(f"{file}@{file.sum or file.commit}".encode()).hexdigest()

    def _manifest(self, repo: str) -> Manifest | None:
        try:
            return Manifest.read(self.root / repo)
        except ValueError:
            return None  # it is written anew

    def _write(self, manifest: Manifest) -> None:
        manifest.write(self.root / manifest.repo)
        os.utime(self.root / manifest.repo / NAME, (THEN, THEN))


def fetch(hub: Hub, plan: Plan, target: Checkpoints) -> int:
    """Have the files of the plan in `target`. Returns how many were fetched. Raises FetchError."""
    target.begin(plan)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        there = dict(zip(plan.files, pool.map(target.has, plan.files), strict=True))
    wanted = [file for file, sha256 in there.items() if sha256 is None]
    sums = {file: sha256 for file, sha256 in there.items() if sha256}
    if (missing := target.missing_bytes(wanted)) > 0:
        raise FetchError(f"--to: the disk lacks {_gigabytes(missing)}: make room, or fetch to another one")

    def fetch_one(file: RemoteFile) -> None:
        with target.unfinished(file, hub.stop) as out:
            if sha256 := target.has(file):  # another process has just fetched it
                progress.moved(file.size)
            else:
                sha256 = hub.fetch(file, out, progress.moved)
                out.flush()
                target.take(file)
        sums[file] = sha256
        progress.done(file)

    with Progress(plan.bytes, plan.bytes - sum(file.size for file in wanted)) as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(fetch_one, file) for file in sorted(wanted, key=lambda file: -file.size)]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            hub.stop.set()
            pool.shutdown(cancel_futures=True)
    failures = [task.exception() for task in tasks if not task.cancelled() and task.exception()]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, _Stopped)):
        assert failure is not None
        raise failure
    target.finish(plan, sums)
    return len(wanted)


class Progress:
    """A bar on a terminal, and plain lines elsewhere, such as in the log of an image build."""

    def __init__(self, total: int, there: int) -> None:
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, initial=there, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self._total, self._there = total, there

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def moved(self, count: int) -> None:
        with self._lock:
            self._there += count
            self._bar.update(count)

    def done(self, file: RemoteFile) -> None:
        if self._bar.disable:
            print(f"{_gigabytes(self._there)} of {_gigabytes(self._total)}: {file}", file=sys.stderr, flush=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB"


def _token() -> str | None:
    """The token, from the environment or the secret file of an image build; None where there is none."""
    token = os.environ.get("HF_TOKEN", "").strip() or (SECRET.read_text().strip() if SECRET.is_file() else "")
    if not re.fullmatch(r"[!-~]*", token):
        raise FetchError("HF_TOKEN is no token: it holds spaces, line ends or other signs")
    return token or None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-id", required=True, choices=MODELS, metavar="ID", help=", ".join(MODELS))
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write DIR/ORG/NAME into")
    parser.add_argument("--parts", metavar="PART,…", help="only these components, such as text_encoder,tokenizer; default: all")
    parser.add_argument(
        "--revision", action="append", default=[], metavar="ORG/NAME=SHA", help="commit, branch or tag of a repo; default: main"
    )
    parser.add_argument("--dry-run", action="store_true", help="say which files, and how large, and fetch nothing")
    parser.add_argument("--json", action="store_true", help="print the files as JSON")
    arguments = parser.parse_args()
    sources = MODELS[arguments.model_id].sources
    arguments.parts = arguments.parts.split(",") if arguments.parts is not None else list(sources)
    for part in arguments.parts:
        if part not in sources:
            parser.error(f"--parts: {arguments.model_id} has no {part!r}, but {', '.join(sources)}")
    pairs = [pair.partition("=") for pair in arguments.revision]
    repos = {source.repo for source in sources.values()}
    for repo, _, revision in pairs:
        if repo not in repos or not revision:
            parser.error(f"--revision takes ORG/NAME=SHA, with ORG/NAME of {', '.join(sorted(repos))}")
    arguments.revisions = {repo: revision for repo, _, revision in pairs}
    return arguments


def main() -> int:
    arguments = _arguments()
    constants.HF_HUB_OFFLINE = False  # an image sets it for the worker; whoever calls this wants the network
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    spec, target = MODELS[arguments.model_id], Checkpoints(arguments.to)
    try:
        hub = Hub(_token())
        repos = {spec.sources[part].repo for part in arguments.parts}
        plan = make_plan(hub, spec, arguments.parts, {**target.revisions(repos), **arguments.revisions})
        fetched = None if arguments.dry_run else fetch(hub, plan, target)
    except FetchError as error:
        print(f"fetch_checkpoints: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fetch_checkpoints: --to: {error.strerror or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_checkpoints: interrupted; call it again and it goes on", file=sys.stderr)
        return 130
    _report(plan, fetched, arguments.json)
    return 0


def _report(plan: Plan, fetched: int | None, as_json: bool) -> None:
    if as_json:
        files = [
            {"repo": file.repo, "revision": file.commit, "path": file.path, "bytes": file.size, "sum": file.sum}
            for file in plan.files
        ]
        content: dict[str, Any] = {"model_id": plan.model_id, "files": files, "bytes": plan.bytes, "fetched": fetched}
        print(json.dumps(content, indent=1))
        return
    commits = {file.repo: file.commit for file in plan.files}
    if fetched is None:
        for file in plan.files:
            print(f"{_gigabytes(file.size):>12}  {file}")
    for repo, commit in commits.items():
        print(f"{repo} at {commit}")
    did = "to fetch" if fetched is None else f"{fetched} fetched, {len(plan.files) - fetched} were there"
    print(f"{plan.model_id}: {len(plan.files)} files, {_gigabytes(plan.bytes)}, {did}")


if __name__ == "__main__":
    sys.exit(main())
