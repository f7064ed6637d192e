"""Where the files of a model lie: each part is looked for by itself, in several places in turn. No torch in this file.

A place counts for a part only when everything of that part lies there, so that a half-copied folder hides no whole one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.catalog import ModelSpec
from pipelines.errors import CheckpointNotFound
from pipelines.manifest import NAME, Manifest
from pipelines.safetensors_header import SafetensorsError, header_of
from pipelines.weights import STEM_OF, Stored, file_names, stored_in

INDEX = "model_index.json"
"""What diffusers puts a pipeline together by, in the root of a repo."""

ONE_OF = {
    "tokenizer": ("tokenizer.json", "spiece.model"),
    "scheduler": ("scheduler_config.json",),
    "image_processor": ("preprocessor_config.json",),
}
"""Component without weights to the files of which it needs one."""


@dataclass(frozen=True)
class Place:
    """A folder with checkpoints: `ORG/NAME` per Hub repo, or the layout of the cache of `huggingface_hub`."""

    name: str
    """The variable that says where it is; errors name it, and never the folder itself."""
    path: Path
    is_hub_cache: bool = False

    def folders_of(self, repo: str) -> list[Path]:
        """Where the repo may lie, the likeliest first."""
        if not self.is_hub_cache:
            return [self.path / repo]
        cache = self.path / f"models--{repo.replace('/', '--')}"
        main = cache / "refs/main"
        try:
            if main.is_file():
                return [cache / "snapshots" / main.read_text().strip()]
            return sorted(cache.glob("snapshots/*"), key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)
        except OSError:  # a volume that went away; another place may do
            return []


Faults = dict[str, str]
"""Why a folder does not count: path in the repo to what is wrong with it. Empty when nothing is."""


class Checkpoints:
    """The folders from which one model is read."""

    def __init__(self, spec: ModelSpec, places: Path | Sequence[Place]) -> None:
        """Look into `places` in their order; a path is one place with a folder `ORG/NAME` per repo. Raises nothing."""
        self.spec = spec
        self.places = [Place("CHECKPOINT_DIR", places)] if isinstance(places, Path) else list(places)
        self._repo_of: dict[str, Path] = {}
        self._faults: list[tuple[str, Place, Faults]] = []
        self.missing_parts: list[str] = []
        """Components that are whole in none of the places."""
        for names in _found_together(spec):
            self._find(names)

    @classmethod
    def of(cls, spec: ModelSpec, where: Path | Sequence[Place] | Checkpoints) -> Checkpoints:
        return where if isinstance(where, Checkpoints) else cls(spec, where)

    def repo_of(self, part: str) -> Path:
        """The folder of the repo that the component is read from."""
        return self._repo_of[part]

    def folder_of(self, part: str) -> Path:
        """The folder that holds the component's files."""
        return self._repo_of[part] / self.spec.sources[part].subfolder

    @property
    def base(self) -> Path:
        """The folder with model_index.json and all components without weights."""
        return self._repo_of[INDEX]

    def revisions(self) -> dict[str, str | None]:
        """Hub repo to the commit its files are of, as far as it is known; several, joined by +, when places differ."""
        folders = {(source.repo, self._repo_of[part]) for part, source in self.spec.sources.items()}
        known: dict[str, set[str]] = {repo: set() for repo, _ in sorted(folders)}
        for repo, folder in folders:
            known[repo] |= {revision} if (revision := revision_of(folder)) else set()
        return {repo: "+".join(sorted(revisions)) or None for repo, revisions in known.items()}

    @property
    def are_converted(self) -> bool:
        """Whether files of some component were converted to bf16 when they were fetched."""
        manifests = (Manifest.read(folder) for folder in set(self._repo_of.values()))
        return any(entry.converted_from for manifest in manifests if manifest for entry in manifest.files.values())

    def stored(self) -> dict[str, Stored]:
        """The components whose files have codes in place of weights. Raises ValueError, OSError."""
        found = {part: stored_in(self.folder_of(part), part) for part in self.spec.sources if part in STEM_OF}
        return {part: stored for part, stored in found.items() if stored}

    def check(self) -> None:
        """Raises CheckpointNotFound, which names every file that is wanting, when a component is not whole anywhere."""
        if not self._faults:
            return
        several = len(self.places) > 1
        files = {
            f"{repo}/{path} ({fault}{f' in {place.name}' if several else ''})"
            for repo, place, faults in self._faults
            for path, fault in faults.items()
        }
        raise CheckpointNotFound(
            f"{self.spec.id} needs files that are missing or incomplete below "
            f"{' or '.join(place.name for place in self.places)}: {', '.join(sorted(files))}; download them with "
            f"`python -m builder.fetch_checkpoints --model-id {self.spec.id} --to DIR`, or set ALLOW_DOWNLOAD=1"
        )

    def _find(self, names: Sequence[str]) -> None:
        """Find the components `names`, which must lie together."""
        repo = self.spec.sources[names[-1]].repo
        tried = [(place, folder) for place in self.places for folder in place.folders_of(repo)]
        tried = tried or [(self.places[0], self.places[0].path / repo)]  # a hub cache without the repo, and nothing else
        found = [(place, folder, _faults_of(self.spec, names, folder)) for place, folder in tried]
        # The first that is whole; else the one that is nearest to it, for the error.
        place, folder, faults = min(found, key=lambda one: (not one[1].is_dir(), len(one[2])))
        self._repo_of |= dict.fromkeys(names, folder)
        if faults:
            self._faults.append((repo, place, faults))
            self.missing_parts += [name for name in names if name != INDEX]


