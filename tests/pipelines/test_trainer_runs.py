"""From a training's config.yaml to the frames that its trainer showed: real runs of ai-toolkit, in bf16 and quantized."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from client.training.requests import model_of, requests_of
from client.training.samples import read_training
from pipelines import Adapter, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.lora.file import LoraFile
from pipelines.recipes import preview
from pipelines.trained import TrainedWith
from tests.conftest import REAL_TOOLKIT, STAND_IN
from tests.integration.test_local_api import file_of, output_of
from tests.pipelines.test_models import lora_paths, make
from tests.worker_process import LocalApi, environment, local_api
from worker.decide import shots_of
from worker.image_decode import Allowance
from worker.images import load_control_image
from worker.parse import parse

RUNS = Path(__file__).parent.parent / "trainer_runs"


NEAR = {
    "wan21_1b_bf16save32/s8_0": 1.0,  # the drift of an unquantized training's second round
    "example_wan21_14b/s8_0": 1.6,  # these LoRAs were saved in 16 bits
    "wan21_i2v_14b_v_bf16/s4_0": 1.2,
    "wan22_14b_t2v_uifull/s8_0": 1.6,
    "wan22_5b_tiled/s8_1": 0.02,
}
"""Largest mean difference of a video's last frame, of 255; all other videos are exact."""

ON_ANOTHER_CPU = {"float32": 0.01, "bfloat16": 2.0}
"""The same where the CPU rounds otherwise than the trainer's, which had AVX-512: with AVX2 0.001 and 1.7 were measured."""

PROBE = ("wan21_1b_bf16save32", "s0_0")
"""A sample from before the training, without a LoRA. It tells whether this CPU rounds as the trainer's did."""

PROBES_OF_THEIR_OWN = ("wan21_1b_differences", "wan21_1b_multipliers")
"""Runs on another kind of CPU with AVX-512. Of their two samples, each tells what can be expected of the other."""


def facts_of(run: str) -> dict[str, Any]:
    return json.loads((RUNS / run / "run.json").read_text())


CASES = [(path.parent.name, key) for path in sorted(RUNS.glob("*/run.json")) for key in facts_of(path.parent.name)["videos"]]


def request_of(run: str, key: str, folder: Path) -> dict[str, Any]:
    """The request that the project's own command makes of the config, for one sample of one round."""
    config = folder / "config.yaml"
    config.write_text((RUNS / run / "config.yaml").read_text().replace("TRAINING/data/", f"{RUNS}/"))
    training = read_training(config)
    spec = MODELS[model_of(training.model)]
    step, number = key[1:].split("_")
    at = "" if step in ("0", "8") else f"_{int(step):09d}"
    sides = [f"_{side}_noise" for side in ("high", "low")] if spec.moe else [""]
    requests, _ = requests_of(training, spec, [f"{run}{at}{side}.safetensors" for side in sides], folder, "png")
    return requests[int(number)]["input"]


