"""Distribute one model's checkpoints over the layers of the image. Runs while the image is built; no torch in this file.

    python -m builder.bake GROUP --model-id ID         downloads the parts of one group from the Hub
    python -m builder.bake draft --model-id ID         downloads the distilled LoRAs of its drafts, if it has any
    python -m builder.bake all --model-id ID --from DIR    takes all parts from a folder with `ORG/NAME` per repo

The repos stay as they are in CHECKPOINTS, but their weights become links to `WEIGHTS/GROUP/SLOT/SHA256`. Each slot is one
layer, and holds only weights, named by their content: two models whose text encoders are the same bytes share these layers,
whatever their repos are called and whatever their small files contain. There are several slots, since some registries accept
no layer above 10 GB, and layers are pulled in parallel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builder import REPRODUCIBLE_MTIME
from builder.fetch_checkpoints import FORMATS
from pipelines.catalog import MODELS, ModelSpec
from pipelines.manifest import Manifest

CHECKPOINTS = Path("/checkpoints")
WEIGHTS = Path("/weights")


@dataclass(frozen=True)
class Group:
    """Components whose weights get layers of their own."""

    parts: tuple[str, ...]
    slots: int = 1
    """One per 10 GB of the largest checkpoint: a 14B transformer in float32 has 57 GB, its text encoder 23 GB."""

    def folders(self, name: str) -> list[Path]:
        return [WEIGHTS / name] if self.slots == 1 else [WEIGHTS / name / str(slot) for slot in range(self.slots)]


GROUPS = {
    "text": Group(("text_encoder", "tokenizer"), slots=3),
    "vae": Group(("vae", "scheduler")),
    "image": Group(("image_encoder", "image_processor")),
    "transformer": Group(("transformer",), slots=7),
    "transformer_2": Group(("transformer_2",), slots=4),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m builder.bake", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("group", choices=[*GROUPS, "draft", "all"])
    parser.add_argument("--model-id", required=True, metavar="ID")
    parser.add_argument("--from", type=Path, metavar="DIR", dest="source", help="a folder to take the repos from, not the Hub")
    parser.add_argument("--revisions", default="", metavar="REPO=SHA,…", help="Hub commits to download; main for other repos")
    parser.add_argument(
        "--dtype", choices=["original", "bf16"], default="bf16", help="of weights from the Hub; default: %(default)s"
    )
    parser.add_argument(
        "--quantize",
        default="",
        metavar="FORMAT",
        help="keep weights from the Hub as codes, and the rest in bf16; needs torch",
    )
    arguments = parser.parse_args()
    if arguments.quantize and arguments.quantize not in FORMATS:
        parser.error(f"QUANTIZE {arguments.quantize!r} is not a format; build with one of {', '.join(FORMATS)}, or without it")
    if arguments.model_id not in MODELS:
        parser.error(f"MODEL_ID {arguments.model_id!r} is not a model id; build with one of {', '.join(MODELS)}")
    spec = MODELS[arguments.model_id]
    if arguments.group == "draft":
        if spec.draft:
            fetch(spec, {lora.repo for lora in spec.draft.loras}, arguments.revisions, "--draft")
        set_mtimes(CHECKPOINTS)
        return 0
    groups = {arguments.group: GROUPS[arguments.group]} if arguments.group in GROUPS else GROUPS
    parts = [part for group in groups.values() for part in group.parts if part in spec.sources]
    if arguments.source:
        copy(spec, arguments.source)
    elif parts:
        repos = {spec.sources[part].repo for part in parts}
        kept = ["--quantize", arguments.quantize] if arguments.quantize else ["--dtype", arguments.dtype]
        fetch(spec, repos, arguments.revisions, "--parts", ",".join(parts), *kept)
    for name, group in groups.items():
        spread(spec, name, group)
        set_mtimes(WEIGHTS / name)
    set_mtimes(CHECKPOINTS)
    return 0


def fetch(spec: ModelSpec, repos: set[str], revisions: str, *what: str) -> None:
    """Download to CHECKPOINTS what the options `what` name, from `repos`. `revisions` can name other repos too."""
    command = [sys.executable, "-m", "builder.fetch_checkpoints", "--model-id", spec.id, "--to", str(CHECKPOINTS), *what]
    for pair in filter(None, revisions.split(",")):
        command += ["--revision", pair] if pair.partition("=")[0] in repos else []
    subprocess.run(command, check=True)  # noqa: S603 our own program


def copy(spec: ModelSpec, source: Path) -> None:
    for repo in {source.repo for source in spec.sources.values()}:
        shutil.copytree(source / repo, CHECKPOINTS / repo, dirs_exist_ok=True)


def spread(spec: ModelSpec, name: str, group: Group) -> None:
    """Replace the group's weights by links to its slots, and move each file to the slot that is emptiest at that time."""
    folders = group.folders(name)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    filled = dict.fromkeys(folders, 0)
    for file, sha256 in weights(spec, group):
        folder = min(folders, key=filled.__getitem__)
        filled[folder] += file.stat().st_size
        target = folder / sha256
        file.rename(target)
        target.chmod(0o644)
        file.symlink_to(target)


def weights(spec: ModelSpec, group: Group) -> Iterator[tuple[Path, str]]:
    """Yield the weight files in CHECKPOINTS that are not links yet, with their sha256, in the order of their names."""
    for part in group.parts:
        if part in spec.sources:
            source = spec.sources[part]
            repo = CHECKPOINTS / source.repo
            manifest = Manifest.read(repo)
            for file in sorted((repo / source.subfolder).glob("*.safetensors")):
                entry = manifest.files.get(file.relative_to(repo).as_posix()) if manifest else None
                if not file.is_symlink():
                    yield file, entry.sha256 if entry else sha256_of(file)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_mtimes(root: Path) -> None:
    """Set the modification time of all files below `root`. Touching a file that has it would copy the file to this layer."""
    for path in [root, *root.rglob("*")]:
        if path.lstat().st_mtime != REPRODUCIBLE_MTIME:
            os.utime(path, (REPRODUCIBLE_MTIME, REPRODUCIBLE_MTIME), follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