def revision_of(repo: Path) -> str | None:
    """The Hub commit a folder's files are of: by its manifest, its name, or what `huggingface_hub` notes beside the files."""
    if manifest := Manifest.read(repo):
        return manifest.revision
    if repo.parent.name == "snapshots":
        return repo.name
    for note in sorted((repo / ".cache/huggingface/download").rglob("*.metadata")):
        first = note.read_text(errors="replace").partition("\n")[0].strip()
        if len(first) == 40 and set(first) <= set("0123456789abcdef"):
            return first
    return None


def _found_together(spec: ModelSpec) -> list[list[str]]:
    """The components in groups that are read from one folder: each with weights by itself, and the small ones together."""
    small = [part for part in spec.sources if part not in STEM_OF]
    return [[part] for part in spec.sources if part in STEM_OF] + [small if spec.needs_toolkit else [INDEX, *small]]


def _faults_of(spec: ModelSpec, names: Iterable[str], repo: Path) -> Faults:
    faults: Faults = {}
    try:
        manifest = Manifest.read(repo)
        for name in names:
            if name == INDEX:
                faults |= {} if (repo / INDEX).is_file() else {INDEX: "missing"}
                continue
            subfolder = spec.sources[name].subfolder
            prefix = f"{subfolder}/" if subfolder else ""
            faults |= {prefix + file: fault for file, fault in _faults_of_part(name, repo / subfolder).items()}
            for path in manifest.not_as_listed(repo, subfolder) if manifest else []:
                faults[path] = "not as large as its manifest says" if (repo / path).is_file() else "missing"
    except ValueError:
        faults[NAME] = "damaged"
    except OSError as error:
        faults[""] = f"cannot be read: {error.strerror}"
    return faults


def _faults_of_part(part: str, folder: Path) -> Faults:
    """What is wrong with the files that the libraries read, by their name; weights are measured by their own headers."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return {"": "missing"}
    if part not in STEM_OF:
        return {} if any((folder / name).is_file() for name in ONE_OF[part]) else {ONE_OF[part][0]: "missing"}
    try:
        weights = file_names(folder, part)
    except (ValueError, KeyError, TypeError):
        return {f"{STEM_OF[part]}.safetensors.index.json": "damaged"}
    faults = {name: "missing" for name in ("config.json", *weights) if not (folder / name).is_file()}
    return faults | {name: "damaged" for name in weights if name not in faults and not _is_whole(folder / name)}


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        header_of(file)
    except SafetensorsError:
        return False
    return True
