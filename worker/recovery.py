"""RECOVERY_DIR: keeps finished files that could not be uploaded, until they can be.

A kept file is a pair of files: `NAME.bin`, and `NAME.json`, a note that says where it belongs. The note is written last, and a
`.bin` without a note does not count. Several workers may share the folder. In a shared temp folder, strangers may write to it
too, so every note is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from worker.errors import Stopped
from worker.files import atomic_write, inside, listed
from worker.logs import log
from worker.storage.base import Limit, NotStored, Storage

_SECONDS_A_JOB_CAN_RECUR = 7 * 24 * 3600
"""RunPod keeps a job for 24 hours, or for up to a week if the request's `policy.ttl` says so."""
_SECONDS_ABANDONED = 3600
"""Age at which nobody is still writing an incomplete pair."""
_MAX_NOTE = 10_000
"""Bytes. A note has a few hundred."""


@dataclass(frozen=True)
class Kept:
    """Where a kept file belongs. `own`: in the worker's own bucket, so that any worker can upload it."""

    key: str
    content_type: str
    made_from: str
    own: bool


_KEPT = TypeAdapter(Kept)


class Recovery:
    """The folder. The first kept file creates it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: the largest size of the folder; see RECOVERY_MAX_BYTES."""
        self._folder = folder
        self._max_bytes = max_bytes

    def keep(self, file: Path, kept: Kept) -> bool:
        """Copy `file` into the folder. Returns False if that fails, or if the folder is full."""
        note = self._note(kept.key)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._make_room(file.stat().st_size):
                log.error("`%s` could not be kept: RECOVERY_DIR has RECOVERY_MAX_BYTES already", kept.key)
                return False
            with atomic_write(note.with_suffix(".bin")) as temporary:
                _link_or_copy(file, temporary)
            with atomic_write(note) as temporary:
                temporary.write_text(json.dumps(asdict(kept)))
        except OSError:
            log.exception("`%s` could not be kept in RECOVERY_DIR", kept.key)
            return False
        return True

    def find(self, key: str, made_from: str) -> Path | None:
        """Return the kept file of `key`, if it was made from the same job and input."""
        kept = self._read(self._note(key))
        return self._note(key).with_suffix(".bin") if kept and kept.made_from == made_from else None

    def delete(self, key: str) -> None:
        """Delete the kept file of `key`, if there is one. An error of the folder is only logged."""
        note = self._note(key)
        try:
            note.unlink(missing_ok=True)
            note.with_suffix(".bin").unlink(missing_ok=True)
        except OSError:
            log.exception("`%s` could not be deleted from RECOVERY_DIR", key)

    def upload_all(self, storage: Storage) -> None:
        """Upload every file of the worker's own bucket, then delete it. A file that fails stays for the next start.

        Files of a job's own bucket wait for that job. They are deleted when RunPod can no longer deliver it.
        """
        self._delete_incomplete()
        for note, kept in self._notes():
            try:
                if kept.own:
                    storage.put(note.with_suffix(".bin"), kept.key, kept.content_type, kept.made_from, Limit(threading.Event()))
                elif time.time() - note.stat().st_mtime < _SECONDS_A_JOB_CAN_RECUR:
                    continue
            except (NotStored, Stopped, OSError) as error:
                log.warning("`%s` is still kept in RECOVERY_DIR (%s)", kept.key, type(error).__name__)
            else:
                self.delete(kept.key)
                log.info("`%s` was %s", kept.key, "uploaded from RECOVERY_DIR" if kept.own else "deleted: its job is too old")

    def _make_room(self, size: int) -> bool:
        """Make room for so many bytes: delete files of jobs' own buckets, the oldest first. Returns whether they fit."""
        there = [(stat.st_mtime, stat.st_size, path) for path, stat in listed(self._folder, "*.bin")]
        total = sum(size for _, size, _ in there) + size
        if total <= self._max_bytes:
            return True
        of_jobs = {note.with_suffix(".bin") for note, kept in self._notes() if not kept.own}
        for _, bytes_of, path in sorted(there):
            if total <= self._max_bytes:
                break
            if path in of_jobs:
                log.warning("a kept file of a job's own bucket is deleted: RECOVERY_DIR has RECOVERY_MAX_BYTES")
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                total -= bytes_of
        return total <= self._max_bytes

    def _delete_incomplete(self) -> None:
        """Delete what a killed process left: temporary files, and files without a note."""
        for path in (*self._folder.glob(".*"), *self._folder.glob("*.bin")):
            with suppress(OSError):
                is_whole = path.suffix == ".bin" and path.with_suffix(".json").exists()
                if not is_whole and time.time() - path.stat().st_mtime > _SECONDS_ABANDONED:
                    path.unlink()

    def _notes(self) -> Iterator[tuple[Path, Kept]]:
        """Yield every note that passes the checks, with its content."""
        for note in sorted(self._folder.glob("*.json")):
            if kept := self._read(note):
                yield note, kept

    def _note(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _read(self, note: Path) -> Kept | None:
        """Return the content of a note. None if no worker wrote it: a wrong or unsafe key, or a link."""
        try:
            if note.is_symlink() or note.with_suffix(".bin").is_symlink() or note.stat().st_size > _MAX_NOTE:
                return None
            kept = _KEPT.validate_json(note.read_bytes(), strict=True)
            inside(self._folder, kept.key)
        except (OSError, ValidationError, ValueError):
            return None
        return kept if note == self._note(kept.key) else None


def _link_or_copy(file: Path, target: Path) -> None:
    """Make `target` a hard link to `file`, which no one changes any more, or a copy if it is on another file system."""
    target.unlink()
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
