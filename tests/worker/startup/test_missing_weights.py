"""ALLOW_DOWNLOAD: weights that are nowhere are fetched at start, for those who asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from pipelines.manifest import Manifest
from tests.builder.hub_server import HubServer, hub_server, with_status
from tests.integration.test_local_api import request_for
from tests.worker_process import environment, run_handler
from worker.errors import Code, WorkerError
from worker.settings import Settings
from worker.startup.cold_start import cold_start
from worker.startup.missing_weights import fetch_missing

REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        server.put(REPO, {str(path.relative_to(tiny / REPO)): path.read_bytes() for path in (tiny / REPO).rglob("*.*")})
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as in the image
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "runpod-volume").mkdir()
    return Settings(
        model_id="wan21_1b",
        checkpoint_dir=tmp_path / "image",
        model_cache_dir=tmp_path / "cache",
        volume_checkpoint_dir=tmp_path / "runpod-volume/checkpoints",
        allow_download=True,
        device="cpu",
        output_dir=tmp_path / "output",
    )


def find(settings: Settings) -> Checkpoints:
    return Checkpoints(MODELS["wan21_1b"], settings.checkpoint_places)


def test_a_worker_fetches_to_the_volume_and_serves(hub: HubServer, settings: Settings, tiny: Path, tmp_path: Path) -> None:
    env = environment(
        tiny,
        "wan21_1b",
        CHECKPOINT_DIR=settings.checkpoint_dir,
        VOLUME_CHECKPOINT_DIR=settings.volume_checkpoint_dir,
        ALLOW_DOWNLOAD="1",
        OUTPUT_DIR=tmp_path,
        HF_ENDPOINT=hub.address,
        HF_HUB_OFFLINE="1",
    )
    done = run_handler(env, "--test_input", json.dumps({"input": request_for("wan21_1b", tiny)}))
    assert done.returncode == 0, done.stderr
    assert hub.main[REPO] in done.stdout + done.stderr
    assert not settings.checkpoint_dir.exists()


def test_nothing_is_fetched_for_who_did_not_ask(hub: HubServer, settings: Settings) -> None:
    with pytest.raises(WorkerError) as error:
        cold_start(settings.model_copy(update={"allow_download": False}))
    assert (error.value.code, hub.requests) == (Code.CHECKPOINT_NOT_FOUND, [])
    assert "ALLOW_DOWNLOAD=1" in str(error.value)


def test_only_what_is_missing_is_fetched_at_the_commit_of_what_is_there(hub: HubServer, settings: Settings, tiny: Path) -> None:
    files = hub.repos[REPO][hub.main[REPO]]
    image = settings.checkpoint_dir / REPO
    for path, body in files.items():
        if not path.startswith("vae/"):
            (image / path).parent.mkdir(parents=True, exist_ok=True)
            (image / path).write_bytes(body)
    first = hub.main[REPO]
    Manifest.of(image, REPO, first).write(image)
    hub.put(REPO, files | {"vae/config.json": b"{}"})
    checkpoints = find(settings)
    assert checkpoints.missing_parts == ["vae"]
    found = fetch_missing(settings, checkpoints)
    found.check()
    assert found.revisions() == {REPO: first}
    volume = settings.volume_checkpoint_dir / REPO
    assert {path.name for path in volume.iterdir()} == {"vae", "model_index.json", "worker-wan-lora.manifest.json"}


def test_without_a_volume_it_goes_to_checkpoint_dir(hub: HubServer, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "runpod-volume").rmdir()
    found = fetch_missing(settings, find(settings))
    assert found.folder_of("vae") == settings.checkpoint_dir / REPO / "vae"


def test_what_cannot_be_fetched_is_told(hub: HubServer, settings: Settings, tmp_path: Path) -> None:
    hub.fails("/revision/main", with_status(404, x_error_code="RepoNotFound"))
    with pytest.raises(WorkerError) as error:
        fetch_missing(settings, find(settings))
    assert error.value.code is Code.CHECKPOINT_NOT_FOUND
    assert f"of wan21_1b cannot be downloaded: the Hub has no {REPO} at revision main" in str(error.value)
    assert str(tmp_path) not in str(error.value)
