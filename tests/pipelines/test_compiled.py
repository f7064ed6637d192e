"""Compiled blocks: nothing a LoRA can change is compiled in, and the frames stay what they are up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.switch import write_lora
from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.catalog import Quantize
from pipelines.compiled import VARIANTS
from pipelines.errors import DeviceUnavailable
from pipelines.lora.adapters import COMPILED_RANK
from pipelines.trained import TrainedWith

SAMPLING = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)


class Counting:
    """A compiler that leaves the code as it is, and counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _examples: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def frames_of(model: WanModel, sampling: Sampling = SAMPLING) -> np.ndarray:
    return np.concatenate(list(model.generate(sampling))).astype(int)


@pytest.fixture
def compiler() -> Counting:
    torch._dynamo.reset()
    return Counting()


@pytest.fixture
def model(tiny: Path, compiler: Counting) -> WanModel:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    model.compile_blocks(backend=compiler)
    return model


@pytest.fixture(scope="module")
def loras(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Adapter]]:
    """By their rank, two each."""
    folder = tmp_path_factory.mktemp("loras")
    plain = load_pipeline("wan21_1b", tiny, "cpu")
    return {
        rank: [write_lora(folder / f"{rank}-{seed}.safetensors", plain._pipe.transformer, rank, seed) for seed in (1, 2)]
        for rank in (4, 16, COMPILED_RANK, COMPILED_RANK + 8)
    }


def test_no_switch_between_loras_ranks_scales_and_modes_compiles_anything(
    model: WanModel, compiler: Counting, loras: dict[int, list[Adapter]]
) -> None:
    frames_of(model)
    model.apply_loras([loras[4][0]])
    frames_of(model)
    assert compiler.graphs == 2, "one without a LoRA and one with, for all blocks"
    first, second = loras[16]
    for adapter in (
        first,
        second,
        replace(second, scale=0.7),
        replace(first, scale=-1.0),
        loras[COMPILED_RANK][0],
        loras[4][1],
    ):
        model.apply_loras([adapter])
        frames_of(model)
    for mode_loras, mode in (([first], "merge"), ([loras[4][0]], "merge"), ([], "adapter"), ([second], "adapter")):
        model.apply_loras(mode_loras, mode)  # type: ignore[arg-type]
        frames_of(model)
    assert compiler.graphs == 2


@pytest.mark.parametrize("format", ["qfloat8", "uint4", "int8"])
def test_blocks_of_codes_are_compiled_once_without_a_lora_and_once_with_one(
    tiny: Path, compiler: Counting, loras: dict[int, list[Adapter]], format: Quantize
) -> None:
    model, plain = (load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16, quantize=format) for _ in range(2))
    model.compile_blocks(backend=compiler)
    counts = []
    for adapters, mode in (([], "adapter"), (loras[4], "adapter"), (loras[4], "merge"), (loras[16], "adapter")):
        for one in (model, plain):
            one.apply_loras(adapters[:1], mode)  # type: ignore[arg-type]
        assert (frames_of(model) == frames_of(plain)).all()
        counts.append(compiler.graphs)
    assert counts == [1, 2, 2, 2], "merge lies beside codes, and is not compiled"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_lora_of_a_larger_rank_compiles_once(model: WanModel, compiler: Counting, loras: dict[int, list[Adapter]]) -> None:
    for adapter in (loras[4][0], *loras[COMPILED_RANK + 8], loras[16][0], *loras[COMPILED_RANK + 8]):
        model.apply_loras([adapter])
        frames_of(model)
    assert compiler.graphs == 2


def test_a_second_size_compiles_once_more_and_a_third_does_not(model: WanModel, compiler: Counting) -> None:
    counts = []
    for width, height, num_frames in ((64, 64, 5), (96, 64, 5), (64, 96, 5), (128, 32, 5), (64, 64, 9), (160, 96, 9)):
        frames_of(model, replace(SAMPLING, width=width, height=height, num_frames=num_frames))
        counts.append(compiler.graphs)
    assert counts == [1, 2, 2, 2, 2, 2]


def test_a_block_that_cannot_be_compiled_runs_as_it_is_in_the_thread_of_the_gpu_too(tiny: Path) -> None:
    """torch keeps the compiler's settings by thread, and the model is loaded in another one than the jobs run in."""
    torch._dynamo.reset()
    model, plain = load_pipeline("wan21_1b", tiny, "cpu"), load_pipeline("wan21_1b", tiny, "cpu")
    seen: list[int] = []

    def broken(_graph: Any, _examples: Any) -> Callable[..., Any]:
        seen.append(torch._dynamo.config.recompile_limit)
        raise RuntimeError("no kernel")

    model.compile_blocks(backend=broken)
    with ThreadPoolExecutor(1) as thread:
        frames = thread.submit(frames_of, model).result()
    assert (frames == frames_of(plain)).all()
    assert seen and set(seen) == {VARIANTS}


def test_the_places_filled_up_with_zeros_change_no_frame_beyond_rounding(
    tiny: Path, model: WanModel, loras: dict[int, list[Adapter]]
) -> None:
    plain = load_pipeline("wan21_1b", tiny, "cpu")
    before = frames_of(plain)
    for adapter in (loras[16][0], loras[4][1], replace(loras[4][0], scale=0.3), loras[COMPILED_RANK + 8][1]):
        for one in (plain, model):
            one.apply_loras([adapter])
        theirs = frames_of(plain)
        assert abs(theirs - before).max() > 8, "the LoRA does something"
        assert abs(frames_of(model) - theirs).max() <= 1
    assert model.facts["compiled"] and not plain.facts["compiled"]


def test_a_lora_beside_the_layers_is_seen_although_they_are_compiled(
    model: WanModel, tiny: Path, loras: dict[int, list[Adapter]]
) -> None:
    frames_of(model)
    trained = TrainedWith(quantize=True)
    plain = load_pipeline("wan21_1b", tiny, "cpu")
    for quantization in (None, trained.quantization(model.spec, None)):
        for either in (model, plain):
            either.apply_loras(loras[4], "beside", quantization)
        assert (frames_of(model) == frames_of(plain)).all()
    model.apply_loras([])
    plain.apply_loras([])
    assert np.abs(frames_of(model) - frames_of(plain)).max() <= 1


def test_without_a_compiler_the_start_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = load_pipeline("wan21_1b", tiny, "cpu")
    with (
        config.patch({"cpp.cxx": (None, "/no/compiler")}),
        pytest.raises(DeviceUnavailable, match=r"install a C.. compiler"),
    ):
        model.compile_blocks(tmp_path)


def test_a_transformer_that_is_streamed_is_not_compiled(tiny: Path) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    model.facts["offload_mode"] = "group"
    with pytest.raises(DeviceUnavailable, match="COMPILE=1 does not work with OFFLOAD_MODE=group"):
        model.compile_blocks()
