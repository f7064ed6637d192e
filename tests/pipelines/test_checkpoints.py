"""Where the weights of a model are looked for: in CHECKPOINT_DIR, the platform's model cache, and on a network volume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import load_pipeline
from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints, Place
from pipelines.errors import CheckpointNotFound
from pipelines.manifest import Manifest
from worker.settings import Settings

REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SPEC = MODELS["wan21_1b"]
REVISION = "1" * 40

Put = Callable[..., Path]


@pytest.fixture
def places(tmp_path: Path) -> list[Place]:
    """The worker's three places, all empty."""
    settings = Settings(
        model_id="wan21_1b",
        checkpoint_dir=tmp_path / "image",
        model_cache_dir=tmp_path / "cache",
        volume_checkpoint_dir=tmp_path / "volume",
    )
    return settings.checkpoint_places


@pytest.fixture
def put(tiny: Path, tmp_path: Path) -> Put:
    """Copies parts of a repo to a place, all of it by default; returns the repo's folder there."""

    def copy(place: str, *parts: str, repo: str = REPO) -> Path:
        folder = tmp_path / place / repo
        for item in sorted((tiny / repo).iterdir()):
            if not parts or item.name in parts:
                folder.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if item.is_dir() else shutil.copy)(item, folder / item.name)
        return folder

    return copy