@pytest.fixture(scope="module")
def checkpoints(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoints, but for the image encoder."""
    root = tmp_path_factory.mktemp("checkpoints")
    for repo in tiny.glob("*/*"):
        (root / repo.relative_to(tiny)).mkdir(parents=True)
        for part in repo.iterdir():
            own = RUNS / part.name if part.name.startswith("image_") else part
            (root / part.relative_to(tiny)).symlink_to(own)
    return root


@pytest.fixture(scope="module")
def loaded(checkpoints: Path) -> Iterator[Any]:
    """The model of a run, kept as long as the next run has the same."""
    kept: dict[tuple[str, str], WanModel] = {}

    def load(model: str, dtype: str) -> WanModel:
        if (model, dtype) not in kept:
            kept.clear()
            toolkit = REAL_TOOLKIT or STAND_IN
            kept[model, dtype] = load_pipeline(model, checkpoints, "cpu", toolkit_path=toolkit, dtype=getattr(torch, dtype))
        return kept[model, dtype]

    yield load
    kept.clear()


def frames_of(model: WanModel, run: str, raw: dict[str, Any], step: str) -> np.ndarray:
    request = parse(raw, model.spec)
    assert request.trained_with
    trained = request.trained_with.as_trained_with()
    images = {}
    for prompt in request.prompts:
        if prompt.control_image:
            source = prompt.control_image[1]
            images[source] = load_control_image(source, "preview", ["f"], Allowance(), 10_000_000, threading.Event())
    [shot] = shots_of(request, lambda sampler: preview(model.spec, "flowmatch", "", sampler, trained), lambda _: 0, images)
    adapters = [
        Adapter(LoraFile.read(RUNS / run / lora.path), lora.network_multiplier, lora.transformer)
        for lora in request.loras
        if step != "0"
    ]
    model.apply_loras(adapters, "merge" if trained.merges else "beside", trained.quantization(model.spec, None))
    return np.concatenate(list(model.generate(shot.sampling, shot.recipe)))


@pytest.fixture(scope="module")
def is_alike(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], bool]:
    """Whether the frames of a sample can be equal to the bit on this CPU."""

    @cache
    def is_met(run: str, key: str) -> bool:
        request = request_of(run, key, tmp_path_factory.mktemp("probe"))
        return is_equal(frames_of(loaded("wan21_1b", "bfloat16"), run, request, key[1:].split("_")[0]), run, key)

    def ask(run: str, key: str) -> bool:
        if run in PROBES_OF_THEIR_OWN:
            [other] = facts_of(run)["videos"].keys() - {key}
            return is_met(run, other)
        return is_met(*PROBE)

    return ask


def is_equal(frames: np.ndarray, run: str, key: str) -> bool:
    return hashlib.sha256(frames.tobytes()).hexdigest() == facts_of(run)["videos"][key]["sha256"]


@pytest.mark.parametrize(("run", "key"), CASES, ids=[f"{run}/{key}" for run, key in CASES])
def test_the_frames_are_those_that_the_trainer_showed(
    run: str, key: str, is_alike: Callable[[str, str], bool], loaded: Any, tmp_path: Path
) -> None:
    facts, can_be_equal = facts_of(run), is_alike(run, key)
    model = loaded(facts["model"], facts["dtype"])
    check(frames_of(model, run, request_of(run, key, tmp_path), key[1:].split("_")[0]), run, key, can_be_equal)


def check(frames: np.ndarray, run: str, key: str, can_be_equal: bool) -> None:
    """The frames are those that the trainer showed, as far as this kind of CPU can make them."""
    facts = facts_of(run)
    assert list(frames.shape) == facts["videos"][key]["shape"]
    limit = NEAR.get(f"{run}/{key}", 0.0)
    if not limit and can_be_equal:
        assert is_equal(frames, run, key)
    else:
        limit += 0.0 if can_be_equal else ON_ANOTHER_CPU[facts["dtype"]]
        theirs = np.load(RUNS / run / "last_frames.npz")[key]
        assert np.abs(frames[-1].astype(int) - theirs).mean() < limit


# Through the worker


@pytest.fixture(scope="module")
def api(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    folder = tmp_path_factory.mktemp("runs")
    env = environment(tiny, "wan21_1b", LORA_DIR=RUNS, DTYPE="bfloat16", OUTPUT_DIR=folder / "out")
    with local_api(env, folder) as api:
        yield api


def frames_in(output: dict[str, Any]) -> np.ndarray:
    """The raw frames of the one video."""
    with zipfile.ZipFile(file_of(output["outputs"]["videos"][0])) as archive:
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in sorted(archive.namelist())])


def sum_of(output: dict[str, Any]) -> str:
    return hashlib.sha256(frames_in(output).tobytes()).hexdigest()


def in_folder(run: str, request: dict[str, Any]) -> dict[str, Any]:
    return request | {"loras": [lora | {"path": f"{run}/{lora['path']}"} for lora in request["loras"]]}


def test_a_worker_makes_what_the_trainer_showed_and_an_ordinary_job_afterwards_is_as_before(
    api: LocalApi, is_alike: Callable[[str, str], bool], tmp_path: Path
) -> None:
    run, key = "wan21_1b_q8save32", "s4_3"
    request = in_folder(run, request_of(run, key, tmp_path))
    ordinary = request | {"match": "documented", "trained_with": None}
    before = sum_of(output_of(api, ordinary))
    quantized = output_of(api, request)
    check(frames_in(quantized), run, key, is_alike(run, key))
    assert quantized["settings"]["trained_with"]["qtype"] == "qfloat8"
    assert quantized["settings"]["loras"][0]["applied_by"] == "beside"
    assert not any("16 bits" in warning or "how the training ran" in warning for warning in quantized["warnings"])
    assert sum_of(output_of(api, ordinary)) == before != sum_of(quantized)
    run, key = "wan21_1b_bf16save32", "s4_1"
    merged = output_of(api, in_folder(run, request_of(run, key, tmp_path)))
    check(frames_in(merged), run, key, is_alike(run, key))
    assert merged["settings"]["loras"][0]["applied_by"] == "merge"


def test_the_config_beside_a_lora_says_how_it_was_trained(
    api: LocalApi, is_alike: Callable[[str, str], bool], tmp_path: Path
) -> None:
    run, key = "wan21_1b_q8save32", "s4_3"
    request = in_folder(run, request_of(run, key, tmp_path))
    output = output_of(api, {name: value for name, value in request.items() if name != "trained_with"})
    check(frames_in(output), run, key, is_alike(run, key))
    assert output["settings"]["trained_with_because"] == "the config.yaml beside the LoRA says so"
    output = output_of(api, request | {"match": "documented", "trained_with": None})
    [taught] = [warning for warning in output["warnings"] if "the training ran with" in warning]
    assert "quantize, quantize_te" in taught and "set `match` to preview" in taught


# State: what a job leaves behind


@pytest.fixture(scope="module")
def plain(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16)


KINDS: dict[str, tuple[str, TrainedWith]] = {
    "adapter": ("adapter", TrainedWith()),
    "merge": ("merge", TrainedWith()),
    "beside": ("beside", TrainedWith()),
    "qfloat8": ("beside", TrainedWith(quantize=True)),
    "float8": ("beside", TrainedWith(quantize=True, quantize_te=False, qtype="float8")),
    "text encoder": ("merge", TrainedWith(quantize_te=True)),
    "none": ("adapter", TrainedWith()),
}


def test_every_way_to_apply_a_lora_follows_every_other_and_gives_the_frames_of_a_fresh_worker(tiny: Path) -> None:
    adapters = [Adapter(LoraFile.read(path), 1.0, side) for path, side in lora_paths("wan21_1b", tiny)]

    def frames(model: WanModel, kind: str) -> bytes:
        mode, trained = KINDS[kind]
        model.apply_loras([] if kind == "none" else adapters, mode, trained.quantization(model.spec, None))
        return make(
            model, preview(model.spec, "flowmatch", "") if mode != "adapter" else None, num_inference_steps=1, num_frames=1
        ).tobytes()

    fresh = {kind: frames(load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16), kind) for kind in KINDS}
    same = [pair for pair in permutations(KINDS, 2) if fresh[pair[0]] == fresh[pair[1]]]
    assert same == []
    model = load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16)
    kinds = list(KINDS)
    order = [kind for i, first in enumerate(kinds) for second in kinds[i + 1 :] for kind in (first, second)] + kinds[:1]
    assert {pair for pair in pairwise(order) if pair[0] != pair[1]} == set(permutations(kinds, 2))
    for before, kind in pairwise(order):
        assert frames(model, kind) == fresh[kind], f"{kind} after {before}"


@pytest.mark.parametrize("qtype", ["qfloat8", "float8", "int8", *(f"uint{bits}" for bits in range(2, 9))])
def test_after_any_quantized_job_the_weights_are_those_of_the_file(qtype: str, plain: WanModel, tiny: Path) -> None:
    adapters = [Adapter(LoraFile.read(path), 1.0, side) for path, side in lora_paths("wan21_1b", tiny)]
    plain.apply_loras(adapters, "merge")
    before = make(plain)
    trained = TrainedWith(quantize=True, qtype=qtype, low_vram=True)
    plain.apply_loras(adapters, "beside", trained.quantization(plain.spec, None))
    changed = make(plain, preview(plain.spec, "flowmatch", "", trained=trained))
    again = make(plain, preview(plain.spec, "flowmatch", "", trained=trained))
    assert (changed == again).all()
    plain.apply_loras(adapters, "merge")
    assert (make(plain) == before).all()
    weights = dict(plain._pipe.transformer.named_parameters()) | dict(plain._pipe.text_encoder.named_parameters())
    fresh = load_pipeline("wan21_1b", tiny, "cpu", dtype=torch.bfloat16)
    fresh.apply_loras(adapters, "merge")
    theirs = dict(fresh._pipe.transformer.named_parameters()) | dict(fresh._pipe.text_encoder.named_parameters())
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
