"""LoRAs added into the weights: exact on the way in, and to the bit on the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.tiny_checkpoints import SIZE_1B, lora_metadata, lora_tensors
from pipelines import Adapter, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.file import LoraFile
from pipelines.recipes import preview
from tests.conftest import STAND_IN
from tests.pipelines.test_models import adapters, make

QUERY = "blocks.1.attn1.to_q"
"""`diffusion_model.blocks.1.self_attn.q` under the transformer's own name."""

Write = Callable[..., LoraFile]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: dict[str, torch.Tensor], name: str = "lora", version: str = "0.12.26") -> LoraFile:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=lora_metadata(name, "wan_2.1", version=version))
        return LoraFile.read(path)

    return write


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def small(request: pytest.FixtureRequest, tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu", dtype=request.param)


def weights(model: WanModel) -> dict[str, torch.Tensor]:
    parts = {name: getattr(model._pipe, name) for name in ("transformer", "transformer_2") if name in model.spec.sources}
    return {f"{part}.{name}": value.clone() for part, module in parts.items() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.mark.parametrize("model_id", MODELS)
def test_after_twenty_merges_and_switches_weights_and_frames_are_those_of_a_fresh_load(
    model_id: str, tiny: Path, write: Write
) -> None:
    model = load_pipeline(model_id, tiny, "cpu", toolkit_path=STAND_IN)
    fresh, recipe = weights(model), preview(model.spec, "flowmatch", "")
    wanted = adapters(model_id, tiny, 0.7)
    model.apply_loras(wanted, "merge")
    first = make(model, recipe)
    for number in range(20):
        some = adapters(model_id, tiny, 0.1 * number - 1)[: 1 + number % 2]
        model.apply_loras(some, "merge" if number % 3 else "adapter")
    model.apply_loras(wanted, "merge")
    assert np.array_equal(make(model, recipe), first)
    model.apply_loras([], "merge")
    assert same(weights(model), fresh)


def test_a_merge_is_a_float32_product_added_and_stored_in_the_weights_dtype(small: WanModel, tiny: Path) -> None:
    file = LoraFile.read(tiny / "loras/wan21_1b/rank16.safetensors")
    before = weights(small)[f"transformer.{QUERY}.weight"]
    small.apply_loras([Adapter(file, scale=0.5)], "merge")
    tensors = load_file(file.path)
    up, down = (tensors[f"diffusion_model.blocks.1.self_attn.q.lora_{half}.weight"].float() for half in "BA")
    expected = (before.float() + 0.5 * (up @ down)).to(before.dtype)
    assert torch.equal(small._pipe.transformer.get_submodule(QUERY).weight, expected)
    assert not torch.equal(expected, before)
    small.apply_loras([], "merge")


def test_merged_and_beside_the_weights_are_the_same_in_float32_but_for_rounding(tiny: Path) -> None:
    model = load_pipeline("wan21_14b", tiny, "cpu")
    model.apply_loras(adapters("wan21_14b", tiny), "adapter")
    beside = make(model)
    model.apply_loras(adapters("wan21_14b", tiny), "merge")
    assert np.abs(make(model).astype(int) - beside).max() <= 1


def test_a_lora_with_fewer_layers_leaves_nothing_of_the_one_before(small: WanModel, write: Write) -> None:
    part = {key: value for key, value in lora_tensors(SIZE_1B, 4, seed=1).items() if ".blocks.0." in key}
    small.apply_loras([Adapter(write(part, "part"))], "merge")
    alone = weights(small)
    small.apply_loras([Adapter(write(lora_tensors(SIZE_1B, 8, seed=2), "whole"))], "merge")
    small.apply_loras([Adapter(write(part, "part"))], "merge")
    assert same(weights(small), alone)
    small.apply_loras([], "merge")


def test_a_merge_that_fails_midway_leaves_plain_weights(small: WanModel, tiny: Path, write: Write) -> None:
    fresh = weights(small)
    tensors = lora_tensors(SIZE_1B, 4, seed=1)
    tensors["diffusion_model.blocks.1.ffn.2.lora_A.weight"] = torch.ones(4, 7)
    with pytest.raises(RuntimeError):
        small.apply_loras([Adapter(write(tensors))], "merge")
    assert same(weights(small), fresh)


def test_weights_of_a_float32_checkpoint_in_shards_come_back_in_bf16_as_loaded(tiny: Path, tmp_path: Path) -> None:
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(tiny / repo, tmp_path / repo)
    folder = tmp_path / repo / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    weight_map = {key: names[number % 2] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: value for key, value in tensors.items() if weight_map[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    model = load_pipeline("wan21_1b", tmp_path, "cpu", dtype=torch.bfloat16)
    fresh = weights(model)
    model.apply_loras([Adapter(LoraFile.read(tiny / "loras/wan21_1b/rank4.safetensors"))], "merge")
    assert not same(weights(model), fresh)
    model.apply_loras([], "adapter")
    assert same(weights(model), fresh)


def test_weights_of_another_name_beside_them_change_nothing(tiny: Path, tmp_path: Path) -> None:
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(tiny / repo, tmp_path / repo)
    folder = tmp_path / repo / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({key: value.half() * 0 for key, value in tensors.items()}, folder / "diffusion_pytorch_model.fp16.safetensors")
    model = load_pipeline("wan21_1b", tmp_path, "cpu")
    fresh = weights(model)
    model.apply_loras(adapters("wan21_1b", tiny), "merge")
    model.apply_loras([], "merge")
    assert same(weights(model), fresh)


def test_a_file_replaced_while_the_job_waited_is_not_applied_unchecked(small: WanModel, write: Write) -> None:
    adapter = Adapter(write(lora_tensors(SIZE_1B, 4, seed=1)))
    small.loras.check(adapter, "merge")
    write(lora_tensors(SIZE_1B, 8, seed=2))
    with pytest.raises(LoraInvalid, match="was replaced") as error:
        small.apply_loras([adapter], "merge")
    assert error.value.position == 0


def test_an_alpha_of_several_numbers_is_invalid(small: WanModel, write: Write) -> None:
    alpha = {"diffusion_model.blocks.0.self_attn.q.alpha": torch.ones(3)}
    with pytest.raises(LoraInvalid, match="an alpha of 3 numbers"):
        small.loras.check(Adapter(write(lora_tensors(SIZE_1B, 4, 1) | alpha)), "merge")


def test_a_lokr_file_of_another_model_is_told_where_it_belongs(tiny: Path, write: Write) -> None:
    model = load_pipeline("wan21_14b", tiny, "cpu")
    with pytest.raises(LoraIncompatible, match=r"looks trained for .*hidden size 24"):
        model.loras.check(Adapter(write(lokr_tensors(False))), "merge")


def test_the_trainers_dtypes_are_put_back_for_the_documented_mode(tiny: Path) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16)
    model.apply_loras([], "adapter")
    fresh, before = weights(model), make(model)
    assert any(value.dtype == torch.float32 for value in fresh.values())
    model.apply_loras(adapters("wan21_1b", tiny), "merge")
    make(model, preview(model.spec, "flowmatch", ""))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model._pipe.transformer.parameters())
    model.apply_loras([], "adapter")
    assert np.array_equal(make(model), before)
    assert same(weights(model), fresh)


def lokr_tensors(whole_w2: bool) -> dict[str, torch.Tensor]:
    """24x24 as kron of [4, 6] and [6, 4]; ai-toolkit leaves the smaller factor whole and may split the other by rank 2."""
    generator = torch.Generator().manual_seed(3)
    key = "diffusion_model.blocks.1.self_attn.q"
    tensors = {f"{key}.lokr_w1": torch.randn(4, 6, generator=generator), f"{key}.alpha": torch.tensor(1.0)}
    if whole_w2:
        return tensors | {f"{key}.lokr_w2": torch.randn(6, 4, generator=generator)}
    return tensors | {
        f"{key}.lokr_w2_a": torch.randn(6, 2, generator=generator),
        f"{key}.lokr_w2_b": torch.randn(2, 4, generator=generator),
    }


@pytest.mark.parametrize("whole_w2", [True, False])
def test_a_lokr_file_is_merged_as_a_kronecker_product(tiny: Path, write: Write, whole_w2: bool) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    tensors = lokr_tensors(whole_w2)
    adapter = Adapter(write(tensors), scale=0.5)
    assert model.loras.check(adapter, "merge") == []
    before = weights(model)[f"transformer.{QUERY}.weight"]
    model.apply_loras([adapter], "merge")
    parts = {key.rpartition("lokr_")[2]: value for key, value in tensors.items() if "lokr" in key}
    w2 = parts["w2"] if whole_w2 else parts["w2_a"] @ parts["w2_b"]
    scale = 0.5 * (1.0 if whole_w2 else 1.0 / 2)  # alpha / rank, where there is a rank
    expected = before + scale * torch.kron(parts["w1"], w2)
    assert torch.allclose(model._pipe.transformer.get_submodule(QUERY).weight, expected, atol=1e-6)


def test_a_lokr_file_that_is_sent_as_an_adapter_is_merged_and_says_so(tiny: Path, write: Write) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    adapter = Adapter(write(lokr_tensors(True)))
    (warning,) = model.loras.check(adapter, "adapter")
    assert "which an adapter cannot carry, so it is merged" in warning
    assert model.loras.mode_of(adapter, "adapter") == "merge"
    model.apply_loras([adapter], "adapter")
    merged = weights(model)
    model.apply_loras([adapter], "merge")
    assert same(weights(model), merged)


def test_a_lokr_file_that_lacks_a_factor_is_invalid(tiny: Path, write: Write) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    tensors = lokr_tensors(False)
    del tensors["diffusion_model.blocks.1.self_attn.q.lokr_w2_a"]
    with pytest.raises(LoraInvalid, match="lacks its lokr_w2"):
        model.loras.check(Adapter(write(tensors)), "merge")
