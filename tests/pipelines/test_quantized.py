"""The formats of quantized weights, what is left out, and the adapter that lies beneath the LoRAs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import Adapter, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from pipelines.errors import LoraIncompatible
from pipelines.load import choose_quantization
from pipelines.lora.file import LoraFile
from pipelines.offload import bytes_by_mode
from pipelines.pristine import CheckpointFile
from pipelines.quantized import FORMATS, CodedLinear, Quantized, _packed, _unpacked
from pipelines.trained import EXCLUDED_SINCE, QTYPES, Quantization, TrainedWith, bytes_of_codes
from tests import lora_zoo
from tests.conftest import REAL_TOOLKIT
from tests.pipelines.test_models import lora_paths, make
from tests.trainer import stand_in

BF16 = torch.bfloat16
RUNS = Path(__file__).parent.parent / "trainer_runs"


@pytest.fixture(scope="module")
def model(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu", dtype=BF16)


@pytest.fixture
def weight() -> torch.Tensor:
    values = torch.randn(96, 256, generator=torch.Generator().manual_seed(3))
    values[5] = 0
    values[6] *= 1e-6
    values[7] = values[7].abs()
    values[8] = -values[8].abs()
    return values.to(BF16)


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    codes = FORMATS[name].encode(weight)
    return weight if codes is None else FORMATS[name].decode(*codes)


def test_every_format_of_the_schema_is_there() -> None:
    assert set(QTYPES) == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "error"),
    [("qfloat8", 0.04), ("float8", 0.04), ("int8", 0.008), ("uint8", 0.0), ("uint6", 0.03), ("uint4", 0.12), ("uint2", 0.7)],
)
def test_a_format_keeps_a_weight_as_well_as_its_bits_allow(name: str, error: float, weight: torch.Tensor) -> None:
    decoded = rounded(name, weight)
    assert decoded.dtype == BF16 and decoded.isfinite().all()
    relative = float((decoded.float() - weight.float()).norm() / weight.float().norm())
    assert error / 4 <= relative <= error
    assert not decoded[5].any()


@pytest.mark.parametrize("name", QTYPES)
def test_a_layer_computes_as_in_the_trainer_to_the_bit(name: str, tmp_path: Path) -> None:
    theirs = load_file(RUNS / "layer.safetensors")
    layer = torch.nn.Linear(*reversed(theirs["weight"].shape), dtype=BF16)
    layer.load_state_dict({part: theirs[part] for part in ("weight", "bias")})
    codes = FORMATS[name].encode(layer.weight)
    if codes:
        assert torch.equal(CodedLinear(layer, FORMATS[name], codes)(theirs["inputs"]), theirs[name])
    component = torch.nn.ModuleDict({"layer": layer})
    save_file(component.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    in_place = Quantized(component, CheckpointFile(tmp_path, "transformer"), torch.device("cpu"))
    plain = layer(theirs["inputs"])
    in_place.apply(name)
    assert torch.equal(layer(theirs["inputs"]), theirs[name])
    in_place.apply(None)
    assert torch.equal(layer(theirs["inputs"]), plain) and torch.equal(layer.weight, theirs["weight"])


def test_weights_whose_inputs_make_no_groups_stay_as_they_are(weight: torch.Tensor) -> None:
    assert torch.equal(rounded("uint4", weight[:, :100]), weight[:, :100])


@pytest.mark.toolkit
@pytest.mark.parametrize("bits", range(2, 8))
def test_uint_formats_are_those_of_the_trainer_to_the_bit(bits: int, weight: torch.Tensor) -> None:
    assert REAL_TOOLKIT
    before = dict(sys.modules)
    try:
        for package in ("toolkit", "toolkit.util"):
            stand_in(package).__path__ = [str(REAL_TOOLKIT.joinpath(*package.split(".")))]
        module = importlib.import_module("toolkit.util.uintx_quant")
        layer = torch.nn.Linear(256, 96, bias=False, dtype=BF16)
        layer.weight.data.copy_(weight)
        ostris = importlib.import_module("toolkit.util.ostris_quant")
        ostris.convert_linear_to_ostris(layer, module.UIntXQuantizer(bits))
        theirs = layer.weight.to(BF16)
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)
    assert torch.equal(rounded(f"uint{bits}", weight), theirs)


@pytest.mark.parametrize(
    ("id", "version", "leaves_out"),
    [
        ("wan22_14b_t2v", None, True),
        ("wan22_5b", EXCLUDED_SINCE, True),
        ("wan22_14b_i2v", (0, 10, 21), False),
        ("wan21_14b", None, False),
    ],
)
def test_wan_22_leaves_its_embedders_out_since_a_version(id: str, version: tuple[int, ...] | None, leaves_out: bool) -> None:
    found = TrainedWith(quantize=True).quantization(MODELS[id], version)
    assert found == Quantization("qfloat8", "qfloat8", ("condition_embedder", "proj_out") if leaves_out else ())


def test_what_is_quantized_is_what_the_trainer_quantizes() -> None:
    spec = MODELS["wan21_1b"]
    assert TrainedWith().quantization(spec, None) is None
    assert TrainedWith(quantize=True, quantize_te=False).quantization(spec, None) == Quantization("qfloat8", None)
    assert TrainedWith(quantize=False, quantize_te=True, qtype="uint4").quantization(spec, None) == Quantization(None, "uint4")
    with_adapter = TrainedWith(quantize=True, qtype="uint3|a/b/c.safetensors")
    assert (with_adapter.format, with_adapter.recovery_adapter) == ("uint3", "a/b/c.safetensors")


def test_the_weights_of_a_layer_are_rounded_and_its_bias_is_added_apart(model: WanModel) -> None:
    model.apply_loras([], quantization=Quantization("qfloat8", None))
    layer = model._pipe.transformer.blocks[0].attn1.to_q
    name = "blocks.0.attn1.to_q"
    file: CheckpointFile = model.loras._rounded["transformer"]._file
    weight = rounded("qfloat8", file.read(f"{name}.weight").to(BF16))
    inputs = torch.randn(2, 7, weight.shape[1]).to(BF16)
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, weight) + file.read(f"{name}.bias").to(BF16))
    model.apply_loras([])
    assert torch.equal(layer.weight, file.read(f"{name}.weight").to(BF16)) and layer.bias is not None


def test_a_recovery_adapter_lies_beneath_and_only_its_layers_are_rounded(model: WanModel, tmp_path: Path) -> None:
    tensors = {key: value for key, value in lora_zoo.plain(seed=9).items() if "self_attn.q" in key}
    save_file(tensors, tmp_path / "recovery.safetensors")
    recovery = Adapter(LoraFile.read(tmp_path / "recovery.safetensors"), 1.0)
    save_file(lora_zoo.plain(), tmp_path / "lora.safetensors")
    lora = Adapter(LoraFile.read(tmp_path / "lora.safetensors"), 0.5)
    model.apply_loras([])
    before = make(model)
    block = model._pipe.transformer.blocks[0].attn1
    weights = {name: getattr(block, name).weight.clone() for name in ("to_q", "to_k")}

    model.loras.check_recovery_adapter(recovery.file)
    model.apply_loras([lora], "beside", Quantization("qfloat8", None, ("blocks",)), recovery)
    assert torch.equal(block.to_q.weight, rounded("qfloat8", weights["to_q"]))
    assert torch.equal(block.to_k.weight, weights["to_k"])
    inputs = torch.randn(1, 3, weights["to_q"].shape[1]).to(BF16)
    key = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    first = (
        torch.nn.functional.linear(inputs, block.to_q.weight)
        + model.loras._rounded["transformer"]._biases["blocks.0.attn1.to_q"]
    )
    down, up = (tensors[key.format(half)].to(BF16) for half in "AB")
    second = first + inputs @ down.T @ up.T
    down, up = (lora_zoo.plain()[key.format(half)] for half in "AB")
    third = second + (inputs.float() @ down.T @ up.T * 0.5).to(BF16)
    assert torch.equal(block.to_q(inputs), third)

    model.apply_loras([])
    assert (make(model) == before).all()


def test_differences_are_added_to_what_the_training_left_unrounded_and_refused_elsewhere(
    model: WanModel, tmp_path: Path
) -> None:
    layer, layers = "diffusion_model.blocks.0", ("norm3", "self_attn.norm_k")
    differences = {f"{layer}.{name}.diff": torch.full((lora_zoo.WIDTH,), 0.3) for name in layers}
    block = model._pipe.transformer.blocks[0]
    norms = (block.norm2, block.attn1.norm_k)
    save_file(lora_zoo.plain() | differences, tmp_path / "norms.safetensors")
    save_file(
        differences | {f"{layer}.self_attn.q.diff": torch.ones(lora_zoo.WIDTH, lora_zoo.WIDTH)}, tmp_path / "q.safetensors"
    )
    model.apply_loras([])
    before = make(model)
    plain = [norm.weight.to(BF16, copy=True) for norm in norms]
    norms_only, of_q = (Adapter(LoraFile.read(tmp_path / f"{name}.safetensors"), 0.7) for name in ("norms", "q"))
    model.loras.check(norms_only, "beside")
    model.apply_loras([norms_only], "beside", Quantization("qfloat8", None))
    added = (torch.tensor(0.3) * 0.7).to(BF16)
    assert [norm.weight.tolist() for norm in norms] == [(old + added).tolist() for old in plain]
    assert model.loras.plan([norms_only], "beside")["transformer"][0] == "beside"
    with pytest.raises(
        LoraIncompatible, match=r"a difference of a weight or bias of blocks.0.attn1.to_q, which the training quan"
    ):
        model.apply_loras([of_q], "beside", Quantization("qfloat8", None))
    assert (make(model) == before).all()
    model.apply_loras([])
    assert (make(model) == before).all()


def test_a_file_whose_parts_must_be_merged_is_refused_on_quantized_weights(model: WanModel, tmp_path: Path) -> None:
    save_file(
        lora_zoo.plain() | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(lora_zoo.WIDTH)},
        tmp_path / "lora.safetensors",
    )
    adapter = Adapter(LoraFile.read(tmp_path / "lora.safetensors"))
    model.apply_loras([])
    before = make(model)
    with pytest.raises(LoraIncompatible, match="it has a bias, magnitude or kernel beside its factors") as caught:
        model.apply_loras([adapter], "beside", Quantization("qfloat8", None))
    assert caught.value.position == 0
    assert (make(model) == before).all()
    model.apply_loras([])
    assert (make(model) == before).all()


# Weights that are kept as codes


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "uint8"])
def test_codes_take_as_many_bytes_as_the_tables_say(name: str, weight: torch.Tensor) -> None:
    codes = FORMATS[name].encode(weight)
    assert codes is not None
    assert sum(part.numel() * part.element_size() for part in codes) == bytes_of_codes(
        name, *weight.shape, weight.element_size()
    )
    assert not any(part.is_floating_point() and part.dtype != BF16 for part in codes)  # a cast of the model would change them


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_are_packed_without_a_loss(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = _packed(codes, bits)
    assert packed.shape == (5, 3, bits, 8)
    assert torch.equal(_unpacked(packed, bits), codes)


MODELS_WITH_CODES = ["wan21_1b", "wan22_14b_t2v"]


def _align(model: WanModel) -> None:
    """Move weights from where they lie in their file to memory of their own: a CPU's float32 kernels round by the alignment."""
    for part in ("text_encoder", *model.spec.transformers):
        for module in getattr(model._pipe, part).modules():
            if isinstance(module, torch.nn.Linear) and not isinstance(module, CodedLinear):
                module.weight.data = module.weight.data.clone()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["qfloat8", "uint4", "int8"])
