"""The tiny checkpoints and LoRAs that everything else stands on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builder import tiny_checkpoints
from pipelines.catalog import MODELS
from pipelines.lora.file import LoraFile


def test_every_repo_of_the_catalog_is_written(tiny: Path) -> None:
    for spec in MODELS.values():
        for source in spec.sources.values():
            assert any((tiny / source.repo / source.subfolder).iterdir()), source


def test_14b_t2v_has_other_transformers_in_the_base_repo_than_in_the_toolkit_repo(tiny: Path) -> None:
    for name in ("transformer", "transformer_2"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        repos = (tiny_checkpoints.T2V_BASE, MODELS["wan22_14b_t2v"].sources[name].repo)
        base, toolkit = (load_file(tiny / repo / file) for repo in repos)
        assert {key: value.shape for key, value in base.items()} == {key: value.shape for key, value in toolkit.items()}
        assert not any(torch.equal(base[key], toolkit[key]) for key in base if key.endswith("attn1.to_q.weight"))


def test_two_runs_write_the_same_tensors_in_few_bytes(tiny: Path, tmp_path: Path) -> None:
    tiny_checkpoints.write_checkpoints(tmp_path)
    tiny_checkpoints.write_loras(tmp_path / "loras")
    for path in tiny.rglob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / path.relative_to(tiny))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file()) < 20e6


@pytest.mark.parametrize("name", ["wan21_1b/rank4", "wan22_14b_t2v/wan22_14b_t2v_low_noise", "wan21_i2v/rank8"])
def test_loras_have_ai_toolkits_keys_and_metadata(tiny: Path, name: str) -> None:
    file = LoraFile.read(tiny / f"loras/{name}.safetensors")
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in file.shapes
    assert json.loads(file.metadata["software"])["name"] == "ai-toolkit"
    assert file.base_version.startswith("wan_2.")
    assert file.has_image_keys == ("i2v" in name and "wan21" in name)
