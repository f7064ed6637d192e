"""`inspect_lora --values` and `--checkpoint`, against norms that numpy computes from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.catalog import MODELS
from pipelines.pristine import CheckpointFile
from tests import lora_zoo
from tools.inspect_lora import main


@pytest.fixture
def checkpoint(tiny) -> Path:
    return tiny / MODELS["wan21_1b"].sources["transformer"].repo


def values(capsys, *arguments) -> dict:
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)["values"]


def saved(tmp_path: Path, tensors, header=None) -> Path:
    save_file(tensors, tmp_path / "a.safetensors", metadata=header)
    return tmp_path / "a.safetensors"


KEY = "diffusion_model.blocks.0.self_attn.q"


def test_the_size_of_every_change_is_told_and_what_is_dead(tmp_path, capsys):
    tensors = lora_zoo.plain()
    tensors[f"{KEY}.lora_B.weight"].zero_()
    found = values(capsys, saved(tmp_path, tensors), "--values")
    assert found["dead_layers"] == ["blocks.0.attn1.to_q"]
    other = next(layer for layer in found["layers"] if layer["layer"] == "blocks.0.attn1.to_k")
    change = tensors[f"{KEY[:-1]}k.lora_B.weight"] @ tensors[f"{KEY[:-1]}k.lora_A.weight"]
    assert other["norm"] == pytest.approx(float(change.norm()), rel=1e-4)
    assert other["strength"] is None


def test_with_the_checkpoint_the_strength_is_relative_to_the_weight(tmp_path, checkpoint, capsys):
    tensors = lora_zoo.plain()
    found = values(capsys, saved(tmp_path, tensors), "--checkpoint", checkpoint)
    [first] = [layer for layer in found["layers"] if layer["layer"] == "blocks.0.attn1.to_q"]
    weight = CheckpointFile(checkpoint / "transformer", "transformer").read("blocks.0.attn1.to_q.weight").float()
    change = tensors[f"{KEY}.lora_B.weight"] @ tensors[f"{KEY}.lora_A.weight"]
    assert first["strength"] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-3)


@pytest.mark.parametrize("name", lora_zoo.merged())
def test_every_format_has_a_strength(tmp_path, checkpoint, capsys, name):
    tensors, header = lora_zoo.merged()[name]
    layers = values(capsys, saved(tmp_path, tensors, header), "--checkpoint", checkpoint)["layers"]
    assert layers and all(layer["norm"] is not None for layer in layers)
    assert any(layer["norm"] > 0 for layer in layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, capsys, value):
    tensors = lora_zoo.plain()
    tensors[f"{KEY}.lora_B.weight"][0, 0] = value
    assert main([str(saved(tmp_path, tensors)), "--values"]) == 2
    assert f"`{KEY}.lora_B.weight` contains NaN or infinity" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_and_a_folder_without_one_are_told(tmp_path, checkpoint, capsys):
    tensors = {key.replace("blocks.0", "blocks.77"): tensor for key, tensor in lora_zoo.plain().items()}
    assert main([str(saved(tmp_path, tensors)), "--checkpoint", str(checkpoint)]) == 2
    assert "the checkpoint has no layer blocks.77" in capsys.readouterr().err
    assert main([str(saved(tmp_path, lora_zoo.plain())), "--checkpoint", str(tmp_path)]) == 2
    assert "the checkpoint has no transformer weights" in capsys.readouterr().err


def test_a_reader_gets_the_strongest_and_the_weakest_layer(tmp_path, checkpoint, capsys):
    tensors = lora_zoo.plain()
    tensors[f"{KEY}.lora_B.weight"] *= 100
    tensors["diffusion_model.blocks.0.self_attn.v.lora_B.weight"].zero_()
    main([str(saved(tmp_path, tensors)), "--checkpoint", str(checkpoint)])
    text = capsys.readouterr().out
    assert "values      all are finite numbers" in text
    assert "of the weight's norm: blocks.0.attn1.to_q\nmedian" in text
    assert "dead        1 of " in text and "weakest     0.00% of the weight's norm: blocks.0.attn1.to_v" in text
    assert torch.is_tensor(tensors[f"{KEY}.lora_B.weight"])
