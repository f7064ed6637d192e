"""Download the files that a model id needs from the Hugging Face Hub: only these, at one commit per repo, with their checksums.

    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --parts text_encoder,tokenizer
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --dtype bf16
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --quantize qfloat8
    python -m builder.fetch_checkpoints --model-id wan21_1b --to /checkpoints --dry-run
    python -m builder.fetch_checkpoints --model-id wan21_14b --to /checkpoints --draft

The result is `DIR/ORG/NAME` per repo, in the layout of the Hub, with a manifest of what was downloaded. An interrupted
download resumes when the command is run again; files that are there and correct are not downloaded. A repo stays at the
commit in its manifest until `--revision` names another. `--dtype bf16` converts each float32 file after its download: half
the disk, half of what a start reads, and the same bits on a GPU. `--quantize` keeps what a worker with QUANTIZE holds in
memory. `--draft` downloads the distilled LoRAs of the model's drafts and no weights, at the commit of the catalog. The token is
HF_TOKEN, or the file /run/secrets/HF_TOKEN. No torch in this file, which only `--quantize` needs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from builder.checkpoint_folder import CheckpointFolder
from builder.convert import to_bf16
from builder.hub import Hub, RemoteFile, ignore_offline_mode
from builder.retry import FetchError
from pipelines.catalog import MODELS, ModelSpec, Quantize
from pipelines.manifest import Entry
from pipelines.weights import STEM_OF, file_names

if TYPE_CHECKING:
    from builder.quantize import Codes

SECRET = Path("/run/secrets/HF_TOKEN")
FORMATS = [name for name in get_args(Quantize) if name not in ("none", "auto")]
"""In which `--quantize` can keep weights."""

_DOWNLOADS_AT_ONCE = 8
_DOWNLOADS_AT_ONCE_TO_CONVERT = 3
"""Each is on the disk in float32 until it is converted."""
_SMALL_FILE = re.compile(r"[^/]+\.(json|model|txt|jinja)")
"""The files of a component without weights. Its folder can also hold pictures, or the same in another library's format."""


@dataclass(frozen=True)
class Plan:
    """The files that a call of this program is to leave in its folder."""

    model_id: str
    files: tuple[RemoteFile, ...]
    listings: Mapping[str, Mapping[str, RemoteFile]]
    """All files of each repo at its commit, by path."""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def commits(self) -> dict[str, str]:
        return {file.repo: file.commit for file in self.files}


def make_plan(hub: Hub, spec: ModelSpec, parts: Iterable[str], revisions: Mapping[str, str]) -> Plan:
    """Return the files that the model needs for `parts`. `revisions`: by repo; main for the others. Raises FetchError."""
    parts_of: dict[str, list[str]] = {}
    for part in parts:
        parts_of.setdefault(spec.sources[part].repo, []).append(part)
    files: list[RemoteFile] = []
    listings = {}
    for repo, names in parts_of.items():
        commit, listing = hub.files_at(repo, revisions.get(repo, "main"))
        listings[repo] = listing
        paths = [path for name in names for path in _paths_of(hub, spec, name, commit, listing)]
        if not spec.needs_toolkit and repo == spec.sources["vae"].repo:
            paths.append("model_index.json")
        missing = [path for path in paths if path not in listing]
        if missing:
            raise FetchError(f"{repo} at {commit} lacks what {spec.id} needs: {', '.join(missing)}")
        files += [hub.complete(listing[path]) for path in sorted(set(paths))]
    return Plan(spec.id, tuple(files), listings)


def make_draft_plan(hub: Hub, spec: ModelSpec, revisions: Mapping[str, str]) -> Plan:
    """Return the distilled LoRAs that the model's drafts need. `revisions`: by repo; the recipe's for the others.

    Raises FetchError, also for a model without a recipe.
    """
    if spec.draft is None:
        with_one = ", ".join(other.id for other in MODELS.values() if other.draft)
        raise FetchError(f"--draft: there is no few-step recipe for {spec.id}, but for {with_one}")
    wanted = {lora.repo: revisions.get(lora.repo, lora.commit) for lora in spec.draft.loras}
    listings = {repo: hub.files_at(repo, revision)[1] for repo, revision in wanted.items()}
    for lora in spec.draft.loras:
        if lora.path not in listings[lora.repo]:
            raise FetchError(f"{lora.repo} at {wanted[lora.repo]} lacks what drafts of {spec.id} need: {lora.path}")
    return Plan(spec.id, tuple(hub.complete(listings[lora.repo][lora.path]) for lora in spec.draft.loras), listings)


