"""`python -m client from-training`: a folder that ai-toolkit wrote becomes the jobs that make its samples again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.cli import main
from client.errors import BadInput
from client.training.folder import checkpoints_of, read_folder, samples_of
from client.training.samples import TrainingConfig
from pipelines.trained import NOT_SAID
from tests.client.conftest import BODY
from tests.client.endpoint import KEY, Api, Script
from tests.worker_process import ROOT

JOB = ["--endpoint", "endpoint"]


@pytest.fixture(autouse=True)
def _environment(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", api.base_url)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the real trainer left of a job of 8 steps, with empty files for two of its samples."""
    folder = tmp_path / "trained"
    shutil.copytree(ROOT / "tests/trainer_runs/wan21_1b_q8save32", folder)
    (folder / "samples").mkdir()
    for name in ("1764000000__000000004_0.webp", "1764000099__000000008_0.webp", "1764000099__000000008_2.webp"):
        (folder / "samples" / name).touch()
    return folder


def requests_of(folder: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["from-training", str(folder), "--dry-run", *options]) == 0
    return [job["input"] for job in json.loads(capsys.readouterr().out)]


def test_without_options_the_samples_of_the_last_step_are_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = requests_of(folder, capsys=capsys)
    assert [request["prompts"][0]["seed"] for request in requests] == [42, 1234, 99, 45]
    for request in requests:
        assert (request["model"], request["match"]) == ("wan21_1b", "preview")
        assert request["trained_with"]["quantize"] is True
        assert request["loras"] == [{"path": "wan21_1b_q8save32/wan21_1b_q8save32.safetensors", "network_multiplier": 1.0}]
    assert requests[0]["prompts"][0]["prompt"].startswith("sks a red kite")


def test_a_step_a_sample_a_prompt_and_the_loras_place_can_be_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--step", "4", "--sample", "2", "--prompt", "[trigger] on a beach", "--lora-folder", "https://example.com/me/")
    [request] = requests_of(folder, *options, capsys=capsys)
    assert request["loras"][0]["path"] == "https://example.com/me/wan21_1b_q8save32_000000004.safetensors"
    assert (request["prompts"][0]["prompt"], request["prompts"][0]["seed"]) == ("sks on a beach", 99)


def test_a_dry_run_says_what_it_found_and_sends_nothing(folder: Path, api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["from-training", str(folder), *JOB, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "Wan 2.1 T2V 1.3B, trigger word sks, trained with quantize, quantize_te as qfloat8" in said
    assert "step: 8; the folder has 4, 8 (the end)" in said
    assert "4 prompts in the config, 3 videos in the folder" in said
    assert api.asked == []


def test_each_video_comes_with_the_trainers_own(
    folder: Path, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    assert main(["from-training", str(folder), *JOB, "--sample", "0", "--json", "--output-dir", str(videos)]) == 0
    out, err = capsys.readouterr()
    [file] = json.loads(out)["files"]
    assert Path(file["path"]).read_bytes() == BODY
    assert file["sample"] == str(folder / "samples/1764000099__000000008_0.webp")
    assert f"compare: python -m tools.compare {file['sample']} {file['path']}" in err


def test_a_sample_that_fails_does_not_take_the_others(
    folder: Path, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = script.answers[-1]
    script.answers[:] = [{"status": "FAILED", "error": "OUT_OF_MEMORY: too large"}, done]
    options = [*JOB, "--sample", "0", "--sample", "1", "--output-dir", str(tmp_path / "videos")]
    assert main(["from-training", str(folder), *options]) == 1
    out, err = capsys.readouterr()
    assert "OUT_OF_MEMORY: too large" in err and len(out.splitlines()) == 1


def test_what_is_not_a_trainings_folder_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*options: str) -> str:
        assert main(["from-training", *options]) == 2
        return capsys.readouterr().err

    assert "there is no LoRA of step 5; there are 4, 8 (the end)" in refusal(str(folder), "--step", "5")
    assert "the config has the samples 0 to 3" in refusal(str(folder), "--sample", "9")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "no LoRA that belongs to its config, such as wan21_1b_q8save32.safetensors" in refusal(str(folder))
    (folder / "config.yaml").unlink()
    assert "has no config.yaml" in refusal(str(folder))
    assert "is not a folder" in refusal(str(folder / "nothing"))


def test_a_control_image_is_found_beside_the_config_whatever_its_path_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(ROOT / "tests/trainer_runs/wan21_i2v_14b_v_bf16", folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    images = {item["ctrl_img"] for item in config["config"]["process"][0]["sample"]["samples"] if item.get("ctrl_img")}
    for image in images:
        shutil.copy(ROOT / "tests/trainer_runs/ctrl" / Path(image).name, folder)
    assert all(request["prompts"][0]["ctrl_img"] for request in requests_of(folder, capsys=capsys))


def test_both_sides_of_a_step_belong_together() -> None:
    training = TrainingConfig(name="boat", model={}, samples=(), trained_with=NOT_SAID, steps=2000)
    names = ["boat_000001000_low_noise.safetensors", "boat_000001000_high_noise.safetensors", "boat_low_noise.safetensors"]
    names += ["boat_high_noise.safetensors", "boat2_000001000.safetensors", "optimizer.pt", "old/boat_000000500.safetensors"]
    found = checkpoints_of(names, training)
    assert [(one.step, one.is_final, len(one.files)) for one in found] == [(1000, False, 2), (2000, True, 2)]
    assert found[0].files[0] == "boat_000001000_high_noise.safetensors"
    with pytest.raises(BadInput):
        checkpoints_of(["other.safetensors"], training)


def test_of_two_samples_of_a_step_the_later_counts() -> None:
    names = ["samples/1764000002__000000250_1.webp", "samples/1764000001__000000250_1.webp", "samples/notes.txt"]
    assert samples_of(names) == {(250, 1): "samples/1764000002__000000250_1.webp"}


def test_a_folder_is_read_with_the_last_step_of_its_config(folder: Path) -> None:
    read = read_folder(folder)
    assert read.training.steps == 8
    assert read.checkpoint(None).is_final and read.checkpoint(8).is_final and not read.checkpoint(4).is_final
