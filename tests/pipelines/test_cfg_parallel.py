"""Guidance in parallel: two processes make the frames of one, and what ends a video on one ends it on both."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from pipelines import Sampling, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.cfg_parallel import CfgParallel
from pipelines.errors import DeviceLost, LibraryMoved, OutOfMemory, RankFailed
from pipelines.recipes import Recipe, documented, preview
from pipelines.trained import TrainedWith
from tests.conftest import STAND_IN
from tests.pipelines.test_models import adapters

SAMPLING = Sampling("a boat", "blurry", width=32, height=32, num_frames=5, num_inference_steps=3)
PASSES_OF_A_RANK = 3
FAMILIES = ["wan22_14b_t2v", "wan22_5b"]


class Ranks:
    """Two ranks of any model: one in this process, one in another. `passes`: how often the transformers ran here."""

    def __init__(self, tiny: Path, store: Path) -> None:
        self._tiny = tiny
        ours, theirs = multiprocessing.Pipe()
        arguments = (tiny, store, theirs)
        self.process = multiprocessing.get_context("spawn").Process(target=other_rank, args=arguments, daemon=True)
        self.process.start()
        self._connection = ours
        self._parallel = CfgParallel(0, torch.device("cpu"), store)
        self._models: dict[str, WanModel] = {}

    def model(self, model_id: str) -> WanModel:
        if model_id not in self._models:
            self._models[model_id] = load(model_id, self._tiny)
            self._models[model_id].share_passes(self._parallel)
        return self._models[model_id]

    def video(self, model_id: str, sampling: Sampling, recipe: Recipe, fails_at: int = 0, loras: tuple[Any, ...] = ()) -> bytes:
        """The frames of a video. `fails_at`: the pass in which the other rank runs out of memory. Raises its error here."""
        model = self.model(model_id)
        if loras:
            self._connection.send((model_id, "apply_loras", loras, 0))
            model.apply_loras(*loras)
            assert self._connection.recv() is None
        self._connection.send((model_id, "denoise", (sampling, recipe), fails_at))
        error = None
        with counted(model) as self.passes:
            try:
                frames = b"".join(frames.tobytes() for frames in model.generate(sampling, recipe))
            except Exception as own:
                error = own
        answer = self._connection.recv()
        if error is not None:
            raise answer if isinstance(error, RankFailed) else error
        assert answer is None
        return frames

    def end(self) -> None:
        dist.destroy_process_group()
        self.process.kill()
        self.process.join()


def other_rank(tiny: Path, store: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    parallel, models = CfgParallel(1, torch.device("cpu"), store), {}
    while True:
        model_id, method, arguments, fails_at = connection.recv()
        if model_id not in models:
            models[model_id] = load(model_id, tiny)
            models[model_id].share_passes(parallel)
        with counted(models[model_id], fails_at) as passes:
            try:
                getattr(models[model_id], method)(*arguments)
                assert method != "denoise" or len(passes) == PASSES_OF_A_RANK
            except Exception as error:
                connection.send(error)
            else:
                connection.send(None)


def load(model_id: str, tiny: Path) -> WanModel:
    return load_pipeline(model_id, tiny, "cpu", toolkit_path=STAND_IN if MODELS[model_id].needs_toolkit else None)


@contextmanager
def counted(model: WanModel, fails_at: int = 0) -> Iterator[list[str]]:
    """Notes which transformer runs. The pass of this number fails."""
    passes: list[str] = []

    def hook(name: str) -> Any:
        def note(*_: Any) -> None:
            passes.append(name)
            if len(passes) == fails_at:
                raise torch.OutOfMemoryError("out of memory")

        return note

    hooks = [getattr(model._pipe, name).blocks[0].register_forward_pre_hook(hook(name)) for name in model.spec.transformers]
    try:
        yield passes
    finally:
        for it in hooks:
            it.remove()


@pytest.fixture(scope="module")
def ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    both = Ranks(tiny, tmp_path_factory.mktemp("ranks") / "store")
    yield both
    both.end()


def sampling_for(model_id: str, **changes: Any) -> Sampling:
    image = Image.fromarray(np.full((32, 32, 3), 99, np.uint8)) if MODELS[model_id].control_image == "required" else None
    return replace(SAMPLING, control_image=image, **changes)


@pytest.mark.parametrize("model_id", FAMILIES)
def test_two_ranks_make_the_frames_of_one_with_half_of_its_passes(ranks: Ranks, tiny: Path, model_id: str) -> None:
    alone, spec = load(model_id, tiny), MODELS[model_id]
    loras_of_it, quantization = adapters(model_id, tiny), TrainedWith(quantize=True).quantization(spec, None)
    ways = [
        ([], "adapter", None, documented(spec)),
        (loras_of_it, "adapter", None, documented(spec)),
        (loras_of_it, "merge", None, preview(spec, "flowmatch", "")),
        (loras_of_it, "beside", quantization, preview(spec, "flowmatch", "")),
    ]
    seen = set()
    for loras, mode, rounding, recipe in ways:
        sampling = sampling_for(model_id, guidance_scale_2=2.0 if spec.moe else None)
        alone.apply_loras(loras, mode, rounding)
        with counted(alone) as passes:
            expected = b"".join(frames.tobytes() for frames in alone.generate(sampling, recipe))
        seen.add(expected)
        assert ranks.video(model_id, sampling, recipe, loras=(loras, mode, rounding)) == expected
        assert ranks.passes == passes[::2], "a rank runs the conditional pass of each step and no other"
    assert len(seen) == len(ways)


def test_a_video_without_guidance_needs_no_other_rank(ranks: Ranks, tiny: Path) -> None:
    model, sampling = ranks.model("wan22_14b_t2v"), replace(SAMPLING, guidance_scale=1.0)
    model.apply_loras([])
    assert not model.shares(sampling, documented(model.spec))
    with counted(model) as passes:
        frames = b"".join(frames.tobytes() for frames in model.generate(sampling))
    assert len(passes) == SAMPLING.num_inference_steps
    assert frames == b"".join(frames.tobytes() for frames in load("wan22_14b_t2v", tiny).generate(sampling))


@pytest.mark.parametrize("fails_at", [1, 2, PASSES_OF_A_RANK])
def test_what_fails_on_one_rank_ends_the_video_on_both_and_the_next_one_is_right(ranks: Ranks, fails_at: int) -> None:
    recipe, nothing = documented(MODELS["wan22_14b_t2v"]), ([],)
    right = ranks.video("wan22_14b_t2v", SAMPLING, recipe, loras=nothing)
    with pytest.raises(OutOfMemory):
        ranks.video("wan22_14b_t2v", SAMPLING, recipe, fails_at)
    assert len(ranks.passes) <= fails_at
    assert ranks.video("wan22_14b_t2v", SAMPLING, recipe) == right
    here = ranks.model("wan22_14b_t2v")
    with pytest.raises(OutOfMemory), counted(here, fails_at):
        ranks.video("wan22_14b_t2v", SAMPLING, recipe)
    assert ranks.video("wan22_14b_t2v", SAMPLING, recipe) == right


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stop_after_any_step_ends_both_ranks_within_the_next_one(ranks: Ranks, step: int) -> None:
    class Stop(Exception):
        pass

    def on_step(done: int) -> None:
        if done == step:
            raise Stop

    model, recipe = ranks.model("wan22_14b_t2v"), documented(MODELS["wan22_14b_t2v"])
    ranks._connection.send(("wan22_14b_t2v", "denoise", (SAMPLING, recipe), 0))
    with pytest.raises(Stop):
        next(model.generate(SAMPLING, recipe, on_step))
    assert isinstance(ranks._connection.recv(), RankFailed)


def test_a_pipeline_with_another_order_of_passes_is_refused(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ranks.model("wan22_14b_t2v")
    run = model._parallel._pass
    monkeypatch.setattr(model._parallel, "_pass", lambda it, latents, compute: run(it, latents.clone(), compute))
    with pytest.raises(LibraryMoved, match="set GPUS=1"):
        ranks.video("wan22_14b_t2v", SAMPLING, documented(model.spec))


def test_a_rank_that_is_killed_is_a_lost_device(tiny: Path, ranks: Ranks) -> None:  # the last: the other rank is gone after it
    model = ranks.model("wan22_14b_t2v")
    ranks._connection.send(("wan22_14b_t2v", "denoise", (SAMPLING, documented(model.spec)), 0))
    with pytest.raises(DeviceLost):
        next(model.generate(SAMPLING, None, lambda done: ranks.process.kill()))