def _paths_of(hub: Hub, spec: ModelSpec, part: str, commit: str, listing: Mapping[str, RemoteFile]) -> list[str]:
    """Return the paths in the repo of the files that the loaders read of a component."""
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
                hub.download(hub.complete(listing[index]), file, lambda _: None)
        try:
            weights = file_names(Path(folder), part)
        except (ValueError, KeyError, TypeError) as error:
            raise FetchError(f"{listing[index]} at {commit} is not an index of weights") from error
    return [*(prefix + name for name in ("config.json", *weights)), *([index] if index in listing else [])]


def fetch(hub: Hub, plan: Plan, folder: CheckpointFolder, as_bf16: bool = False, quantize: str | None = None) -> int:
    """Download the files of the plan that are not in `folder`, and return how many they were. Raises FetchError.

    `as_bf16`: float32 weights are kept in bf16. `quantize`: linear layers are kept as codes of this format, the rest in bf16.
    """
    folder.begin(plan.commits, plan.listings)
    codes = _codes_of(plan, quantize) if quantize else {}

    def there(file: RemoteFile) -> Entry | None:
        entry = folder.converted_entry_of(file) if as_bf16 or quantize else None
        # What is in bf16 can still be quantized.
        return (
            entry if entry and entry.quantized in ("", codes[file].format if file in codes else "") else folder.entry_of(file)
        )

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        found = list(pool.map(there, plan.files))
    entries = {file: entry for file, entry in zip(plan.files, found, strict=True) if entry}
    wanted = [file for file in plan.files if file not in entries]
    if (missing := folder.missing_bytes(wanted, 0.25 if quantize else 0.5 if as_bf16 else 1.0)) > 0:
        raise FetchError(f"--to: the disk lacks {_gigabytes(missing)}: free some space, or download to another disk")

    def fetch_one(file: RemoteFile) -> None:
        with folder.unfinished(file, hub.stop) as out:
            if entry := there(file):  # another process has just downloaded it
                progress.add(file.size)
            else:
                entry = Entry(file.size, hub.download(file, out, progress.add))
                out.flush()
                folder.take(file)
            keep(file, entry)
        progress.print_finished(file)

    def keep(file: RemoteFile, entry: Entry) -> None:
        with one_at_a_time:  # it is on the disk twice then
            if file in codes and not entry.quantized:
                entry = folder.convert(file, codes[file].write, codes[file].format) or entry
            elif (as_bf16 or quantize) and not entry.converted_from and file.path.endswith(".safetensors"):
                entry = folder.convert(file, to_bf16) or entry
        entries[file] = entry

    one_at_a_time = threading.Lock()
    downloads = _DOWNLOADS_AT_ONCE_TO_CONVERT if as_bf16 or quantize else _DOWNLOADS_AT_ONCE
    already_there = plan.bytes - sum(file.size for file in wanted)
    with closing(ProgressBar(plan.bytes, already_there)) as progress, ThreadPoolExecutor(downloads) as pool:
        tasks = [pool.submit(fetch_one, file) for file in sorted(wanted, key=lambda file: -file.size)]
        try:
            for task in as_completed(tasks):
                task.result()
        finally:
            hub.stop.set()
            pool.shutdown(cancel_futures=True)
    for file, entry in list(entries.items()):
        keep(file, entry)  # what was there already, as the Hub has it
    folder.finish(entries)
    return len(wanted)


def _codes_of(plan: Plan, quantize: str) -> dict[RemoteFile, Codes]:
    """How each file of the plan with linear layers is quantized. Raises FetchError."""
    try:
        from builder.quantize import Codes
    except ModuleNotFoundError as error:
        raise FetchError(f"--quantize needs {error.name}, as the worker does; run the command where the worker runs") from None
    spec, found = MODELS[plan.model_id], {}
    for file in plan.files:
        for part in (*spec.transformers, "text_encoder"):
            source = spec.sources[part]
            if file.repo == source.repo and re.fullmatch(rf"{source.subfolder}/[^/]+\.safetensors", file.path):
                found[file] = Codes(spec, part, quantize)
    return found


