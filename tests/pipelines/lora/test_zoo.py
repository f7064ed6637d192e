"""Files in the formats that people bring: right, or refused, and no trace of them in the next job."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.errors import LoraError
from pipelines.lora.file import LoraFile
from tests import lora_zoo

SAMPLING = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)
Write = Callable[[str, lora_zoo.File], LoraFile]


@pytest.fixture(scope="module")
def model(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    folder = tmp_path_factory.mktemp("zoo")

    def write(name: str, file: lora_zoo.File) -> LoraFile:
        path = folder / f"{abs(hash(name))}.safetensors"
        save_file({key: value.contiguous() for key, value in file[0].items()}, path, file[1] or None)
        return LoraFile.read(path)

    return write


def frames(model: WanModel, file: LoraFile, mode: str = "adapter", scale: float = 1.0) -> np.ndarray:
    adapter = Adapter(file, scale)
    model.loras.check(adapter, mode)  # type: ignore[arg-type]
    model.apply_loras([adapter], mode)  # type: ignore[arg-type]
    return np.concatenate(list(model.generate(SAMPLING)))


def weights(model: WanModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model._pipe.transformer.named_parameters()}


@pytest.mark.parametrize("mode", ["adapter", "merge"])
@pytest.mark.parametrize("name", lora_zoo.spellings())
def test_every_spelling_of_a_lora_gives_the_same_frames(model: WanModel, write: Write, name: str, mode: str) -> None:
    usual = frames(model, write("usual", (lora_zoo.plain(), {})), mode)
    model.apply_loras([])
    assert np.array_equal(frames(model, write(name, lora_zoo.spellings()[name]), mode), usual)


@pytest.mark.parametrize("mode", ["adapter", "merge"])
@pytest.mark.parametrize("name", lora_zoo.strengths())
def test_an_alpha_counts_wherever_it_stands_and_in_every_mode(model: WanModel, write: Write, name: str, mode: str) -> None:
    file, strength = lora_zoo.strengths()[name]
    usual = frames(model, write("usual", (lora_zoo.plain(), {})), mode, scale=strength)
    model.apply_loras([])
    assert np.abs(frames(model, write(name, file), mode).astype(int) - usual).max() <= 1


@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1)])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_an_fp8_tensor_is_multiplied_by_its_scale_or_by_one_for_each_row(
    model: WanModel, write: Write, name: str, shape: tuple[int, ...]
) -> None:
    meant: lora_zoo.Tensors = {}
    stored: lora_zoo.Tensors = {}
    for key, value in lora_zoo.plain(3).items():
        largest = value.abs().amax(1, keepdim=True) if -1 in shape else value.abs().max()
        stored[key], scale = (value / largest).to(torch.float8_e4m3fn), largest
        stored[key.replace(".weight", f".{name}")] = scale.reshape(shape)
        meant[key] = stored[key].float() * scale
    usual = frames(model, write("meant", (meant, {})), "merge")
    model.apply_loras([])
    assert np.array_equal(frames(model, write(f"{name} {shape}", (stored, {})), "merge"), usual)


def test_a_dora_at_scale_0_leaves_the_model_as_it_is(model: WanModel, write: Write) -> None:
    model.apply_loras([])
    before = weights(model)
    model.apply_loras([Adapter(write("dora", lora_zoo.merged()["dora"]), 0.0)])
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    model.apply_loras([])


@pytest.mark.parametrize("name", lora_zoo.merged())
def test_what_an_adapter_cannot_carry_is_merged_as_its_definition_says(model: WanModel, write: Write, name: str) -> None:
    tensors, metadata = lora_zoo.merged()[name]
    model.apply_loras([])
    before = weights(model)
    adapter = Adapter(write(name, (tensors, metadata)), 0.5)
    assert any("which an adapter cannot carry" in warning for warning in model.loras.check(adapter))
    model.apply_loras([adapter])
    for key, value in weights(model).items():
        assert torch.allclose(value, expected(key, before[key], tensors, 0.5), atol=1e-5), key
    assert any(not torch.equal(value, before[key]) for key, value in weights(model).items())
    model.apply_loras([])
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def expected(parameter: str, pristine: torch.Tensor, tensors: lora_zoo.Tensors, scale: float) -> torch.Tensor:
    """The parameter with a file of `merged` at `scale`, from the formats' definitions."""
    tensors = {key.replace(".diff_m", ".modulation.diff"): value for key, value in tensors.items()}
    layer, _, kind = parameter.rpartition(".")
    if parameter.endswith("scale_shift_table"):
        layer, kind = parameter, "weight"
    back = {value: key for key, value in lora_zoo.TO_DIFFUSERS.items()} | {
        "norm2": "norm3", "attn1.norm_k": "self_attn.norm_k", "scale_shift_table": "modulation",
    }  # fmt: skip
    inner = layer.split(".", 2)[2] if layer.startswith("blocks.") else ""
    wan = f"{'.'.join(layer.split('.')[:2])}.{back.get(inner, inner)}" if inner else layer
    names = (f"diffusion_model.{wan}", f"lora_unet_{wan.replace('.', '_')}", f"lycoris_{layer.replace('.', '_')}")
    found = {
        key[len(name) + 1 :]: value.float() for key, value in tensors.items() for name in names if key.startswith(f"{name}.")
    }
    if kind == "bias":
        return pristine + scale * (found.get("diff_b", 0) + found.get("lora_B.bias", 0))
    if "lokr_w1" in found:
        return pristine + scale * torch.kron(found["lokr_w1"], found["lokr_w2"])
    if "lora_B.weight" in found:
        product = found["lora_B.weight"].flatten(1) @ found["lora_A.weight"].flatten(1)
        changed = pristine + scale * product.view(pristine.shape)
        if "magnitude" in found:
            changed = found["magnitude"][:, None] * changed / changed.norm(dim=1, keepdim=True)
        return changed
    return pristine + scale * found.get("diff", found.get("lora_A.weight", torch.zeros(())))


