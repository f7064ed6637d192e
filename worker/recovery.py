"""Finished files that no bucket took: kept in RECOVERY_DIR until one does.

A kept file is two: `NAME.bin`, and `NAME.json` with where it belongs, which is written last and makes it count. Several workers
may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from worker.files import atomic_write
from worker.logs import log
from worker.storage import NotStored, Storage


@dataclass(frozen=True)
class Kept:
    """Where a kept file belongs. `own`: in the worker's own bucket, so that any worker can bring it there."""

    key: str
    content_type: str
    made_from: str
    own: bool


class Recovery:
    """The folder. It is made when the first file is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, file: Path, kept: Kept) -> bool:
        """Copy `file` here. False when that is not possible either."""
        note = self._note(kept.key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(note.with_suffix(".bin")) as temporary:
                shutil.copyfile(file, temporary)
            with atomic_write(note) as temporary:
                temporary.write_text(json.dumps(asdict(kept)))
        except OSError:
            log.exception("RECOVERY_DIR did not take `%s`", kept.key)
            return False
        return True

    def find(self, key: str, made_from: str) -> Path | None:
        """The file that was kept for `key`, when it was made from the same."""
        kept = self._read(self._note(key))
        return self._note(key).with_suffix(".bin") if kept and kept.made_from == made_from else None

    def forget(self, key: str) -> None:
        note = self._note(key)
        note.unlink(missing_ok=True)
        note.with_suffix(".bin").unlink(missing_ok=True)

    def send_all(self, storage: Storage) -> None:
        """Bring every file of the worker's own bucket there; what is not taken stays for the next time."""
        for kept in self._all():
            file = self._note(kept.key).with_suffix(".bin")
            if not kept.own:
                continue
            try:
                storage.put(file, kept.key, kept.content_type, kept.made_from)
            except (NotStored, OSError) as error:
                log.warning("`%s` is still kept in RECOVERY_DIR (%s)", kept.key, type(error).__name__)
            else:
                self.forget(kept.key)
                log.info("`%s` was brought from RECOVERY_DIR to the bucket", kept.key)

    def _all(self) -> Iterator[Kept]:
        for note in sorted(self._folder.glob("*.json")):
            if kept := self._read(note):
                yield kept

    def _note(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    @staticmethod
    def _read(note: Path) -> Kept | None:
        try:
            return Kept(**json.loads(note.read_text()))
        except (OSError, ValueError, TypeError):
            return None
