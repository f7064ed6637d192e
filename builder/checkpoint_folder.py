"""The folder into which checkpoints are downloaded: `ORG/NAME` per repo with a manifest, and unfinished downloads aside.

Several processes, on several machines, can fill one folder at the same time. No torch in this file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from builder import REPRODUCIBLE_MTIME
from builder.hub import RemoteFile, Stopped, verified_sha256
from builder.retry import FetchError
from pipelines.manifest import NAME, Entry, Manifest
from worker.files import inside


class CheckpointFolder:
    """Repos below `root`, each at one commit. A file is moved to its place when it is complete."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unfinished = root / ".unfinished"

    def path_of(self, file: RemoteFile) -> Path:
        """Return the path of a file. Raises FetchError if its name leads out of the repo's folder: a server chose the name."""
        try:
            return inside(self.root / file.repo, file.path)
        except ValueError as error:
            raise FetchError(f"{file.repo} lists {file.path[:100]!r}, and {error}; it is not downloaded") from error

    def revisions(self, repos: Iterable[str]) -> dict[str, str]:
        """Return the commit of each repo that has a manifest."""
        manifests = {repo: self._manifest(repo) for repo in repos}
        return {repo: manifest.revision for repo, manifest in manifests.items() if manifest}

    def begin(self, commits: Mapping[str, str], listings: Mapping[str, Mapping[str, RemoteFile]]) -> None:
        """Write each repo's commit into its manifest, and delete the files of another commit that differ at this one.

        `listings`: all files of each repo at its commit, by path. Raises FetchError when the folder cannot be written to.
        """
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            for repo in commits:
                (self.root / repo).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(f"--to: the folder cannot be written to: {error.strerror}") from error
        for repo, commit in commits.items():
            before = self._manifest(repo) or Manifest(repo, commit, {})
            kept: dict[str, Entry] = {}
            for path, entry in before.files.items():
                listed = listings[repo].get(path)
                if before.revision == commit or (listed and listed.sum and self._is_there(listed)):
                    kept[path] = entry
                else:
                    with suppress(ValueError):  # no name that this folder can have
                        inside(self.root / repo, path).unlink(missing_ok=True)
            self._write(Manifest(repo, commit, kept))

    def entry_of(self, file: RemoteFile) -> Entry | None:
        """Return what is there of the file, if it is whole and as the Hub has it; else None."""
        sha256 = verified_sha256(file, self.path_of(file))
        return Entry(file.size, sha256) if sha256 else None

    def converted_entry_of(self, file: RemoteFile) -> Entry | None:
        """Return what is there of the file, if it is whole, and in bf16 or quantized; else None."""
        path = self.path_of(file)
        manifest = self._manifest(file.repo)
        entry = manifest.files.get(file.path) if manifest else None
        if not entry or not file.sum or entry.converted_from != file.sum or not path.is_file():
            return None
        with path.open("rb") as opened:
            return entry if hashlib.file_digest(opened, "sha256").hexdigest() == entry.sha256 else None

    def _is_there(self, file: RemoteFile) -> bool:
        return bool(self.entry_of(file) or self.converted_entry_of(file))

    def missing_bytes(self, files: Iterable[RemoteFile], kept: float = 1.0) -> int:
        """Return how many bytes too few are free on the disk for the rest of `files`; 0 or less when they fit.

        `kept`: the share of a file that stays at least, when it is converted.
        """
        parts = {file: self._partial(file) for file in files}
        needed = sum(file.size * kept - (path.stat().st_size if path.is_file() else 0) for file, path in parts.items())
        return int(needed) - shutil.disk_usage(self.root).free

    @contextmanager
    def unfinished(self, file: RemoteFile, stop: threading.Event) -> Iterator[BinaryIO]:
        """Open the bytes of the file that are downloaded so far, locked for this process. Raises Stopped."""
        path = self._partial(file)
        while True:
            path.parent.mkdir(exist_ok=True)  # another process removes it when it finishes
            with path.open("a+b") as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if stop.wait(0.5):
                        raise Stopped from None
                    continue
                except OSError:  # a volume without locks: two writers would spoil the file, which its checksum shows
                    pass
                if path.exists() and os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                    yield opened
                    return

    def take(self, file: RemoteFile) -> None:
        """Move the downloaded file, which is complete, to its place."""
        self._take(self._partial(file), self.path_of(file))

    def convert(self, file: RemoteFile, write: Callable[[Path, BinaryIO], str | None], quantized: str = "") -> Entry | None:
        """Replace a file that is in its place by what `write` makes of it; None where that is nothing. Raises FetchError.

        `write`: writes the version to keep, and returns its sha256. `quantized`: its format.
        """
        path, unfinished = self.path_of(file), self._partial(file).with_suffix(".converted")
        unfinished.parent.mkdir(exist_ok=True)
        try:
            with unfinished.open("wb") as out:
                sha256 = write(path, out)
        except ValueError as error:
            raise FetchError(f"{file} cannot be converted: {error}") from error
        if sha256 is None:
            unfinished.unlink()
            return None
        self._take(unfinished, path)
        entry = Entry(path.stat().st_size, sha256, file.sum, quantized)
        self._add(file.repo, file.commit, {file.path: entry})  # at once: only the manifest knows a converted file again
        return entry

    def _add(self, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
        before = self._manifest(repo)
        files = {**(before.files if before else {}), **entries}
        self._write(Manifest(repo, commit, dict(sorted(files.items()))))

    def _take(self, unfinished: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # some volumes allow neither
            unfinished.chmod(0o644)
            os.utime(unfinished, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))
        unfinished.replace(path)

    def finish(self, entries: Mapping[RemoteFile, Entry]) -> None:
        """Write the manifests, delete leftovers, and set the modification time of folders."""
        for repo, commit in {file.repo: file.commit for file in entries}.items():
            self._add(repo, commit, {file.path: entry for file, entry in entries.items() if file.repo == repo})
        for leftover in self._unfinished.glob("*"):
            with suppress(OSError), leftover.open("rb") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where another process still downloads
                leftover.unlink()
        with suppress(OSError):
            self._unfinished.rmdir()
        for folder in {parent for file in entries for parent in self.path_of(file).parents}:
            if folder.is_relative_to(self.root) and folder.stat().st_mtime != REPRODUCIBLE_MTIME:
                with suppress(OSError):
                    os.utime(folder, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))

    def _partial(self, file: RemoteFile) -> Path:
        return self._unfinished / hashlib.sha256(f"{file}@{file.sum or file.commit}".encode()).hexdigest()

    def _manifest(self, repo: str) -> Manifest | None:
        try:
            return Manifest.read(self.root / repo)
        except ValueError:
            return None  # it is damaged, and is written anew

    def _write(self, manifest: Manifest) -> None:
        manifest.write(self.root / manifest.repo)
        os.utime(self.root / manifest.repo / NAME, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))
