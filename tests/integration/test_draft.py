"""`draft` as a job sees it: where its files come from, what its result says, and what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.distilled import loras_of, write_distilled
from tests.integration.test_local_api import file_of, frames_of, request_for
from tests.worker import web_server
from worker.service import Service
from worker.settings import Settings
from worker.startup.cold_start import cold_start

MODEL_ID = "wan22_14b_t2v"
Runner = Callable[..., Service]


@pytest.fixture(scope="module")
def accelerators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("accelerators")
    write_distilled(root, MODEL_ID)
    return root


@pytest.fixture(scope="module")
def loaded(tiny: Path, accelerators: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("worker")
    return cold_start(
        Settings(
            model_id=MODEL_ID,
            checkpoint_dir=tiny,
            accelerator_dir=accelerators,
            lora_dir=tiny / "loras",
            lora_cache_dir=folder / "cache",
            device="cpu",
            output_dir=folder / "output",
            recovery_dir=folder / "recovery",
        )
    )


@pytest.fixture
def runner(loaded: Service) -> Runner:
    """The loaded model with other settings."""

    def make(**settings: Any) -> Service:
        return Service(loaded._settings.model_copy(update=settings), loaded._gpu.model, loaded._storage)

    return make


def run(service: Service, tiny: Path, prompt: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    request = request_for(MODEL_ID, tiny, **(prompt or {})) | changes
    return asyncio.run(service.run({"id": uuid.uuid4().hex, "input": request}))


def test_a_draft_says_that_it_is_one_and_how_long_the_full_run_takes(runner: Runner, tiny: Path, accelerators: Path) -> None:
    steps: list[dict[str, Any]] = []

    async def send(update: dict[str, Any]) -> None:
        steps.append(update)

    request = request_for(MODEL_ID, tiny, sample_steps=150, neg="blurry", shift=9.0, num_videos=2) | {"output_format": "mp4"}
    job = {"id": uuid.uuid4().hex, "input": request | {"draft": True}, "send": send}
    result = asyncio.run(runner().run(job))
    assert "error" not in result, result
    (prompt, second), settings = result["settings"]["prompts"], result["settings"]
    for lora, wanted in zip(settings["draft"]["loras"], loras_of(MODEL_ID), strict=True):
        file = accelerators / wanted.repo / wanted.path
        assert (lora["repo"], lora["file"], lora["commit"]) == (wanted.repo, wanted.path, wanted.commit)
        assert (lora["transformer"], lora["network_multiplier"], lora["applied_by"]) == (wanted.side, 1.0, "merge")
        assert lora["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert settings["draft"]["low_noise_from_step"] == 2 and "LightX2V" in settings["draft"]["source"]
    assert (prompt["sample_steps"], prompt["guidance_scale"], prompt["shift"], prompt["seed"]) == (4, 1.0, 5.0, 42)
    assert prompt["timesteps"] == pytest.approx([1000, 937.5, 833.333, 625], abs=0.01) and second["seed"] == 43
    assert "extra_loras" not in settings and len(settings["loras"]) == 2
    assert {update["steps"] for update in steps} == {4}
    with av.open(str(file_of(result["outputs"]["videos"][0]))) as video:
        assert json.loads(video.metadata["comment"])["draft"] == settings["draft"]
    warnings = result["warnings"]
    assert any("prompts[0]: `neg`, `sample_steps`, `shift` have no effect: a draft" in text for text in warnings)
    assert sum("is not the one that its authors published" in text for text in warnings) == 2
    assert not any("set `match` to preview" in text for text in warnings)
    # 2 videos of 150 steps with guidance have 600 passes, and the drafts had 8.
    timings = result["timings"]
    assert timings["full_run_estimate"] > 3 * timings["generate"] > 0
    alone = run(runner(), tiny, {"sample_steps": 2, "guidance_scale": 1.0}, draft=True)["timings"]
    assert 0 <= alone["full_run_estimate"] < alone["generate"] + 0.1


def test_a_job_after_a_draft_gets_the_frames_of_before(runner: Runner, tiny: Path) -> None:
    def frames(**changes: Any) -> np.ndarray:
        result = run(runner(), tiny, **changes)
        assert ("full_run_estimate" in result["timings"]) == ("draft" in result["settings"]) == changes.get("draft", False)
        return frames_of(result["outputs"]["videos"][0])

    usual = frames()
    extra = [{"path": f"{MODEL_ID}_mixed/{MODEL_ID}_mixed_high_noise.safetensors", "transformer": "both"}]
    drafts = [frames(draft=True), frames(draft=True, extra_loras=extra)]
    assert np.array_equal(frames(), usual)
    assert np.array_equal(frames(draft=True), drafts[0])
    assert not np.array_equal(*drafts) and not np.array_equal(drafts[0], usual)


def test_a_draft_is_documented_where_the_worker_is_set_to_preview(runner: Runner, tiny: Path) -> None:
    service = runner(default_match="preview")
    assert run(service, tiny, draft=True)["settings"]["match"] == "documented"
    answer = run(service, tiny, draft=True, match="preview")
    assert answer["error"].startswith("INVALID_INPUT: `draft`: a draft does not look like the samples of the training; leave")


def test_files_are_looked_for_in_every_place_and_their_lack_is_an_error_with_a_remedy(
    runner: Runner, tiny: Path, accelerators: Path, tmp_path: Path
) -> None:
    answer = run(runner(accelerator_dir=tmp_path, lora_dir=tmp_path), tiny, draft=True)
    assert answer["error"].startswith("LORA_NOT_FOUND: 4 problems: ")  # those of `loras`, and of the draft
    answer = run(runner(accelerator_dir=None), tiny, draft=True)
    high, low = loras_of(MODEL_ID)
    for lora in (high, low):
        assert (
            f"`draft`: the worker does not have the distilled LoRA {lora} in CHECKPOINT_DIR or MODEL_CACHE_DIR"
            in answer["error"]
        )
    remedy = f"`python -m builder.fetch_checkpoints --draft --model-id {MODEL_ID} --to DIR`, or sets ALLOW_DOWNLOAD=1"
    assert answer["error"].count(remedy) == 2
    snapshot = tmp_path / f"cache/models--{high.repo.replace('/', '--')}/snapshots/{high.commit}"
    for target in (snapshot / high.path, tmp_path / "volume" / low.repo / low.path, tmp_path / "flat" / low.path):
        target.parent.mkdir(parents=True, exist_ok=True)
        lora = high if target.name == high.path else low
        target.write_bytes((accelerators / lora.repo / lora.path).read_bytes())
    spread: dict[str, Any] = {"accelerator_dir": None, "model_cache_dir": tmp_path / "cache"}
    for places in ({"volume_checkpoint_dir": tmp_path / "volume"}, {"accelerator_dir": tmp_path / "flat"}):
        assert "outputs" in run(runner(**(spread | places)), tiny, draft=True)
    (tmp_path / "flat" / low.path).write_bytes(b"<html>")
    answer = run(runner(**(spread | {"accelerator_dir": tmp_path / "flat"})), tiny, draft=True)
    assert answer["error"].startswith(
        f"LORA_INVALID: `draft`: the distilled LoRA {low} in ACCELERATOR_DIR: the file is a web page"
    )


def test_nothing_is_downloaded_but_with_allow_download(
    runner: Runner, tiny: Path, accelerators: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_server.serve() as server:
        for lora in loras_of(MODEL_ID):
            server.gives(f"/{lora.path}", (accelerators / lora.repo / lora.path).read_bytes())
        monkeypatch.setattr("pipelines.catalog.DistilledLora.url", property(lambda lora: server.url(f"/{lora.path}")))
        private: dict[str, Any] = {"accelerator_dir": None, "allow_private_downloads": True}
        assert "LORA_NOT_FOUND" in run(runner(**private), tiny, draft=True)["error"] and not server.requests
        assert "outputs" in run(runner(**private, allow_download=True), tiny, draft=True)
        assert len(server.requests) == 2
