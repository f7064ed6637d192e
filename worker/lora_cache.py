"""A cache of downloaded LoRAs on disk. All workers with the same folder share it, for example on a network volume.

    files/<sha256>.safetensors    each content once, whichever URLs it came from
    urls/<key>.json               the last answer for a URL, and how to ask its server whether that is still current
    locks/<key>                   held by the worker that asks for the URL, so that the others wait and share its answer

The locks are `flock`s and end with their process, however it ends. Files are renamed into place when they are complete. So on a
file system without locks, two workers may download the same file twice, but no one reads an incomplete file.

This module never sees a URL or a token, and stores none: a Source has their checksums.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedRandom
from pathlib import Path
from typing import IO, Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipelines.errors import DISK_FULL, LoraInvalid
from pipelines.lora.file import FileIdentity, LoraFile, identity_of
from worker.errors import Stopped
from worker.files import atomic_write, listed
from worker.logs import log
from worker.net.download import Answer, ServerDown

_CURRENT_SECONDS = 60
"""How long a file counts as current if its server cannot say: jobs that arrive together share one download."""

_ABANDONED_SECONDS = 600
"""A temporary file of this age that nobody holds is abandoned: a running download writes at least once a minute."""

_OLD_LOCK_SECONDS = 24 * 3600
"""A lock file of this age that nobody holds is deleted."""

_IN_USE_SECONDS = 3600
"""How long a file stays after its last use on a file system without locks, where nothing shows whether a job uses it."""

_LOCK_TIMEOUT_SECONDS = 7200
"""How long to wait for a lock. No download takes so long: the holder is gone, and its machine did not release the lock."""

_POLL_SECONDS = 0.1
_WHOLE_CACHE = "cache"
"""The name of the lock to hold while files are added to the cache or deleted from it."""

_TRIES = 3

_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@dataclass(frozen=True)
class Source:
    """A URL as one client requests it."""

    key: str
    """Checksum of what identifies the file: the URL without its signature."""
    request: str
    """Checksum of all that the server decides by: the whole URL and the token. An equal request may share the answer."""
    download: Callable[[IO[bytes], Mapping[str, str]], Answer]
    """Writes the body into a file, unless the validators show the server that the file is still current."""


@dataclass(frozen=True)
class _Record:
    """The last answer for a URL."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: int
    validators: dict[str, str]
    request: str
    """`request` of the Source that was answered."""
    checked: float
    """When the server sent the file or confirmed that it is current, in seconds since the epoch."""

    def answers(self, request: str, asked: float) -> bool:
        """Return whether a request may use the file without asking: an equal request got it while this one waited."""
        since = asked if self.validators else asked - _CURRENT_SECONDS
        return self.request == request and since <= self.checked <= time.time() + _CURRENT_SECONDS


@dataclass(frozen=True)
class _Copy:
    """An open file of the cache. It is in use as long as it is open."""

    record: _Record
    path: Path
    file: IO[bytes]

    @property
    def identity(self) -> FileIdentity:
        return identity_of(os.fstat(self.file.fileno()))


_RECORD = TypeAdapter(_Record)


