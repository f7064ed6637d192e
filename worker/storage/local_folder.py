"""Stores files in a local folder, for a worker without a bucket."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from worker.files import atomic_write, inside
from worker.storage.base import Limit, NotStored, Stored


class LocalFolder:
    """Files below OUTPUT_DIR, as file:// URLs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def check(self, limit: Limit) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise NotStored("OUTPUT_DIR cannot be written to; use another folder or a bucket", refused=True) from error

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        target = self._path(key)
        note = self._note(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            note.unlink(missing_ok=True)
            with atomic_write(target) as temporary:
                shutil.copyfile(file, temporary)
            if made_from:
                note.write_text(made_from)
            return self._stored(target, key)
        except OSError as error:
            raise NotStored(f"`{key}` could not be written to OUTPUT_DIR; check its free space", refused=True) from error

    def find(self, key: str, made_from: str, limit: Limit) -> Stored | None:
        target = self._path(key)
        try:
            same = target.is_file() and self._note(target).read_text() == made_from
            return self._stored(target, key) if same else None
        except OSError:  # it may also vanish meanwhile
            return None

    def read(self, key: str, made_from: str, limit: Limit) -> bytes | None:
        try:
            return self._path(key).read_bytes() if self.find(key, made_from, limit) else None
        except OSError:
            return None

    def address(self, key: str, size: int) -> Stored:
        return Stored(self._path(key).as_uri(), key, None, size)

    def _path(self, key: str) -> Path:
        try:
            return inside(self._folder, key)
        except ValueError as error:
            raise NotStored("the key leads out of OUTPUT_DIR", refused=True) from error

    @staticmethod
    def _note(target: Path) -> Path:
        """Return the path of the note with `made_from`. The note is written last: a file without it counts as unfinished."""
        return target.with_name(f".{target.name}.made-from")

    @staticmethod
    def _stored(target: Path, key: str) -> Stored:
        return Stored(target.as_uri(), key, None, target.stat().st_size)
