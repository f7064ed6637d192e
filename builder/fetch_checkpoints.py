"""Download the files that a model id needs from the Hugging Face Hub: only these, at one commit per repo, with checked sums.

    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --parts text_encoder,tokenizer
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --dry-run

writes `DIR/ORG/NAME` per repo, in the layout of the Hub, with a manifest of the files. Run it again after an interruption: it
resumes from the bytes that are there, and does not download what is there and right. A repo stays at the commit of its manifest
until `--revision` names another. The token is HF_TOKEN, or the file /run/secrets/HF_TOKEN. No torch in this file.
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
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import constants
from tqdm import tqdm

from builder import REPRODUCIBLE_MTIME
from builder.hub import FetchError, Hub, PartialFile, RemoteFile, Stopped, WrongContent
from pipelines.catalog import MODELS, ModelSpec
from pipelines.manifest import NAME, Entry, Manifest
from pipelines.weights import STEM_OF, file_names

SECRET = Path("/run/secrets/HF_TOKEN")
INDEX = "model_index.json"

_AT_ONCE = 8
_SMALL_FILE = re.compile(r"[^/]+\.(json|model|txt|jinja)")
"""The files of a component without weights; its folder can also hold pictures, or other libraries' formats."""


@dataclass(frozen=True)
class Plan:
    """The files that one run of this program leaves in its folder."""

    model_id: str
    files: tuple[RemoteFile, ...]
    listings: Mapping[str, Mapping[str, RemoteFile]]
    """All files of each repo at its commit, by their path."""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def make_plan(hub: Hub, spec: ModelSpec, parts: Iterable[str], revisions: Mapping[str, str]) -> Plan:
    """Find the files that the model needs for `parts`. `revisions`: by repo, main by default. Raises FetchError."""
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
    """The paths of the component's files in the repo: those that the loaders read, and nothing else of its folder."""
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


class CheckpointFolder:
    """The target folder: repos with their manifests, and unfinished downloads beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unfinished = root / ".unfinished"

    def revisions(self, repos: Iterable[str]) -> dict[str, str]:
        """The commit of each repo that has a manifest."""
        manifests = {repo: self._manifest(repo) for repo in repos}
        return {repo: manifest.revision for repo, manifest in manifests.items() if manifest}

    def begin(self, plan: Plan) -> None:
        """Write down the commits, and delete files of other commits that are different at these. Raises FetchError."""
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
        """The sha256 of the file if it is there and right, else None."""
        path = self.root / file.repo / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            return None
        with path.open("rb") as opened:
            content = PartialFile(file, opened, lambda _: None)
        try:
            return content.sha256 if content.is_whole() else None
        except WrongContent:
            return None

    def missing_bytes(self, files: Iterable[RemoteFile]) -> int:
        """The bytes by which the free disk space is too small."""
        there = {file: self._partial(file) for file in files}
        needed = sum(file.size - (path.stat().st_size if path.is_file() else 0) for file, path in there.items())
        return needed - shutil.disk_usage(self.root).free

    def take(self, file: RemoteFile) -> None:
        """Move the complete file to its place."""
        path = self.root / file.repo / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._partial(file)
        with suppress(OSError):  # some volumes allow neither
            unfinished.chmod(0o644)
            os.utime(unfinished, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))
        unfinished.replace(path)

    @contextmanager
    def unfinished(self, file: RemoteFile, stop: threading.Event) -> Iterator[BinaryIO]:
        """The unfinished download, locked for this process: several workers may fill one volume."""
        path = self._partial(file)
        while True:
            path.parent.mkdir(exist_ok=True)  # another process that has finished deletes it
            with path.open("a+b") as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if stop.wait(0.5):
                        raise Stopped from None
                    continue
                except OSError:  # a volume without locks: two at once would spoil the file, which its sum shows
                    pass
                if path.exists() and os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                    yield opened
                    return

    def finish(self, plan: Plan, sums: Mapping[RemoteFile, str]) -> None:
        """Write the manifests, clean up, and give every folder the mtime of the files. `sums`: the sha256 of each file."""
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
            if folder.is_relative_to(self.root) and folder.stat().st_mtime != REPRODUCIBLE_MTIME:
                with suppress(OSError):
                    os.utime(folder, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))

    def _partial(self, file: RemoteFile) -> Path:
        return self._unfinished / hashlib.sha256(f"{file}@{file.sum or file.commit}".encode()).hexdigest()

    def _manifest(self, repo: str) -> Manifest | None:
        try:
            return Manifest.read(self.root / repo)
        except ValueError:
            return None  # a new one is written

    def _write(self, manifest: Manifest) -> None:
        manifest.write(self.root / manifest.repo)
        os.utime(self.root / manifest.repo / NAME, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME))


def fetch(hub: Hub, plan: Plan, target: CheckpointFolder) -> int:
    """Download the files of the plan that are missing in `target`. Returns how many. Raises FetchError."""
    target.begin(plan)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        there = dict(zip(plan.files, pool.map(target.has, plan.files), strict=True))
    wanted = [file for file, sha256 in there.items() if sha256 is None]
    sums = {file: sha256 for file, sha256 in there.items() if sha256}
    if (missing := target.missing_bytes(wanted)) > 0:
        raise FetchError(f"--to: the disk lacks {_gigabytes(missing)}: free some space, or use another --to")

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

    with (
        ProgressBar(plan.bytes, plan.bytes - sum(file.size for file in wanted)) as progress,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        tasks = [pool.submit(fetch_one, file) for file in sorted(wanted, key=lambda file: -file.size)]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            hub.stop.set()
            pool.shutdown(cancel_futures=True)
    failures = [task.exception() for task in tasks if not task.cancelled() and task.exception()]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
        assert failure is not None
        raise failure
    target.finish(plan, sums)
    return len(wanted)


class ProgressBar:
    """A bar on a terminal, and plain lines elsewhere, such as in the log of an image build."""

    def __init__(self, total: int, there: int) -> None:
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, initial=there, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self._total, self._there = total, there

    def __enter__(self) -> ProgressBar:
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
        raise FetchError("HF_TOKEN is not a token: it contains spaces, line ends or other characters")
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
    constants.HF_HUB_OFFLINE = False  # the image sets it for the worker; a download needs the network
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    spec, target = MODELS[arguments.model_id], CheckpointFolder(arguments.to)
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