class LoraCache:
    """The cache in `folder`, for one job. `stop` ends everything that the cache waits for."""

    def __init__(self, folder: Path, max_bytes: int, stop: threading.Event) -> None:
        self._files = folder / "files"
        self._urls = folder / "urls"
        self._locks = folder / "locks"
        self._max_bytes = max_bytes
        self._stop = stop

    def fetch(self, source: Source, held: ExitStack) -> LoraFile:
        """Return the current LoRA of `source`. Download it if necessary. It stays in the cache until `held` is closed.

        Raises LoraInvalid, Stopped, OSError (the folder cannot be used), and what `source.download` raises.
        """
        for folder in (self._files, self._urls, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        asked = time.time()
        damaged: set[FileIdentity] = set()
        for _ in range(_TRIES):
            with ExitStack() as using:
                with self._locked(source.key):
                    copy = self._copy(source.key, using)
                    if copy and copy.identity in damaged:
                        copy = None
                    if not copy or not copy.record.answers(source.request, asked):
                        copy = self._current_copy(source, copy, using)
                if lora := _read_back(copy):
                    _mark_used(copy)
                    held.enter_context(using.pop_all())
                    return lora
                damaged.add(copy.identity)
                _warn("a LoRA in the cache is damaged; it is downloaded again", copy)
        raise OSError(errno.EIO, "the disk returns other bytes than were written")

    def _current_copy(self, source: Source, copy: _Copy | None, using: ExitStack) -> _Copy:
        """Return the server's file, or `copy` if it is still current.

        While the server is down, a client that got the file before may use the copy.
        """
        try:
            return self._download(source, copy, using)
        except ServerDown:
            if not copy or copy.record.request != source.request:
                raise
            _warn("the server of a LoRA does not answer; the copy in the cache is used", copy)
            return copy
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        log.warning("the disk is full; LoRAs that no job uses are deleted from the cache")
        with self._locked(_WHOLE_CACHE):
            self._evict(0)
        return self._download(source, copy, using)

    def _download(self, source: Source, copy: _Copy | None, using: ExitStack) -> _Copy:
        with ExitStack() as own:
            file = own.enter_context(_temporary_file(self._files))
            answer = source.download(file, copy.record.validators if copy else {})
            if copy and answer.status == 304:
                validators = answer.validators or copy.record.validators
                record = replace(copy.record, validators=validators, request=source.request, checked=time.time())
                self._save_record(source.key, record)
                return replace(copy, record=record)
            record = _record_of(file, answer, source.request)
            with self._locked(_WHOLE_CACHE):
                kept = self._copy_of(record, using)
                if not kept or not _read_back(kept):  # keep an intact copy: jobs that use it would see a new version
                    os.fchmod(file.fileno(), 0o644)
                    Path(file.name).replace(self._path(record))
                    _try_lock(file, fcntl.LOCK_SH)
                    using.enter_context(own.pop_all())
                    kept = _Copy(record, self._path(record), file)
                self._save_record(source.key, record)
                self._evict(self._max_bytes)
            return kept

    def _copy(self, key: str, using: ExitStack) -> _Copy | None:
        """Return the last file of the URL, if it still exists."""
        record = self._load_record(key)
        return self._copy_of(record, using) if record else None

    def _copy_of(self, record: _Record, using: ExitStack) -> _Copy | None:
        path = self._path(record)
        file = self._open(path, using)
        return _Copy(record, path, file) if file and os.fstat(file.fileno()).st_size == record.bytes else None

    def _path(self, record: _Record) -> Path:
        return self._files / f"{record.sha256}.safetensors"

    def _load_record(self, key: str) -> _Record | None:
        try:
            return _RECORD.validate_json((self._urls / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _save_record(self, key: str, record: _Record) -> None:
        with atomic_write(self._urls / f"{key}.json") as temporary:
            temporary.write_bytes(_RECORD.dump_json(record))

    def _open(self, path: Path, using: ExitStack) -> IO[bytes] | None:
        """Open the file, and protect it from deletion until `using` is closed. Returns None if the file does not exist."""
        with ExitStack() as own:
            try:
                file = own.enter_context(path.open("rb"))
            except FileNotFoundError:
                return None
            while _try_lock(file, fcntl.LOCK_SH) is False:
                self._pause()
            if not _is_at(path, file):
                return None
            using.enter_context(own.pop_all())
            return file

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, which only one process can hold at a time. Raises Stopped."""
        path = self._locks / name
        give_up_at = time.monotonic() + _LOCK_TIMEOUT_SECONDS
        while True:
            with path.open("ab") as file:  # for writing: NFS requires that for an exclusive lock
                while _try_lock(file, fcntl.LOCK_EX) is False and time.monotonic() < give_up_at:
                    self._pause()
                if _is_at(path, file):
                    os.utime(file.fileno())
                    yield
                    return

    def _pause(self) -> None:
        if self._stop.wait(_POLL_SECONDS):
            raise Stopped

    def _evict(self, max_bytes: int) -> None:
        """Delete the least recently used files until the rest has at most `max_bytes`. Delete abandoned files too."""
        files = [(stat.st_atime_ns, stat.st_size, path) for path, stat in listed(self._files, "*.safetensors")]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= max_bytes:
                break
            total -= size if _delete_unused(path) else 0
        now = time.time()
        for folder, pattern, seconds in (
            (self._files, ".*", _ABANDONED_SECONDS),
            (self._urls, ".*", _ABANDONED_SECONDS),
            (self._locks, "*", _OLD_LOCK_SECONDS),
        ):
            for path, stat in listed(folder, pattern):
                if now - stat.st_mtime > seconds:
                    _delete_unused(path)
        for path in self._urls.glob("[!.]*.json"):
            record = self._load_record(path.stem)
            if not record or not self._path(record).exists():
                path.unlink(missing_ok=True)


def _record_of(file: BufferedRandom, answer: Answer, request: str) -> _Record:
    """Return the record of a LoRA that was just downloaded. Raises LoraInvalid if it is not a LoRA."""
    file.flush()
    os.fsync(file.fileno())  # now at the latest a full disk raises an error; from now on size and mtime stay
    LoraFile.read(Path(file.name))
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _Record(sha256, os.fstat(file.fileno()).st_size, answer.validators, request, time.time())


def _read_back(copy: _Copy) -> LoraFile | None:
    """Return the LoRA; None if the disk returns other bytes than were downloaded. A process hashes a file once."""
    try:
        lora = LoraFile.read(copy.path)
        intact = lora.identity == copy.identity and lora.sha256 == copy.record.sha256
    except (LoraInvalid, OSError):
        return None
    return lora if intact else None


def _warn(text: str, copy: _Copy) -> None:
    log.warning(text, extra={"fields": {"sha256": copy.record.sha256}})


def _mark_used(copy: _Copy) -> None:
    """Set atime to now, as the time of the last use. mtime stays: it shows whether a file was replaced."""
    with suppress(PermissionError):  # another user's file
        os.utime(copy.file.fileno(), ns=(time.time_ns(), os.fstat(copy.file.fileno()).st_mtime_ns))


@contextmanager
def _temporary_file(folder: Path) -> Iterator[BufferedRandom]:
    """Create a file and lock it while it is open. Delete it afterwards, unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    os.close(handle)
    try:
        with Path(name).open("r+b") as file:
            _try_lock(file, fcntl.LOCK_EX)
            yield file
    finally:
        Path(name).unlink(missing_ok=True)


def _try_lock(file: IO[bytes], kind: int) -> bool | None:
    """Try to lock the file until it is closed. Returns whether it is locked; None if the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Return whether the open file is still the one at `path`. It may have been deleted before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _delete_unused(path: Path) -> bool:
    """Delete a file unless somebody has it open. Returns whether it was deleted."""
    try:
        with path.open("r+b") as file:  # for writing: NFS requires that for an exclusive lock
            free = _try_lock(file, fcntl.LOCK_EX)
            if free is None:
                free = time.time() - path.stat().st_atime > _IN_USE_SECONDS
            if free:
                path.unlink()
            return free
    except OSError:  # it is gone, or belongs to another user; no reason to fail a job
        return False