def put_into_cache(tiny: Path, cache: Path, revision: str = REVISION, is_main: bool = True, repo: str = REPO) -> Path:
    """Lay a repo out as `huggingface_hub` does: blobs, links to them in a snapshot, and refs/main. Returns the snapshot."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(path for path in sorted((tiny / repo).rglob("*")) if path.is_file()):
        link = snapshot / file.relative_to(tiny / repo)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "blobs" / f"{number}")
        link.symlink_to(Path(*[".."] * (len(link.relative_to(folder).parts) - 1), "blobs", str(number)))
    if is_main:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(revision)
    return snapshot


def where(checkpoints: Checkpoints, root: Path) -> set[str]:
    """The places, by their folder, that some part is read from."""
    return {checkpoints.folder_of(part).relative_to(root).parts[0] for part in SPEC.sources}


def test_checkpoint_dir_comes_first_then_the_model_cache_then_the_volume(
    tiny: Path, tmp_path: Path, places: list[Place], put: Put
) -> None:
    put("volume")
    assert where(Checkpoints(SPEC, places), tmp_path) == {"volume"}
    put_into_cache(tiny, tmp_path / "cache")
    assert where(Checkpoints(SPEC, places), tmp_path) == {"cache"}
    put("image")
    assert where(Checkpoints(SPEC, places), tmp_path) == {"image"}


def test_each_part_is_found_by_itself_and_the_model_loads_from_all_of_them(
    tiny: Path, tmp_path: Path, places: list[Place], put: Put
) -> None:
    put("image", "text_encoder", "tokenizer", "scheduler", "model_index.json")
    put("volume", "vae", "transformer")
    checkpoints = Checkpoints(SPEC, places)
    assert {part: checkpoints.folder_of(part).relative_to(tmp_path).parts[0] for part in SPEC.sources} == {
        "text_encoder": "image",
        "tokenizer": "image",
        "scheduler": "image",
        "vae": "volume",
        "transformer": "volume",
    }
    assert load_pipeline("wan21_1b", checkpoints, "cpu").facts["checkpoints"] == {REPO: None}


def test_a_model_is_loaded_from_the_hub_cache_and_its_revision_is_the_snapshots_name(
    tiny: Path, tmp_path: Path, places: list[Place]
) -> None:
    old = put_into_cache(tiny, tmp_path / "cache", "0" * 40, is_main=False)
    put_into_cache(tiny, tmp_path / "cache")
    assert load_pipeline("wan21_1b", Checkpoints(SPEC, places), "cpu").facts["checkpoints"] == {REPO: REVISION}
    shutil.rmtree(old)


def test_a_hub_cache_without_refs_gives_its_newest_whole_snapshot(tiny: Path, tmp_path: Path, places: list[Place]) -> None:
    put_into_cache(tiny, tmp_path / "cache", is_main=False)
    (tmp_path / f"cache/models--{REPO.replace('/', '--')}/snapshots/{'2' * 40}").mkdir()
    assert Checkpoints(SPEC, places).revisions() == {REPO: REVISION}


def test_a_hub_cache_that_is_still_being_filled_does_not_count(
    tiny: Path, tmp_path: Path, places: list[Place], put: Put
) -> None:
    snapshot = put_into_cache(tiny, tmp_path / "cache")
    (snapshot / "transformer/diffusion_pytorch_model.safetensors").resolve().unlink()  # a link without its blob
    put("volume")
    checkpoints = Checkpoints(SPEC, places)
    assert checkpoints.folder_of("transformer").is_relative_to(tmp_path / "volume")
    assert checkpoints.folder_of("vae").is_relative_to(tmp_path / "cache")


def cut_short(folder: Path) -> str:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "transformer/diffusion_pytorch_model.safetensors (damaged in CHECKPOINT_DIR)"


def without_a_shard(folder: Path) -> str:
    index = {"weight_map": {"a": "part-00001-of-00002.safetensors", "b": "diffusion_pytorch_model.safetensors"}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return "transformer/part-00001-of-00002.safetensors (missing in CHECKPOINT_DIR)"


def without_a_config(folder: Path) -> str:
    (folder / "transformer/config.json").unlink()
    return "transformer/config.json (missing in CHECKPOINT_DIR)"


def unlike_its_manifest(folder: Path) -> str:
    Manifest.of(folder, REPO, REVISION).write(folder)
    (folder / "transformer/config.json").write_text("{}")
    return "transformer/config.json (not as large as its manifest says in CHECKPOINT_DIR)"


@pytest.mark.parametrize("damage", [cut_short, without_a_shard, without_a_config, unlike_its_manifest])
def test_a_part_that_is_not_whole_is_passed_over_or_named_with_its_place(
    damage: Callable[[Path], str], tmp_path: Path, places: list[Place], put: Put
) -> None:
    said = damage(put("image"))
    checkpoints = Checkpoints(SPEC, places)
    assert checkpoints.missing_parts == ["transformer"]
    with pytest.raises(CheckpointNotFound) as error:
        checkpoints.check()
    assert f"below CHECKPOINT_DIR or MODEL_CACHE_DIR or VOLUME_CHECKPOINT_DIR: {REPO}/{said};" in str(error.value)
    put("volume")
    checkpoints = Checkpoints(SPEC, places)
    checkpoints.check()
    assert checkpoints.folder_of("transformer").is_relative_to(tmp_path / "volume")
    assert checkpoints.folder_of("vae").is_relative_to(tmp_path / "image")


@pytest.mark.parametrize(("part", "file"), [("tokenizer", "tokenizer.json"), ("scheduler", "scheduler_config.json")])
def test_a_small_part_needs_its_file(part: str, file: str, places: list[Place], put: Put) -> None:
    folder = put("image")
    (folder / part / file).rename(folder / part / "other.json")
    with pytest.raises(CheckpointNotFound, match=f"{REPO}/{part}/{file} \\(missing in CHECKPOINT_DIR\\)"):
        Checkpoints(SPEC, places).check()


def test_a_manifest_of_some_parts_says_nothing_of_the_others(places: list[Place], put: Put) -> None:
    folder = put("image", "vae")
    Manifest.of(folder, REPO, REVISION).write(folder)
    put("image", "text_encoder", "tokenizer", "scheduler", "transformer", "model_index.json")
    checkpoints = Checkpoints(SPEC, places)
    checkpoints.check()
    assert checkpoints.revisions() == {REPO: REVISION}


def test_parts_of_two_revisions_are_both_told(places: list[Place], put: Put) -> None:
    image, volume = put("image", "vae"), put("volume")
    Manifest.of(image, REPO, "a" * 40).write(image)
    Manifest.of(volume, REPO, "b" * 40).write(volume)
    assert Checkpoints(SPEC, places).revisions() == {REPO: f"{'a' * 40}+{'b' * 40}"}


@pytest.mark.parametrize("model_id", MODELS)
def test_everything_is_missing_where_there_is_nothing(model_id: str, places: list[Place], tmp_path: Path) -> None:
    spec = MODELS[model_id]
    for some in (places, places[1:2]):
        checkpoints = Checkpoints(spec, some)
        assert sorted(checkpoints.missing_parts) == sorted(spec.sources)
        with pytest.raises(CheckpointNotFound) as error:
            checkpoints.check()
        assert str(tmp_path) not in str(error.value)
        assert all(str(source) in str(error.value) for source in spec.sources.values())
