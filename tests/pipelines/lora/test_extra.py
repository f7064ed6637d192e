"""Several LoRAs at once: frames of a stack, its order, its sides, and that a switch leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.tiny_checkpoints import SIZE_14B, lora_tensors
from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora import adapters
from pipelines.lora.file import LoraFile
from pipelines.lora.layers import read
from tests import lora_zoo
from tests.pipelines.lora.test_zoo import expected
from tools import split_lora

SAMPLING = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)
Write = Callable[..., LoraFile]


@pytest.fixture(scope="module")
def model(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu")


@pytest.fixture(scope="module")
def moe(tiny: Path) -> WanModel:
    return load_pipeline("wan22_14b_t2v", tiny, "cpu")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: lora_zoo.Tensors, metadata: dict[str, str] | None = None) -> LoraFile:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
        return LoraFile.read(path)

    return write


@pytest.fixture
def stack(write: Write) -> list[Adapter]:
    """A LoRA and four extra ones of other ranks, formats, dtypes and layers."""
    musubi = lora_zoo.renamed(lora_zoo.plain(3, 2), "lora_unet_", "wan_", lora_zoo.DOWN_UP)
    fp8 = {key: (value / 4).to(torch.float8_e4m3fn) for key, value in lora_zoo.plain(5, 1).items() if "ffn" in key}
    fp8 |= {key.replace(".weight", ".scale_weight"): torch.tensor(4.0) for key in fp8}
    peft = lora_zoo.renamed(lora_zoo.plain(2, 8), "transformer.", "diffusers")
    return [
        Adapter(write(lora_zoo.plain(1, 4)), 0.8),
        Adapter(write(peft, lora_zoo.header(r=8, lora_alpha=4)), -0.5, is_extra=True),
        Adapter(write({k: v.half() for k, v in (musubi | lora_zoo.alphas(musubi, 1.0)).items()}), 1.5, is_extra=True),
        Adapter(write({k: v.bfloat16() for k, v in lora_zoo.plain(4, 16).items() if "blocks.1" in k}), 1.0, is_extra=True),
        Adapter(write(fp8), 0.25, is_extra=True),
    ]


def frames(model: WanModel, adapters: Sequence[Adapter], mode: Any = "adapter") -> np.ndarray:
    for adapter in adapters:
        model.loras.check(adapter, mode)
    model.apply_loras(adapters, mode)
    return np.concatenate(list(model.generate(SAMPLING)))


def product(key: str, tensors: lora_zoo.Tensors) -> torch.Tensor | float:
    """lora_B @ lora_A of the parameter `key` in plain float32, for ai-toolkit's keys."""
    names = {
        f"blocks.{n}.{new}.weight": f"diffusion_model.blocks.{n}.{old}"
        for n in (0, 1)
        for old, new in lora_zoo.TO_DIFFUSERS.items()
    }
    layer = names.get(key)
    if layer is None or f"{layer}.lora_A.weight" not in tensors:
        return 0.0
    return tensors[f"{layer}.lora_B.weight"].float() @ tensors[f"{layer}.lora_A.weight"].float()


def test_a_stack_makes_the_frames_of_weights_that_were_merged_by_hand(model: WanModel, stack: list[Adapter]) -> None:
    """`by_hand` reads nothing by the worker's code: the same factors are made again, and added up in float32."""
    made = {mode: frames(model, stack, mode) for mode in ("adapter", "merge")}
    model.apply_loras([])
    plain = {name: value.clone() for name, value in model._pipe.transformer.named_parameters()}
    sources = [
        (0.8, lora_zoo.plain(1, 4)),
        (-0.5 * 4 / 8, lora_zoo.plain(2, 8)),
        (1.5 * 1 / 2, {k: v.half() for k, v in lora_zoo.plain(3, 2).items()}),
        (1.0, {k: v.bfloat16() for k, v in lora_zoo.plain(4, 16).items() if "blocks.1" in k}),
        (0.25, {k: (v / 4).to(torch.float8_e4m3fn).float() * 4 for k, v in lora_zoo.plain(5, 1).items() if "ffn" in k}),
    ]
    with torch.no_grad():
        for name, value in model._pipe.transformer.named_parameters():
            value += sum(scale * product(name, tensors) for scale, tensors in sources)  # type: ignore[arg-type]
        by_hand = np.concatenate(list(model.generate(SAMPLING)))
        for name, value in model._pipe.transformer.named_parameters():
            value.copy_(plain[name])
    assert np.abs(by_hand.astype(int) - frames(model, stack[:1])).max() > 20
    for mode, of_mode in made.items():
        assert np.abs(of_mode.astype(int) - by_hand).max() <= 1, mode


