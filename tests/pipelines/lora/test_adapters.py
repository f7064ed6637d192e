"""LoRAs on loaded transformers: what is refused before a weight is touched, and that a switch leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.tiny_checkpoints import SIZE_1B, lora_metadata, lora_tensors
from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.errors import LoraIncompatible, LoraInvalid
from pipelines.lora.arithmetic import load_tensors
from pipelines.lora.file import LoraFile
from tools import split_lora
from tools.cli import BadInput


@pytest.fixture(scope="module")
def small(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu")


@pytest.fixture(scope="module")
def moe(tiny: Path) -> WanModel:
    return load_pipeline("wan22_14b_t2v", tiny, "cpu")


@pytest.fixture(autouse=True)
def plain_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("small", "moe"):
        if name in request.fixturenames:
            request.getfixturevalue(name).apply_loras([])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., LoraFile]:
    """Write tensors as a LoRA file."""

    def write(tensors: dict[str, torch.Tensor], name: str = "lora", base: str = "wan_2.1") -> LoraFile:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=lora_metadata(name, base))
        return LoraFile.read(path)

    return write


def frames(model: WanModel) -> np.ndarray:
    return np.concatenate(list(model.generate(Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2))))


def rank(tiny: Path, number: int) -> LoraFile:
    return LoraFile.read(tiny / f"loras/wan21_1b/rank{number}.safetensors")


def side(tiny: Path, name: str, job: str = "wan22_14b_t2v") -> Adapter:
    return Adapter(LoraFile.read(tiny / f"loras/{job}/{job}_{name}_noise.safetensors"), 1.0, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [(4, 64), (64, 4), (16, 64, 4)])
def test_any_rank_can_follow_any_other(small: WanModel, tiny: Path, order: tuple[int, ...]) -> None:
    small.apply_loras([Adapter(rank(tiny, order[-1]))])
    alone = frames(small)
    small.apply_loras([])
    for number in order:
        small.apply_loras([Adapter(rank(tiny, number))])
    assert np.array_equal(frames(small), alone)


@pytest.mark.parametrize("number", [1, 256])
def test_ranks_from_1_to_256_load(small: WanModel, write: Callable[..., LoraFile], number: int) -> None:
    plain = frames(small)
    small.apply_loras([Adapter(write(lora_tensors(SIZE_1B, number, seed=number)))])
    assert not np.array_equal(frames(small), plain)


def test_without_loras_the_base_model_is_back_to_the_bit(small: WanModel, tiny: Path) -> None:
    before = {name: value.clone() for name, value in small._pipe.transformer.state_dict().items()}
    plain = frames(small)
    small.apply_loras([Adapter(rank(tiny, 16), scale=2.0)])
    small.apply_loras([])
    after = small._pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert np.array_equal(frames(small), plain)


def test_a_changed_scale_keeps_the_loaded_weights(small: WanModel, tiny: Path) -> None:
    small.apply_loras([Adapter(rank(tiny, 16), scale=1.0)])
    loaded = [parameter.data_ptr() for parameter in small._pipe.transformer.parameters()]
    strong = frames(small)
    small.apply_loras([Adapter(rank(tiny, 16), scale=0.25)])
    assert [parameter.data_ptr() for parameter in small._pipe.transformer.parameters()] == loaded
    assert not np.array_equal(frames(small), strong)


def test_scale_0_is_the_base_model_and_says_so(small: WanModel, tiny: Path) -> None:
    plain = frames(small)
    adapter = Adapter(rank(tiny, 16), scale=0.0)
    assert "no effect" in " ".join(small.loras.check(adapter))
    small.apply_loras([adapter])
    assert np.array_equal(frames(small), plain)


def test_a_file_replaced_under_the_same_name_is_another_lora(small: WanModel, write: Callable[..., LoraFile]) -> None:
    small.apply_loras([Adapter(write(lora_tensors(SIZE_1B, 4, seed=1)))])
    first = frames(small)
    small.apply_loras([Adapter(write(lora_tensors(SIZE_1B, 8, seed=2)))])
    assert not np.array_equal(frames(small), first)


def test_a_missing_side_leaves_its_transformer_untouched(moe: WanModel, tiny: Path) -> None:
    plain = frames(moe)
    for given, other in (("high", "transformer_2"), ("low", "transformer")):
        moe.apply_loras([side(tiny, "high"), side(tiny, "low")])
        moe.apply_loras([side(tiny, given)])
        assert not any("lora" in name for name, _ in getattr(moe._pipe, other).named_parameters())
        assert not np.array_equal(frames(moe), plain)


def test_the_sides_are_not_interchangeable(moe: WanModel, tiny: Path) -> None:
    high, low = side(tiny, "high"), side(tiny, "low")
    moe.apply_loras([high, low])
    right = frames(moe)
    swapped = [Adapter(low.file, 1.0, "high"), Adapter(high.file, 1.0, "low")]
    assert "sent as the high side" in " ".join(moe.loras.check(swapped[0]))
    moe.apply_loras(swapped)
    assert not np.array_equal(frames(moe), right)


def test_after_a_failed_load_every_transformer_is_plain_and_the_next_job_is_right(
    moe: WanModel, tiny: Path, write: Callable[..., LoraFile]
) -> None:
    plain = frames(moe)
    moe.apply_loras([side(tiny, "high"), side(tiny, "low")])
    good = frames(moe)
    unchecked = write(lora_tensors(SIZE_1B, 4, seed=1))
    with pytest.raises(LoraIncompatible) as error:
        moe.apply_loras([side(tiny, "high"), Adapter(unchecked, 1.0, "low")])
    assert error.value.position == 1
    assert np.array_equal(frames(moe), plain)
    moe.apply_loras([side(tiny, "high"), side(tiny, "low")])
    assert np.array_equal(frames(moe), good)


@pytest.mark.parametrize(
    ("path", "looks_like"),
    [
        ("wan21_14b/rank8", "wan21_14b (hidden size 48, 3 blocks, base model wan_2.1)"),
        ("wan21_i2v/rank8", "wan21_i2v_14b or wan21_i2v_14b480p"),
        ("wan22_5b/rank8", "wan22_5b (hidden size 36, 2 blocks, base model wan_2.2_5b)"),
        ("wan22_14b_t2v/wan22_14b_t2v_low_noise", "wan22_14b_i2v or wan22_14b_t2v"),
    ],
)
def test_a_lora_of_another_model_is_refused_and_told_where_it_belongs(
    small: WanModel, tiny: Path, path: str, looks_like: str
) -> None:
    file = LoraFile.read(tiny / f"loras/{path}.safetensors")
    with pytest.raises(LoraIncompatible) as refusal:
        small.loras.check(Adapter(file))
    assert f"looks trained for {looks_like}" in str(refusal.value)
    assert "do not fit wan21_1b" in str(refusal.value)


def test_checking_touches_no_weight(small: WanModel, tiny: Path) -> None:
    before = [parameter.data_ptr() for parameter in small._pipe.transformer.parameters()]
    small.loras.check(Adapter(rank(tiny, 4)))
    assert [parameter.data_ptr() for parameter in small._pipe.transformer.parameters()] == before


def test_image_keys_on_a_text_model_of_the_same_size_are_refused(tiny: Path) -> None:
    model = load_pipeline("wan21_14b", tiny, "cpu")
    with pytest.raises(LoraIncompatible, match=r"add_k_proj.* is not in this model.*wan21_i2v_14b"):
        model.loras.check(Adapter(LoraFile.read(tiny / "loras/wan21_i2v/rank8.safetensors")))


def test_a_text_lora_on_an_image_model_is_applied_with_a_warning(tiny: Path) -> None:
    model = load_pipeline("wan21_i2v_14b480p", tiny, "cpu")
    adapter = Adapter(LoraFile.read(tiny / "loras/wan21_14b/rank8.safetensors"))
    assert "no image keys" in " ".join(model.loras.check(adapter))
    model.apply_loras([adapter])


def test_a_lora_of_another_base_model_with_the_same_shapes_is_applied_with_a_warning(moe: WanModel, tiny: Path) -> None:
    adapter = Adapter(LoraFile.read(tiny / "loras/wan21_14b/rank8.safetensors"), 1.0, "low")
    assert "looks trained for wan21_14b" in " ".join(moe.loras.check(adapter))
    moe.apply_loras([adapter])


def test_keys_that_have_no_effect_are_named(small: WanModel, write: Callable[..., LoraFile]) -> None:
    extra = {"diffusion_model.blocks.0.norm3.diff": torch.zeros(24), "diffusion_model.blocks.1.norm3.diff_b": torch.zeros(24)}
    file = write({**lora_tensors(SIZE_1B, 4, seed=1), **extra})
    assert any("2 keys" in warning and "norm3.diff" in warning for warning in small.loras.check(Adapter(file)))


def test_a_lora_that_was_never_trained_says_that_it_does_nothing(small: WanModel, write: Callable[..., LoraFile]) -> None:
    for half in ("lora_A", "lora_B"):
        untrained = {key: value * (half not in key) for key, value in lora_tensors(SIZE_1B, 4, seed=1).items()}
        adapter = Adapter(write(untrained, half))
        for _ in range(2):  # every time, not only when it is loaded
            assert "no effect" in " ".join(small.loras.check(adapter))
            small.apply_loras([adapter])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused_before_a_weight_is_touched(
    small: WanModel, write: Callable[..., LoraFile], value: float
) -> None:
    tensors = lora_tensors(SIZE_1B, 4, seed=1)
    tensors["diffusion_model.blocks.0.ffn.0.lora_B.weight"][0, 0] = value
    with pytest.raises(LoraInvalid, match=r"ffn.0.lora_B.weight` contains NaN or infinity"):
        small.loras.check(Adapter(write(tensors)))


@pytest.mark.parametrize("mode", ["adapter", "merge", "beside"])
def test_weights_that_are_far_too_large_are_an_error_and_no_black_video(
    small: WanModel, tiny: Path, write: Callable[..., LoraFile], mode: Any
) -> None:
    small.apply_loras([Adapter(rank(tiny, 4))])
    before = frames(small)
    adapter = Adapter(write({key: value * 1e30 for key, value in lora_tensors(SIZE_1B, 4, seed=1).items()}))
    small.loras.check(adapter, mode)
    small.apply_loras([adapter], mode)
    with pytest.raises(LoraInvalid, match=r"not finite: the LoRA's values are too large; lower its network_multiplier"):
        frames(small)
    small.apply_loras([Adapter(rank(tiny, 4))])
    assert (frames(small) == before).all()


def test_a_file_that_is_saved_anew_while_it_is_read_is_an_error(write: Callable[..., LoraFile]) -> None:
    """A mapped file would end the process with SIGBUS."""
    tensors = lora_tensors(SIZE_1B, 4, seed=1)
    file = write(tensors)
    whole = load_tensors(file)
    file.path.write_bytes(file.path.read_bytes()[:200])
    assert all(torch.equal(whole[key], tensors[key]) for key in tensors)
    with pytest.raises(LoraInvalid, match="the file was replaced"):
        load_tensors(file)
    file.path.write_bytes(b"")
    with pytest.raises(LoraInvalid, match="the file was replaced"):
        load_tensors(file)


def test_weights_that_are_no_floats_are_refused(small: WanModel, write: Callable[..., LoraFile]) -> None:
    tensors = {key: value.to(torch.int8) for key, value in lora_tensors(SIZE_1B, 4, seed=1).items()}
    with pytest.raises(LoraInvalid, match="stored as I8"):
        small.loras.check(Adapter(write(tensors)))


def test_alpha_scales_as_it_does_in_diffusers(small: WanModel, write: Callable[..., LoraFile]) -> None:
    tensors = {key: value.float() for key, value in lora_tensors(SIZE_1B, 4, seed=1).items()}
    half = {**tensors}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            half[key.replace("lora_A.weight", "alpha")] = torch.tensor(2.0)
    small.apply_loras([Adapter(write(tensors), scale=0.5)])
    scaled = frames(small)
    with_alpha = write(half, "alpha")
    assert small.loras.check(Adapter(with_alpha)) == []
    small.apply_loras([Adapter(with_alpha)])
    assert np.abs(frames(small).astype(int) - scaled).max() <= 1


def test_some_blocks_only_is_fine(small: WanModel, write: Callable[..., LoraFile]) -> None:
    plain = frames(small)
    tensors = {key: value for key, value in lora_tensors(SIZE_1B, 4, seed=1).items() if ".blocks.1." in key}
    small.apply_loras([Adapter(write(tensors))])
    assert not np.array_equal(frames(small), plain)


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ({"model.weight": torch.ones(2)}, LoraIncompatible, "no lora_A and lora_B keys, only such as `model.weight`"),
        ({"diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(2, 2)}, LoraInvalid, "lacks its lokr_w2"),
        (
            lora_tensors(SIZE_1B, 4, 1) | {"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(2)},
            LoraIncompatible,
            "magnitude of 2 numbers for 48 outputs",
        ),
        (
            lora_tensors(SIZE_1B, 4, 1) | {"diffusion_model.foo.lora_bar.weight": torch.ones(2)},
            LoraIncompatible,
            "`diffusion_model.foo.lora_bar.weight` is a part that no LoRA or LoKr",
        ),
        (
            lora_tensors(SIZE_1B, 4, 1) | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(25)},
            LoraIncompatible,
            "1 of its 20 layers.*diff_b of 25 numbers for 24 outputs",
        ),
        (
            {
                "diffusion_model.transformer_1.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 24),
                "diffusion_model.transformer_1.blocks.0.self_attn.q.lora_B.weight": torch.ones(24, 4),
            },
            LoraIncompatible,
            "it holds a high and a low side .*, and wan21_1b has one transformer",
        ),
        (
            {
                "diffusion_model.img_in.lora_A.weight": torch.ones(4, 24),
                "diffusion_model.img_in.lora_B.weight": torch.ones(24, 4),
            },
            LoraIncompatible,
            "img_in is not in this model. It is not a LoRA for Wan",
        ),
        (
            {
                f"diffusion_model.blocks.{'9' * 200}.a.lora_A.weight": torch.ones(4, 4),
                f"diffusion_model.blocks.{'9' * 200}.a.lora_B.weight": torch.ones(4, 4),
            },
            LoraIncompatible,
            "999.a is not in this model",
        ),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 24)}, LoraInvalid, "lacks its lora_B"),
        (
            {
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 24),
                "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.ones(24, 8),
            },
            LoraInvalid,
            "rank 4 in lora_A and 8 in lora_B",
        ),
    ],
    ids=[
        "no LoRA",
        "half a LoKr",
        "DoRA",
        "foreign keys",
        "endless blocks",
        "a single bias",
        "both sides in one",
        "foreign keys",
        "half a pair",
        "two ranks",
    ],
)
def test_files_that_are_no_lora_for_wan_are_refused(
    small: WanModel, write: Callable[..., LoraFile], tensors: dict, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        small.loras.check(Adapter(write(tensors)))


Q = "diffusion_model.blocks.0.self_attn.q"
NORM = "diffusion_model.blocks.0.norm9"
PLAIN = lora_tensors(SIZE_1B, 4, 1)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({f"{Q}.alpha": torch.tensor(-1.0)}, LoraInvalid, "is negative"),
        ({"diffusion_model.blocks.7.self_attn.q.alpha": torch.tensor(1.0)}, LoraInvalid, "not in the file"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 24), f"{Q}.lora_B.weight": torch.ones(24, 0)}, LoraInvalid, "has rank 0"),
        ({f"{Q}.lora_A.weight": torch.full((4, 24), 1e300, dtype=torch.float64)}, LoraInvalid, "NaN or infinity"),
        (
            {"diffusion_model.blocks.-9999999999.self_attn.q.lora_A.weight": torch.ones(4, 24)},
            LoraInvalid,
            "blocks.-9999999999.self_attn.q lacks its lora_B",
        ),
        (
            {"diffusion_model.blocks.9_999_999_999.self_attn.q.lora_A.weight": torch.ones(4, 24)},
            LoraInvalid,
            "blocks.9_999_999_999.self_attn.q lacks its lora_B",
        ),
        ({f"{'x' * 16}blocks.1_000_000_000.norm1.diff": torch.ones(4)}, LoraIncompatible, "is not in this model"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(23)}, LoraIncompatible, "magnitude of 23 numbers for 24 outputs"),
        ({f"{NORM}.lokr_w1": torch.ones(2, 2, 2), f"{NORM}.lokr_w2": torch.ones(2, 2)}, LoraInvalid, "lacks its lokr_w1"),
        (
            {f"{NORM}.lokr_w1": torch.ones(2, 2), f"{NORM}.lokr_w2": torch.ones(12, 12), f"{NORM}.lokr_t2": torch.ones(2)},
            LoraIncompatible,
            "lokr_t2` does not go with the LoKr factors",
        ),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, LoraIncompatible, "does not go with the LoKr factors"),
    ],
)
def test_what_the_loading_code_would_choke_on_is_refused_first(
    small: WanModel, write: Callable[..., LoraFile], changes: dict, error: type[Exception], says: str
) -> None:
    for mode in ("adapter", "merge"):
        with pytest.raises(error, match=says):
            small.loras.check(Adapter(write(PLAIN | changes)), mode)  # type: ignore[arg-type]


def test_a_part_that_no_lora_has_is_refused(small: WanModel, write: Callable[..., LoraFile]) -> None:
    layer = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 24), f"{layer}.lora_B.weight": torch.ones(24, 4)}
    for mode in ("adapter", "merge"):
        with pytest.raises(LoraIncompatible, match=r"to_q.lora_mid.weight` is a part that no LoRA or LoKr for Wan has"):
            small.loras.check(Adapter(write(tensors | {f"{layer}.lora_mid.weight": torch.ones(4, 4)})), mode)  # type: ignore[arg-type]
    with pytest.raises(LoraInvalid, match=r"are the same part of layer blocks\.0\.attn1\.to_q"):
        small.loras.check(Adapter(write(tensors | {f"{layer}.lora_A.default.weight": torch.ones(4, 24)})))


@pytest.mark.parametrize("change", ["nothing", "rank", "dtype", "layers", "alpha"])
def test_a_lora_takes_the_place_of_one_of_the_same_shapes_and_of_no_other(
    small: WanModel, write: Callable[..., LoraFile], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    first = lora_tensors(SIZE_1B, 8, 1)
    other = lora_tensors(SIZE_1B, 4 if change == "rank" else 8, 2)
    if change == "dtype":
        other = {key: value.float() for key, value in other.items()}
    if change == "layers":
        other = {key: value for key, value in other.items() if "ffn" not in key}
    if change == "alpha":
        other |= {key.replace("lora_A.weight", "alpha"): torch.tensor(4.0) for key in other if "lora_A" in key}
    one, two = write(first, "one"), write(other, "two")
    small.apply_loras([])
    small.apply_loras([Adapter(two, 0.7)])
    alone = frames(small)
    small.apply_loras([])
    small.apply_loras([Adapter(one)])
    loads = []
    transformer = type(small._pipe.transformer)
    load = transformer.load_lora_adapter
    monkeypatch.setattr(transformer, "load_lora_adapter", lambda *given, **named: loads.append(1) or load(*given, **named))
    small.apply_loras([Adapter(two, 0.7)])
    assert np.array_equal(frames(small), alone)
    assert len(loads) == (change not in ("nothing", "alpha"))


# Both sides in one file, as ai-toolkit writes it with split_multistage_loras: false


@pytest.fixture
def combined(tiny: Path, tmp_path: Path) -> LoraFile:
    tensors = {}
    for number, name in ((1, "high"), (2, "low")):
        for key, value in load_file(side(tiny, name).file.path).items():
            tensors[key.replace("diffusion_model.", f"diffusion_model.transformer_{number}.")] = value
    save_file(tensors, tmp_path / "combined.safetensors", metadata=lora_metadata("combined", "wan_2.2_14b"))
    return LoraFile.read(tmp_path / "combined.safetensors")


@pytest.mark.parametrize("mode", ["adapter", "merge"])
def test_a_file_with_both_sides_is_the_pair_whichever_way_it_is_sent(
    moe: WanModel, tiny: Path, combined: LoraFile, mode: Any
) -> None:
    moe.apply_loras([side(tiny, "high"), side(tiny, "low")], mode)
    pair = frames(moe)
    for sent in (["high"], ["low"], ["high", "low"]):
        adapters = [Adapter(combined, 1.0, name) for name in sent]  # type: ignore[arg-type]
        assert any("holds the high and the low side" in text for text in moe.loras.check(adapters[0], mode))
        moe.apply_loras(adapters, mode)
        assert np.array_equal(frames(moe), pair), sent
    moe.apply_loras([])


def test_beside_a_low_lora_a_file_with_both_sides_gives_its_high_one(moe: WanModel, tiny: Path, combined: LoraFile) -> None:
    mixed = side(tiny, "low", "wan22_14b_t2v_mixed")
    moe.apply_loras([side(tiny, "high"), mixed])
    expected = frames(moe)
    moe.apply_loras([Adapter(combined, 1.0, "high"), mixed])
    assert np.array_equal(frames(moe), expected)
    moe.apply_loras([])


def test_split_lora_writes_the_two_files(tiny: Path, combined: LoraFile) -> None:
    written = split_lora.split(combined.path, combined.path.parent)
    assert [path.name for path in written] == ["combined_high_noise.safetensors", "combined_low_noise.safetensors"]
    for path, name in zip(written, ("high", "low"), strict=True):
        original = load_file(side(tiny, name).file.path)
        assert {key: value.tolist() for key, value in load_file(path).items()} == {k: v.tolist() for k, v in original.items()}
    with pytest.raises(BadInput, match="holds one side"):
        split_lora.split(written[0], combined.path.parent)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("job_high_noise.safetensors", True),
        ("job_HIGH.safetensors", True),
        ("my-high-noise-lora.safetensors", True),
        ("high_noise_model.safetensors", True),
        ("job_low_noise.safetensors", False),
        ("highlands.safetensors", False),
        ("high_and_low.safetensors", False),
    ],
)
def test_high_sent_as_low_is_noticed_by_the_name_that_the_user_gave(moe: WanModel, tiny: Path, name: str, told: bool) -> None:
    file = side(tiny, "low", "wan22_14b_t2v").file
    warnings = moe.loras.check(Adapter(file, 1.0, "low", name))
    assert any(f"the file is named `{name}`, but was sent as the low side" in text for text in warnings) == told


def test_a_lora_that_fails_on_one_side_leaves_the_other_side_plain_too(
    moe: WanModel, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LoraInvalid("the file was replaced")

    plain = frames(moe)
    with monkeypatch.context() as patch:
        patch.setattr(moe.loras._beside["transformer_2"], "apply", fail)
        with pytest.raises(LoraInvalid):
            moe.apply_loras([side(tiny, "high"), side(tiny, "low")], "beside")
    assert (frames(moe) == plain).all()