@pytest.mark.parametrize("mode", ["adapter", "merge"])
@pytest.mark.parametrize("name", lora_zoo.bad())
def test_a_bad_file_is_refused_and_named_for_what_it_is(model: WanModel, write: Write, name: str, mode: str) -> None:
    with pytest.raises(LoraError) as error:
        model.loras.check(Adapter(write(name, lora_zoo.bad()[name])), mode)  # type: ignore[arg-type]
    words = {
        "use_dora": "`use_dora`",
        "lora_bias": "`lora_bias`",
        "unknown setting": "`shine`",
        "text for a number": "`lora_alpha` is not a positive number",
        "another rank": "the rank 8, and its tensors have 4",
        "regular expressions": "`alpha_pattern` does not map layer names",
        "a list": "not a JSON object",
        "not JSON": "not a JSON object",
        "alphas twice": "both as a tensor and in the header",
        "half a pair": "the file is incomplete",
        "NaN": "NaN or infinity",
        "another width": "in this model",
        "LoHa": "a LoHa file",
        "a difference beside factors": "both change the weight of one layer; export it with one of them",
        "scales of no rows": "is neither one number nor one for each row; export",
    }
    assert words[name] in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_files_leaves_a_trace_in_a_plain_lora(tiny: Path, model: WanModel, write: Write, seed: int) -> None:
    files = {**lora_zoo.spellings(), **{name: file for name, (file, _) in lora_zoo.strengths().items()}}
    files |= {**lora_zoo.merged(), **lora_zoo.bad()}
    dice = random.Random(seed)
    mode = dice.choice(["adapter", "merge"])
    plain = write("plain", (lora_zoo.plain(seed=9), {}))
    fresh = frames(load_pipeline("wan21_1b", tiny, "cpu"), plain, mode)
    for name in dice.sample(sorted(files), 12):
        file = write(name, files[name])
        try:
            if dice.random() < 0.7:
                model.loras.check(Adapter(file), "adapter")
            model.apply_loras([Adapter(file, dice.choice([0.5, 1.0, -1.0]))], dice.choice(["adapter", "merge"]))  # type: ignore[arg-type]
        except (LoraError, RuntimeError):  # a file of other shapes, that was not checked
            pass
        if dice.random() < 0.5:
            assert np.array_equal(frames(model, plain, mode), fresh), name
    assert np.array_equal(frames(model, plain, mode), fresh)
