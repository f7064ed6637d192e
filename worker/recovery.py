"""RECOVERY_DIR: finished files that could not be uploaded, kept until they can.

A kept file is two files: `NAME.bin`, and `NAME.json`, which says where it belongs. The second is written last, and a `.bin`
without it does not count. Several workers may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from worker.files import atomic_write
from worker.logs import log
from worker.storage import NotStored, Storage

_SECONDS_A_JOB_CAN_RECUR = 7 * 24 * 3600
"""RunPod keeps a job for 24 hours, or for up to a week where the request's `policy.ttl` says so."""


@dataclass(frozen=True)
class Kept:
    """Where a kept file belongs. `own`: in the worker's own bucket, so that any worker can upload it."""

    key: str
    content_type: str
    made_from: str
    own: bool


class Recovery:
    """The folder. The first kept file creates it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, file: Path, kept: Kept) -> bool:
        """Copy `file` into the folder. False when that fails too."""
        note = self._note(kept.key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(note.with_suffix(".bin")) as temporary:
                shutil.copyfile(file, temporary)
            with atomic_write(note) as temporary:
                temporary.write_text(json.dumps(asdict(kept)))
        except OSError:
            log.exception("`%s` could not be kept in RECOVERY_DIR", kept.key)
            return False
        return True

    def find(self, key: str, made_from: str) -> Path | None:
        """The kept file of `key`, if it was made from the same."""
        kept = self._read(self._note(key))
        return self._note(key).with_suffix(".bin") if kept and kept.made_from == made_from else None

    def delete(self, key: str) -> None:
        """Delete the kept file of `key`, if there is one. A folder that cannot be written to is only logged."""
        note = self._note(key)
        try:
            note.unlink(missing_ok=True)
            note.with_suffix(".bin").unlink(missing_ok=True)
        except OSError:
            log.exception("`%s` could not be deleted from RECOVERY_DIR", key)

    def upload_all(self, storage: Storage) -> None:
        """Upload every file of the worker's own bucket, and delete it. What fails stays for the next start.

        Files of a job's own bucket wait for that job. They are deleted when it can no longer come.
        """
        for note in sorted(self._folder.glob("*.json")):
            kept = self._read(note)
            if kept is None:
                continue
            try:
                if kept.own:
                    storage.put(note.with_suffix(".bin"), kept.key, kept.content_type, kept.made_from)
                elif time.time() - note.stat().st_mtime < _SECONDS_A_JOB_CAN_RECUR:
                    continue
            except (NotStored, OSError) as error:
                log.warning("`%s` is still kept in RECOVERY_DIR (%s)", kept.key, type(error).__name__)
            else:
                self.delete(kept.key)
                log.info("`%s` was %s", kept.key, "uploaded from RECOVERY_DIR" if kept.own else "deleted: its job is too old")

    def _note(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    @staticmethod
    def _read(note: Path) -> Kept | None:
        try:
            return Kept(**json.loads(note.read_text()))
        except (OSError, ValueError, TypeError):
            return None