class ProgressBar:
    """A bar on a terminal, and plain lines elsewhere, such as in the log of an image build."""

    def __init__(self, total: int, already_there: int) -> None:
        """Both in bytes."""
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, initial=already_there, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self._total, self._there = total, already_there

    def add(self, count: int) -> None:
        with self._lock:
            self._there += count
            self._bar.update(count)

    def print_finished(self, file: RemoteFile) -> None:
        if self._bar.disable:
            print(f"{_gigabytes(self._there)} of {_gigabytes(self._total)}: {file}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB"


def _token() -> str | None:
    """Return the token from the environment or the secret file of an image build; None where there is none."""
    token = os.environ.get("HF_TOKEN", "").strip() or (SECRET.read_text().strip() if SECRET.is_file() else "")
    if not re.fullmatch(r"[!-~]*", token):
        raise FetchError("HF_TOKEN is not a token: it holds spaces, line ends or other characters that a token cannot have")
    return token or None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m builder.fetch_checkpoints", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model-id", required=True, choices=MODELS, metavar="ID", help=", ".join(MODELS))
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write DIR/ORG/NAME into")
    parser.add_argument("--parts", metavar="PART,…", help="only these components, such as text_encoder,tokenizer; default: all")
    parser.add_argument(
        "--revision", action="append", default=[], metavar="ORG/NAME=SHA", help="commit, branch or tag of a repo; default: main"
    )
    parser.add_argument(
        "--dtype", choices=["original", "bf16"], default="original", help="bf16: keep float32 weights as a GPU worker uses them"
    )
    parser.add_argument(
        "--quantize",
        choices=FORMATS,
        metavar="FORMAT",
        help="keep transformers and text encoder as codes, for a worker with this QUANTIZE, and the rest in bf16; needs torch",
    )
    parser.add_argument(
        "--draft", action="store_true", help="the distilled LoRAs of the model's drafts, and no weights (up to 1.4 GB)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print which files, and how large, and download nothing")
    parser.add_argument("--json", action="store_true", help="print the files as JSON")
    arguments = parser.parse_args()
    spec = MODELS[arguments.model_id]
    sources = spec.sources
    if arguments.draft and (arguments.parts is not None or arguments.dtype != "original" or arguments.quantize):
        parser.error("--draft does not go with --parts, --dtype or --quantize: it downloads no weights")
    arguments.parts = arguments.parts.split(",") if arguments.parts is not None else list(sources)
    for part in arguments.parts:
        if part not in sources:
            parser.error(f"--parts: {arguments.model_id} has no {part!r}, but {', '.join(sources)}")
    pairs = [pair.partition("=") for pair in arguments.revision]
    repos = {source.repo for source in sources.values()}
    if arguments.draft:
        repos = {lora.repo for lora in spec.draft.loras} if spec.draft else repos
    for repo, _, revision in pairs:
        if repo not in repos or not revision:
            parser.error(f"--revision takes ORG/NAME=SHA, with ORG/NAME of {', '.join(sorted(repos))}")
    arguments.revisions = {repo: revision for repo, _, revision in pairs}
    return arguments


def main() -> int:
    arguments = _arguments()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    spec, folder = MODELS[arguments.model_id], CheckpointFolder(arguments.to)
    try:
        ignore_offline_mode()
        hub = Hub(_token())
        if arguments.draft:
            plan = make_draft_plan(hub, spec, arguments.revisions)
        else:
            repos = {spec.sources[part].repo for part in arguments.parts}
            plan = make_plan(hub, spec, arguments.parts, folder.revisions(repos) | arguments.revisions)
        fetched = None if arguments.dry_run else fetch(hub, plan, folder, arguments.dtype == "bf16", arguments.quantize)
    except FetchError as error:
        print(f"fetch_checkpoints: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fetch_checkpoints: --to: {error.strerror or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_checkpoints: interrupted; run the command again to resume", file=sys.stderr)
        return 130
    _report(plan, fetched, arguments.json)
    return 0


def _report(plan: Plan, fetched: int | None, as_json: bool) -> None:
    """Print the result. `fetched`: how many files were downloaded; None after a dry run."""
    if as_json:
        files = [
            {"repo": file.repo, "revision": file.commit, "path": file.path, "bytes": file.size, "sum": file.sum}
            for file in plan.files
        ]
        content: dict[str, Any] = {"model_id": plan.model_id, "files": files, "bytes": plan.bytes, "fetched": fetched}
        print(json.dumps(content, indent=1))
        return
    if fetched is None:
        for file in plan.files:
            print(f"{_gigabytes(file.size):>12}  {file}")
    for repo, commit in plan.commits.items():
        print(f"{repo} at {commit}")
    result = "to fetch" if fetched is None else f"{fetched} fetched, {len(plan.files) - fetched} were there"
    print(f"{plan.model_id}: {len(plan.files)} files, {_gigabytes(plan.bytes)}, {result}")


if __name__ == "__main__":
    sys.exit(main())
