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

from pipelines import Sampling, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.cfg_parallel import CfgParallel
from pipelines.errors import DeviceLost, DeviceUnavailable, LibraryMoved, OutOfMemory, RankFailed
from pipelines.recipes import Recipe, documented, preview
from pipelines.trained import TrainedWith
from tests.conftest import STAND_IN
from tests.pipelines.test_models import PICTURE, adapters
from tests.stand_in_device import StandInDevice

SAMPLING = Sampling("a boat", "blurry", width=32, height=32, num_frames=5, num_inference_steps=3)
PASSES_OF_A_RANK = 3
FAMILIES = ["wan22_14b_t2v", "wan22_5b"]
_PATCH = pytest.MonkeyPatch()


class Ranks:
    """Ranks of any model: one in this process, each other in one of its own. `passes`: how often the transformers ran here."""

    def __init__(self, tiny: Path, store: Path, number: int) -> None:
        self.number = number
        self._tiny = tiny
        context = multiprocessing.get_context("forkserver")  # the libraries are imported once for all of them
        context.set_forkserver_preload([__name__])
        self.processes, self._connections = [], []
        for rank in range(1, number):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(target=other_rank, args=(rank, number, tiny, store, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self._connections.append(ours)
        self._parallel = CfgParallel(0, torch.device("cpu"), store, number)
        self._models: dict[str, WanModel] = {}

    def model(self, model_id: str) -> WanModel:
        if model_id not in self._models:
            self._models[model_id] = load(model_id, self._tiny)
            self._models[model_id].share_passes(self._parallel)
        return self._models[model_id]

    def send(self, model_id: str, method: str, *arguments: Any, fails: tuple[int, int] = (0, 0)) -> None:
        """Have the other ranks call a method of the model. `fails`: a rank, and the pass in which it runs out of memory."""
        for rank, connection in enumerate(self._connections, 1):
            connection.send((model_id, method, arguments, fails[1] if rank == fails[0] else 0))

    def answers(self) -> list[Exception | None]:
        assert all(connection.poll(60) for connection in self._connections), "a rank waits in vain"
        return [connection.recv() for connection in self._connections]

    def video(
        self, model_id: str, sampling: Sampling, recipe: Recipe, loras: tuple[Any, ...] = (), fails: tuple[int, int] = (0, 0)
    ) -> bytes:
        """The frames of a video. Raises here the error of the rank that fails."""
        model = self.model(model_id)
        if loras:
            self.send(model_id, "apply_loras", *loras)
            model.apply_loras(*loras)
            assert not any(self.answers())
        self.send(model_id, "denoise", sampling, recipe, fails=fails)
        error = None
        with counted(model, 0 if fails[0] else fails[1]) as self.passes:
            try:
                frames = b"".join(frames.tobytes() for frames in model.generate(sampling, recipe))
            except Exception as own:
                error = own
        errors = [each for each in (error, *self.answers()) if each is not None]
        if errors:
            assert len(errors) == self.number, "the video ends on all ranks"
            (cause,) = (each for each in errors if not isinstance(each, RankFailed))
            raise cause
        return frames

    def end(self) -> None:
        dist.destroy_process_group()
        for process in self.processes:
            process.kill()
            process.join()


def other_rank(rank: int, number: int, tiny: Path, store: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    parallel, models = CfgParallel(rank, torch.device("cpu"), store, number), {}
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
                if isinstance(error, DeviceLost):
                    return
            else:
                connection.send(None)


def load(name: str, tiny: Path) -> WanModel:
    """`name`: a model id, or one with the offload mode in which it runs on a stand-in for a GPU's memory."""
    model_id, *modes = name.split()
    model = load_pipeline(model_id, tiny, "cpu", toolkit_path=STAND_IN if MODELS[model_id].needs_toolkit else None)
    for mode in modes:
        StandInDevice(_PATCH).place(model, mode)  # type: ignore[arg-type]
    return model


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


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    of_a_worker = Ranks(tiny, tmp_path_factory.mktemp("ranks") / "store", request.param)
    yield of_a_worker
    of_a_worker.end()
    _PATCH.undo()


two = pytest.mark.parametrize("ranks", [2], indirect=True, scope="module")
four = pytest.mark.parametrize("ranks", [4], indirect=True, scope="module")


def sampling_for(model_id: str, **changes: Any) -> Sampling:
    image = PICTURE if MODELS[model_id].control_image == "required" else None
    return replace(SAMPLING, **{"control_image": image, **changes})


def video_of_one_rank(model: WanModel, sampling: Sampling, recipe: Recipe) -> bytes:
    """The frames that the model makes with the LoRAs it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_parallel", None)
        return b"".join(frames.tobytes() for frames in model.generate(sampling, recipe))


@two
@pytest.mark.parametrize("model_id", FAMILIES)
def test_two_ranks_make_the_frames_of_one_with_half_of_its_passes(ranks: Ranks, tiny: Path, model_id: str) -> None:
    model, spec = ranks.model(model_id), MODELS[model_id]
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
        shared = ranks.video(model_id, sampling, recipe, loras=(loras, mode, rounding))
        with counted(model) as passes:
            alone = video_of_one_rank(model, sampling, recipe)
        seen.add(alone)
        assert shared == alone
        assert ranks.passes == passes[::2], "a rank runs the conditional pass of each step and no other"
    assert len(seen) == len(ways)


@two
def test_ranks_with_other_weights_share_no_video(ranks: Ranks) -> None:
    model = ranks.model("wan22_14b_t2v")
    model.check_equal({**model.facts, "offload_mode": "swap"})
    with pytest.raises(DeviceUnavailable, match="quantize None and uint4"):
        model.check_equal({**model.facts, "quantize": "uint4"})


@two
@pytest.mark.parametrize("mode", ["group", "swap"])
def test_two_ranks_share_the_passes_of_transformers_that_wait_in_memory(ranks: Ranks, mode: str) -> None:
    name, recipe = f"wan22_14b_t2v {mode}", documented(MODELS["wan22_14b_t2v"])
    shared = ranks.video(name, SAMPLING, recipe)
    assert len(ranks.passes) == PASSES_OF_A_RANK
    assert ranks.video(name, SAMPLING, recipe) == shared, "the hooks are as they were"
    assert video_of_one_rank(ranks.model(name), SAMPLING, recipe) == shared


@two
def test_a_video_without_guidance_needs_no_other_rank(ranks: Ranks, tiny: Path) -> None:
    model, sampling = ranks.model("wan22_14b_t2v"), replace(SAMPLING, guidance_scale=1.0)
    model.apply_loras([])
    assert not model.shares(sampling, documented(model.spec))
    with counted(model) as passes:
        frames = b"".join(frames.tobytes() for frames in model.generate(sampling))
    assert len(passes) == SAMPLING.num_inference_steps
    assert frames == b"".join(frames.tobytes() for frames in load("wan22_14b_t2v", tiny).generate(sampling))


@four
@pytest.mark.parametrize(
    ("model_id", "num_frames"),
    [("wan22_14b_t2v", 9), ("wan22_5b", 5), ("wan21_i2v_14b", 9)],
    ids=["12 tokens, 4 heads", "2 tokens with a timestep each, 3 heads", "27 tokens, 4 heads"],
)
def test_four_ranks_make_the_frames_of_one_but_for_the_last_bit(
    ranks: Ranks, tiny: Path, model_id: str, num_frames: int
) -> None:
    model, loras = ranks.model(model_id), adapters(model_id, tiny)
    spec, with_image = model.spec, {} if model.spec.control_image == "none" else {"control_image": PICTURE}
    ways: list[tuple[Any, ...]] = [({}, []), ({}, loras, "merge"), (with_image, loras)]
    if spec.moe:
        quantization = TrainedWith(quantize=True).quantization(spec, None)
        ways += [({}, loras, "beside", quantization), ({"guidance_scale": 1.0}, [])]
    seen = set()
    for changes, *how in ways:
        asked = sampling_for(model_id, num_frames=num_frames, width=48, height=48, **changes)
        split, whole = (
            np.frombuffer(frames, np.uint8).astype(int)
            for frames in (
                ranks.video(model_id, asked, documented(spec), loras=tuple(how)),
                video_of_one_rank(model, asked, documented(spec)),
            )
        )
        assert np.abs(split - whole).max() <= 1
        assert np.abs(split - whole).mean() < 0.001
        seen.add(whole.tobytes())
    assert len(seen) > 1, "the LoRAs change the frames"


@four
def test_a_video_with_fewer_tokens_than_ranks_is_computed_whole_by_each(ranks: Ranks) -> None:
    sampling, recipe = sampling_for("wan22_5b", guidance_scale=1.0), documented(MODELS["wan22_5b"])
    shared = ranks.video("wan22_5b", sampling, recipe, loras=([],))
    assert shared == video_of_one_rank(ranks.model("wan22_5b"), sampling, recipe)


@pytest.mark.parametrize(("at_fault", "fails_at"), [(0, 1), (1, 2), (-1, PASSES_OF_A_RANK)])
def test_what_fails_on_one_rank_ends_the_video_on_all_and_the_next_one_is_right(
    ranks: Ranks, at_fault: int, fails_at: int
) -> None:
    recipe = documented(MODELS["wan22_14b_t2v"])
    right = ranks.video("wan22_14b_t2v", SAMPLING, recipe, loras=([],))
    with pytest.raises(OutOfMemory):
        ranks.video("wan22_14b_t2v", SAMPLING, recipe, fails=(at_fault % ranks.number, fails_at))
    assert len(ranks.passes) <= fails_at
    assert ranks.video("wan22_14b_t2v", SAMPLING, recipe) == right


@two
def test_a_picture_that_finds_no_memory_on_one_rank_ends_the_video_on_all(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    model = ranks.model("wan22_14b_t2v")
    monkeypatch.setattr(model, "_fit", full)
    with pytest.raises(OutOfMemory):
        ranks.video("wan22_14b_t2v", SAMPLING, documented(model.spec))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stop_after_any_step_ends_all_ranks_within_the_next_one(ranks: Ranks, step: int) -> None:
    check_stop(ranks, SAMPLING, step)


@four
def test_a_stop_without_guidance_ends_all_ranks_too(ranks: Ranks) -> None:
    check_stop(ranks, replace(SAMPLING, guidance_scale=1.0), step=1)


def check_stop(ranks: Ranks, sampling: Sampling, step: int) -> None:
    class Stop(Exception):
        pass

    def on_step(done: int) -> None:
        if done == step:
            raise Stop

    model, recipe = ranks.model("wan22_14b_t2v"), documented(MODELS["wan22_14b_t2v"])
    ranks.send("wan22_14b_t2v", "denoise", sampling, recipe)
    with pytest.raises(Stop):
        next(model.generate(sampling, recipe, on_step))
    assert all(isinstance(answer, RankFailed) for answer in ranks.answers())


@two
def test_a_pipeline_with_another_order_of_passes_is_refused(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ranks.model("wan22_14b_t2v")
    run = model._parallel._pass
    monkeypatch.setattr(model._parallel, "_pass", lambda it, latents, compute: run(it, latents.clone(), compute))
    with pytest.raises(LibraryMoved, match="set GPUS=1"):
        ranks.video("wan22_14b_t2v", SAMPLING, documented(model.spec))


def test_a_rank_that_is_killed_is_a_lost_device(ranks: Ranks) -> None:  # the last: the others are of no use after it
    model = ranks.model("wan22_14b_t2v")
    ranks.send("wan22_14b_t2v", "denoise", SAMPLING, documented(model.spec))
    with pytest.raises(DeviceLost):
        next(model.generate(SAMPLING, None, lambda done: ranks.processes[0].kill()))