@pytest.mark.parametrize("model_id", MODELS_WITH_CODES)
def test_a_worker_that_keeps_codes_makes_the_frames_of_a_quantized_job_to_the_bit(
    model_id: str, format: str, dtype: torch.dtype, tiny: Path
) -> None:
    spec = MODELS[model_id]
    plain, coded = (load_pipeline(model_id, tiny, "cpu", dtype=dtype, quantize=quantize) for quantize in ("none", format))
    wanted = TrainedWith(quantize=True, qtype=format).quantization(spec, None)
    assert (coded.loras.quantization, coded.facts["quantize"], plain.facts["quantize"]) == (wanted, format, None)
    loras = [Adapter(LoraFile.read(path), 0.7, side) for path, side in lora_paths(model_id, tiny)]
    plain.apply_loras(loras, "beside", wanted)
    for model in (plain, coded):
        _align(model)
    coded.apply_loras(loras, "beside", wanted)
    frames = make(plain)
    assert np.array_equal(make(coded), frames)
    plain.apply_loras([])
    coded.apply_loras([])
    assert not np.array_equal(make(plain), make(coded))
    coded.apply_loras(loras, "merge", wanted)  # nothing can be merged into codes: they lie beside, as in the trainer
    assert np.array_equal(make(coded), frames)


