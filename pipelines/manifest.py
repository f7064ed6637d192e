"""What a checkpoint folder must hold: the manifest that is written when its files are fetched. No torch in this file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAME = "worker-wan-lora.manifest.json"
"""The manifest's file name, in the folder of a repo."""


@dataclass(frozen=True)
class Entry:
    """Size in bytes, and sha256 in hexadecimal digits."""

    bytes: int
    sha256: str
    converted_from: str = ""
    """The Hub's checksum of the file of which this is the bf16 or quantized version; "" for a file as the Hub has it."""
    quantized: str = ""
    """The format of its codes; "" for a file without."""


@dataclass(frozen=True)
class Manifest:
    """The files of one repo at one revision, by their path in it."""

    repo: str
    revision: str
    files: Mapping[str, Entry]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of the repo in `folder`; None where there is none. Raises ValueError when it cannot be read."""
        file = folder / NAME
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text())
            entries = {path: Entry(**entry) for path, entry in content["files"].items()}
            return cls(content["repo"], content["revision"], entries)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{NAME} is damaged") from error

    @classmethod
    def of(cls, folder: Path, repo: str, revision: str) -> Manifest:
        """A manifest of everything that lies in `folder`, sums included."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
        entries = {}
        for path in files:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries[path.relative_to(folder).as_posix()] = Entry(path.stat().st_size, sha256)
        return cls(repo, revision, entries)

    def write(self, folder: Path) -> None:
        files = {
            path: {name: value for name, value in vars(entry).items() if value != ""} for path, entry in self.files.items()
        }
        content = {"repo": self.repo, "revision": self.revision, "files": files}
        unfinished = folder / f"{NAME}.{os.getpid()}"  # several workers may share the folder
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(folder / NAME)

    def not_as_listed(self, folder: Path, subfolder: str) -> list[str]:
        """The files of `subfolder` ("" is the whole repo) that are missing or of another size, by their path in the repo.

        Sums are not taken: at start, that would take longer than loading the model.
        """
        wanted = {path: entry for path, entry in self.files.items() if path.startswith(f"{subfolder}/" if subfolder else "")}
        return [path for path, entry in wanted.items() if _size(folder / path) != entry.bytes]


def _size(file: Path) -> int:
    """In bytes; -1 when there is no such file."""
    return file.stat().st_size if file.is_file() else -1
