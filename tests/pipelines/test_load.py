"""What is checked before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import load_pipeline
from pipelines.catalog import MODELS
from pipelines.errors import CheckpointNotFound, DeviceUnavailable
from pipelines.load import check_memory
from pipelines.manifest import Manifest
from pipelines.weights import STEM_OF
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


def weights_of(checkpoints: Path, repo: str, *files: str) -> int:
    """Numbers in these files."""
    return sum(tensor.numel() for file in files for tensor in load_file(checkpoints / repo / file).values())


def test_a_gpu_that_is_too_small_is_told_with_the_mode_that_fits(tiny: Path) -> None:
    spec, repo = MODELS["wan21_1b"], "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    parts = {part: f"{part}/{stem}.safetensors" for part, stem in STEM_OF.items() if part in spec.sources}
    sizes = [2 * weights_of(tiny, repo, file) for file in parts.values()]
    check_memory(spec, tiny, "none", 2, sum(sizes))
    with pytest.raises(DeviceUnavailable, match=r"OFFLOAD_MODE=none, and the GPU has .*: set OFFLOAD_MODE=model"):
        check_memory(spec, tiny, "none", 2, sum(sizes) - 1)
    check_memory(spec, tiny, "model", 2, max(sizes))
    with pytest.raises(DeviceUnavailable, match="set OFFLOAD_MODE=sequential"):
        check_memory(spec, tiny, "model", 2, max(sizes) - 1)
    check_memory(spec, tiny, "sequential", 2, 1)


def test_a_gpu_that_is_too_small_for_a_model_that_cannot_offload_must_be_larger(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="free: use a larger GPU"):
        check_memory(MODELS["wan22_14b_i2v"], tiny, "none", 2, 1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_an_error_not_a_slow_worker(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="DEVICE=cpu"):
        load_pipeline("wan21_1b", tiny, "cuda")


def test_offloading_needs_a_gpu(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="OFFLOAD_MODE=model on cpu"):
        load_pipeline("wan21_1b", tiny, "cpu", offload_mode="model")


@pytest.mark.gpu
@pytest.mark.parametrize("offload_mode", ["none", "model", "sequential"])
def test_offloading_changes_no_frame(tiny: Path, offload_mode: str) -> None:
    from pipelines import Sampling

    sampling = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)
    plain = next(load_pipeline("wan21_1b", tiny, "cuda").generate(sampling))
    offloaded = load_pipeline("wan21_1b", tiny, "cuda", offload_mode=offload_mode)  # type: ignore[arg-type]
    assert (next(offloaded.generate(sampling)) == plain).all()