def test_an_adapter_lies_over_codes_as_over_weights(tiny: Path) -> None:
    """In `documented`: peft's own arithmetic, on the rounded weights."""
    plain, coded = (load_pipeline("wan21_1b", tiny, "cpu", dtype=BF16, quantize=quantize) for quantize in ("none", "uint4"))
    ((path, _),) = lora_paths("wan21_1b", tiny)
    lora = Adapter(LoraFile.read(path), 1.0)
    layer = coded._pipe.transformer.blocks[0].attn1.to_q
    coded.apply_loras([lora])
    over = coded._pipe.transformer.blocks[0].attn1.to_q
    inputs = torch.randn(1, 3, layer.in_features).to(BF16)
    plain._pipe.transformer.blocks[0].attn1.to_q.weight.data.copy_(layer.weight)
    assert over is not layer and not torch.equal(over(inputs), layer(inputs))
    plain.apply_loras([lora])
    with torch.no_grad():
        plain._pipe.transformer.blocks[0].attn1.to_q.base_layer.weight.copy_(layer.weight)
    assert torch.equal(plain._pipe.transformer.blocks[0].attn1.to_q(inputs), over(inputs))
    coded.apply_loras([])
    assert coded._pipe.transformer.blocks[0].attn1.to_q is layer


def test_codes_take_the_memory_that_the_table_says(tiny: Path) -> None:
    checkpoints = Checkpoints.of(MODELS["wan22_14b_t2v"], tiny)
    for format in ("none", "qfloat8", "uint4"):
        model = load_pipeline("wan22_14b_t2v", tiny, "cpu", dtype=BF16, quantize=format)
        parts = [getattr(model._pipe, part) for part in ("text_encoder", "transformer", "transformer_2", "vae")]
        tensors = {id(tensor): tensor for part in parts for tensor in part.parameters()}
        coded = [module for part in parts for module in part.modules() if isinstance(module, CodedLinear)]
        tensors |= {id(tensor): tensor for module in coded for tensor in module.buffers()}
        there = sum(BF16.itemsize * t.numel() if t.is_floating_point() else t.nbytes for t in tensors.values())
        assert there == bytes_by_mode(checkpoints, BF16.itemsize, model.loras.quantization)["none"].device


@pytest.mark.parametrize("name", ["differences", "dora", "bias"])
def test_a_lora_that_would_change_a_coded_weight_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    coded = load_pipeline("wan21_1b", tiny, "cpu", dtype=BF16, quantize="qfloat8")
    save_file(lora_zoo.merged()[name][0], tmp_path / "lora.safetensors")
    with pytest.raises(LoraIncompatible, match="which cannot be applied with QUANTIZE; use a worker without QUANTIZE"):
        coded.loras.check(Adapter(LoraFile.read(tmp_path / "lora.safetensors")))


@pytest.mark.parametrize(("free", "chosen"), [(10**12, None), (0, "uint4")])
def test_auto_takes_the_finest_format_that_fits(tiny: Path, free: int, chosen: str | None) -> None:
    spec = MODELS["wan22_14b_t2v"]
    found = choose_quantization(spec, Checkpoints.of(spec, tiny), BF16.itemsize, free)
    assert (found.transformer if found else None) == chosen