@pytest.mark.parametrize("mode", ["adapter", "merge", "beside"])
def test_a_stack_is_the_same_to_the_bit_whatever_came_before(model: WanModel, stack: list[Adapter], mode: Any) -> None:
    model.apply_loras([])
    plain = frames(model, [])
    fresh = {order: frames(model, [stack[0], *(stack[n] for n in order)], mode) for order in ((1, 2, 3, 4), (4, 2, 1, 3))}
    alone = frames(model, stack[:1], mode)
    for other in ([], stack[:3], [stack[0], stack[4]]):
        for order, made in fresh.items():
            frames(model, other, "merge" if len(other) == 3 else mode)
            assert np.array_equal(frames(model, [stack[0], *(stack[n] for n in order)], mode), made)
    assert np.array_equal(frames(model, stack[:1], mode), alone)
    assert np.array_equal(frames(model, []), plain)


def test_only_what_differs_is_loaded_anew(model: WanModel, stack: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    louder = [stack[0], Adapter(stack[1].file, 1.0, is_extra=True)]
    model.apply_loras([])
    wanted = frames(model, louder)
    model.apply_loras([])
    model.apply_loras(stack[:2])
    monkeypatch.setattr(type(model._pipe.transformer), "load_lora_adapter", lambda *_, **__: pytest.fail("loaded anew"))
    assert np.array_equal(frames(model, louder), wanted)


@pytest.mark.parametrize("name", ["LoKr", "lightx2v", "bias"])
def test_a_stack_with_one_that_must_be_merged_is_merged_in_order(model: WanModel, write: Write, name: str) -> None:
    tensors, metadata = lora_zoo.merged()[name]
    first, second = lora_zoo.plain(1, 4), lora_zoo.plain(2, 8)
    adapters = [
        Adapter(write(first), 0.8),
        Adapter(write(tensors, metadata), 0.5, is_extra=True),
        Adapter(write(second), -0.3, is_extra=True),
    ]
    model.apply_loras([])
    plain = {key: value.clone() for key, value in model._pipe.transformer.named_parameters()}
    model.apply_loras(adapters)
    assert model.loras.plan(adapters, "adapter")["transformer"][0] == "merge"
    for key, value in model._pipe.transformer.named_parameters():
        wanted = expected(key, plain[key] + 0.8 * product(key, first), tensors, 0.5) - 0.3 * product(key, second)
        assert torch.allclose(value, wanted, atol=1e-5), key
    model.apply_loras([])
    assert all(torch.equal(value, plain[key]) for key, value in model._pipe.transformer.named_parameters())


# Two transformers


def two_sides(high: LoraFile, low: LoraFile, first: str, second: str) -> lora_zoo.Tensors:
    """One file with both sides, under two prefixes."""
    made = {}
    for file, prefix in ((high, first), (low, second)):
        for key, value in load_file(file.path).items():
            layer, _, part = key.removeprefix("diffusion_model.").partition(".lora_")
            made[f"{prefix}{layer.replace('.', '_') if prefix.endswith('_') else layer}.lora_{part}"] = value
    return made


TWO_SIDES = [
    ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
    ("transformer.", "transformer_2."),
    ("pipe.dit.", "pipe.dit2."),
    ("high_noise_model.", "low_noise_model."),
    ("high_noise.diffusion_model.", "low_noise.diffusion_model."),
    ("lora_transformer_1_", "lora_transformer_2_"),
    ("lora_transformer_", "lora_transformer_2_"),
    ("lora_unet_transformer_1_", "lora_unet_transformer_2_"),
    ("lora_unet_high_noise_", "lora_unet_low_noise_"),
]
"""Prefixes under which one file holds both sides."""


@pytest.mark.parametrize("prefixes", TWO_SIDES)
def test_split_lora_gives_each_side_a_file_that_reads_alone(write: Write, prefixes: tuple[str, str]) -> None:
    high, low = (write(lora_tensors(SIZE_14B, 4, seed)) for seed in (11, 12))
    both = write(two_sides(high, low, *prefixes))
    written = [LoraFile.read(path) for path in split_lora.split(both.path, both.path.parent)]
    assert [file.path.name for file in written] == [f"{both.path.stem}_{side}_noise.safetensors" for side in ("high", "low")]
    for file, original in zip(written, (high, low), strict=True):
        assert not read(file).has_both_sides
        assert {name: layer.outputs for name, layer in read(file).sides[None].items()} == {
            name: layer.outputs for name, layer in read(original).sides[None].items()
        }
        assert sum(value.sum() for value in load_file(file.path).values()) == sum(
            value.sum() for value in load_file(original.path).values()
        )


@pytest.mark.parametrize("mode", ["adapter", "merge"])
@pytest.mark.parametrize("prefixes", TWO_SIDES)
def test_an_extra_lora_goes_to_its_sides_alone(
    moe: WanModel, tiny: Path, write: Write, mode: Any, prefixes: tuple[str, str]
) -> None:
    main = Adapter(LoraFile.read(tiny / "loras/wan22_14b_t2v/wan22_14b_t2v_high_noise.safetensors"), 1.0, "high")
    high, low = (write(lora_tensors(SIZE_14B, 4, seed)) for seed in (11, 12))
    split = write(two_sides(high, low, *prefixes))
    apart = [Adapter(high, 0.5, "high", is_extra=True), Adapter(low, 0.5, "low", is_extra=True)]
    for sent, same_as in (("both", apart), ("high", apart[:1]), ("low", apart[1:])):
        wanted = frames(moe, [main, *same_as], mode)
        made = Adapter(split, 0.5, sent, is_extra=True)  # type: ignore[arg-type]
        assert np.array_equal(frames(moe, [main, made], mode), wanted), sent
    plan = moe.loras.plan([main, Adapter(high, 0.5, "both", is_extra=True)], mode)
    assert [len(stack) for _, stack in plan.values()] == [2, 1]
    moe.apply_loras([])


def test_an_extra_lora_with_nothing_for_its_side_is_refused(moe: WanModel, tiny: Path, write: Write) -> None:
    tensors = load_file(tiny / "loras/wan22_14b_t2v/wan22_14b_t2v_low_noise.safetensors")
    low = write({key.replace("diffusion_model.", "diffusion_model.transformer_2."): value for key, value in tensors.items()})
    with pytest.raises(LoraIncompatible, match='its keys name only the low side; send it with "transformer": "low" or "both"'):
        moe.loras.check(Adapter(low, 1.0, "high", is_extra=True))


def test_a_file_at_fault_is_named_behind_one_without_effect(
    model: WanModel, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter does not carry the first one, whose only difference is 0."""
    idle = Adapter(write({"diffusion_model.blocks.0.norm3.diff": torch.zeros(lora_zoo.WIDTH)}), 1.0)
    broken = Adapter(write(lora_zoo.plain(1, 4)), 1.0, is_extra=True)
    load = adapters.load_tensors

    def fail(file: LoraFile) -> Any:
        if file is broken.file:
            raise LoraInvalid("it cannot be read")
        return load(file)

    monkeypatch.setattr(adapters, "load_tensors", fail)
    with pytest.raises(LoraInvalid) as error:
        frames(model, [idle, broken])
    assert error.value.position == 1
