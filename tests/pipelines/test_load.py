"""What is checked before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipelines import load_pipeline
from pipelines.catalog import MODELS
from pipelines.errors import CheckpointNotFound, DeviceUnavailable
from pipelines.manifest import Manifest
from tests.conftest import STAND_IN


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """Checkpoints of one model that a test can damage."""
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(tiny / repo, tmp_path / repo)
    return tmp_path


@pytest.mark.parametrize("model_id", MODELS)
def test_every_missing_part_is_named(model_id: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound) as error:
        load_pipeline(model_id, tmp_path, "cpu", toolkit_path=STAND_IN)
    assert all(str(source) in str(error.value) for source in MODELS[model_id].sources.values())
    assert str(tmp_path) not in str(error.value)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"1.3B-Diffusers/vae/diffusion_pytorch_model.safetensors \(missing\);"):
        load_pipeline("wan21_1b", copy, "cpu")


def test_a_missing_shard_is_named(copy: Path) -> None:
    folder = copy / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer"
    shards = {"a": "part-00001-of-00002.safetensors", "b": "part-00002-of-00002.safetensors"}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / shards["a"]).touch()
    with pytest.raises(CheckpointNotFound, match=r"transformer/part-00002-of-00002\.safetensors \(missing\);"):
        load_pipeline("wan21_1b", copy, "cpu")


def test_14b_t2v_loads_without_the_base_repos_own_transformers(tiny: Path, tmp_path: Path) -> None:
    base, toolkit = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16"
    shutil.copytree(tiny / base, tmp_path / base, ignore=shutil.ignore_patterns("transformer*"))
    shutil.copytree(tiny / toolkit, tmp_path / toolkit)
    assert load_pipeline("wan22_14b_t2v", tmp_path, "cpu").spec.moe


def test_a_file_that_is_not_as_its_manifest_says_is_named(copy: Path) -> None:
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    Manifest.of(copy / repo, repo, "a" * 40).write(copy / repo)
    assert load_pipeline("wan21_1b", copy, "cpu").facts["checkpoints"] == {repo: "a" * 40}
    (copy / repo / "vae/config.json").write_text("{}")
    (copy / repo / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(CheckpointNotFound) as error:
        load_pipeline("wan21_1b", copy, "cpu")
    assert f"{repo}/tokenizer/tokenizer.json (missing), {repo}/vae/config.json (not as large as" in str(error.value)


def test_a_manifest_that_cannot_be_read_is_named(copy: Path) -> None:
    (copy / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/worker-wan-lora.manifest.json").write_text("[]")
    with pytest.raises(CheckpointNotFound, match=r"worker-wan-lora\.manifest\.json \(damaged\)"):
        load_pipeline("wan21_1b", copy, "cpu")


def test_processes_share_the_memory_that_was_there_before_the_first_of_them_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**12, 10**12))
    with pytest.raises(DeviceUnavailable, match=r"container has 2.0 GB for each of 2 GPUs"):
        load_pipeline("wan21_1b", tiny, "cuda", "group", processes=2, memory=4 * 10**9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_an_error_not_a_slow_worker(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="DEVICE=cpu"):
        load_pipeline("wan21_1b", tiny, "cuda")
