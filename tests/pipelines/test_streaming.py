"""Offloading with its copies, on a stand-in for a GPU's memory: after any failure the next video is a fresh worker's."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.catalog import LoraMode, OffloadMode, Quantize
from pipelines.errors import DeviceLost, OutOfMemory
from pipelines.lora.file import LoraFile
from pipelines.recipes import preview
from pipelines.trained import TrainedWith
from tests.conftest import STAND_IN
from tests.stand_in_device import StandInDevice, full_in

SAMPLING = Sampling("a boat", width=32, height=32, num_frames=5, num_inference_steps=2)
PLACES = [
    ("wan21_1b", "group"),
    ("wan22_14b_t2v", "swap"),
    ("wan22_14b_i2v", "group"),
    ("wan22_5b", "group"),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandInDevice:
    return StandInDevice(monkeypatch)


class Day:
    """A model, what can be asked of it, and what can go wrong."""

    def __init__(
        self, tiny: Path, folder: Path, device: StandInDevice, model_id: str, mode: OffloadMode, quantize: Quantize = "none"
    ) -> None:
        self.device = device
        self._new = lambda: device.place(load_pipeline(model_id, tiny, "cpu", toolkit_path=STAND_IN, quantize=quantize), mode)
        self.model = model = self._new()
        side = "high" if model.spec.moe else None
        files = sorted((tiny / "loras" / model_id).glob("*.safetensors"))[:2]
        twin = folder / "twin.safetensors"  # of the same layers and ranks, so that it is copied over the first
        save_file({key: value * -0.5 for key, value in load_file(files[0]).items()}, twin)
        self.loras = [Adapter(LoraFile.read(file), 1.0, side) for file in (*files, twin)]  # type: ignore[arg-type]
        image = Image.fromarray(np.full((32, 32, 3), 99, np.uint8)) if model.spec.control_image == "required" else None
        self.sampling = replace(SAMPLING, control_image=image)
        self._expected: dict[str, bytes] = {}

    def requests(self) -> dict[str, Callable[[WanModel], bytes]]:
        return {
            "no LoRA": lambda model: self.video(model, None, "adapter"),
            "adapter": lambda model: self.video(model, self.loras[0], "adapter"),
            "another adapter": lambda model: self.video(model, self.loras[1], "adapter"),
            "its twin": lambda model: self.video(model, self.loras[2], "adapter"),
            "merged": lambda model: self.video(model, self.loras[0], "merge"),
            "another merged": lambda model: self.video(model, self.loras[1], "merge"),
            "quantized": lambda model: self.video(model, self.loras[0], "beside"),
        }

    def video(self, model: WanModel, lora: Adapter | None, mode: LoraMode) -> bytes:
        quantization = TrainedWith(quantize=True).quantization(model.spec, None) if mode == "beside" else None
        model.apply_loras([lora] if lora else [], mode, quantization)
        recipe = preview(model.spec, "flowmatch", "") if mode == "merge" else None
        return b"".join(frames.tobytes() for frames in model.generate(self.sampling, recipe))

    def failures(self, rng: random.Random) -> dict[str, AbstractContextManager[None]]:
        pipe = self.model._pipe
        transformer = rng.choice([pipe.transformer, getattr(pipe, "transformer_2", None) or pipe.transformer])
        block = rng.choice(list(transformer.blocks))
        return {
            "transfer": self.device.full(after=rng.randrange(200)),
            "block": full_in(rng.choice([block.attn1.to_q, block.ffn, block.attn2]), rng.choice([1, 2, 3])),
            "text encoder": full_in(pipe.text_encoder.encoder.block[-1], 1),
            "decode": full_in(pipe.vae.decoder, rng.choice([1, 2])),
        }

    def expected(self, name: str) -> bytes:
        """What a fresh worker makes."""
        if name not in self._expected:
            self._expected[name] = self.requests()[name](self._new())
        return self._expected[name]


@pytest.mark.parametrize(("model_id", "mode"), PLACES)
def test_after_any_failure_the_next_video_is_that_of_a_fresh_worker(
    tiny: Path, tmp_path: Path, device: StandInDevice, model_id: str, mode: OffloadMode
) -> None:
    day, rng, failed = Day(tiny, tmp_path, device, model_id, mode), random.Random(f"{model_id} {mode}"), 0
    names = list(day.requests())
    known = [("no LoRA", "merged"), ("adapter", "its twin"), ("merged", "another merged"), ("no LoRA", "quantized")]
    for unlucky, name in (*known, *(rng.choices(names, k=2) for _ in range(3))):
        kind = "block" if (unlucky, name) in known else rng.choice(["transfer", "block", "text encoder", "decode"])
        try:
            with day.failures(rng)[kind]:
                day.requests()[unlucky](day.model)
        except OutOfMemory:
            failed += 1
        assert day.requests()[name](day.model) == day.expected(name), (kind, unlucky, name)
    assert failed >= 3, "few of the failures happened"
    assert len(set(day._expected.values())) == len(day._expected) > 2, "the requests differ"


@pytest.mark.parametrize(("model_id", "mode"), PLACES)
def test_streaming_makes_the_frames_of_a_model_that_stays(
    tiny: Path, tmp_path: Path, device: StandInDevice, model_id: str, mode: OffloadMode
) -> None:
    """Within 1: kernels of a CPU round a copy of a weight otherwise than the weight in its mapped file."""
    day = Day(tiny, tmp_path, device, model_id, mode)
    plain = load_pipeline(model_id, tiny, "cpu", toolkit_path=STAND_IN)
    streamed, whole = (np.frombuffer(day.video(model, day.loras[0], "adapter"), np.uint8) for model in (day.model, plain))
    assert np.abs(streamed.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("model_id", ["wan21_1b", "wan22_14b_t2v"])
def test_what_lies_in_no_block_stays_on_the_device(tiny: Path, tmp_path: Path, device: StandInDevice, model_id: str) -> None:
    day = Day(tiny, tmp_path, device, model_id, "group")
    transformers = [getattr(day.model._pipe, name) for name in day.model.spec.transformers]
    outside = [
        tensor
        for transformer in transformers
        for name, tensor in chain(transformer.named_parameters(), transformer.named_buffers())
        if not name.startswith("blocks.")
    ]
    assert outside

    def moved(name: str) -> bool:
        before = [tensor.data_ptr() for tensor in outside]
        assert day.requests()[name](day.model) == day.expected(name)
        return before != [tensor.data_ptr() for tensor in outside]

    assert [moved("no LoRA"), moved("no LoRA")] == [True, False]
    assert [moved("adapter"), moved("adapter")] == [True, False], "diffusers takes it back when an adapter comes"
    with pytest.raises(OutOfMemory), full_in(transformers[0].blocks[0].ffn):
        day.requests()["adapter"](day.model)
    assert [moved("adapter"), moved("adapter")] == [True, False]


@pytest.mark.parametrize(
    ("model_id", "mode", "quantize"), [("wan22_14b_t2v", "swap", "uint4"), ("wan21_1b", "group", "qfloat8")]
)
def test_weights_kept_as_codes_stream_as_others_do(
    tiny: Path, tmp_path: Path, device: StandInDevice, model_id: str, mode: OffloadMode, quantize: Quantize
) -> None:
    day = Day(tiny, tmp_path, device, model_id, mode, quantize)
    plain = load_pipeline(model_id, tiny, "cpu", quantize=quantize)
    for lora in (None, day.loras[0]):
        streamed, whole = (np.frombuffer(day.video(model, lora, "adapter"), np.uint8) for model in (day.model, plain))
        assert np.abs(streamed.astype(int) - whole).max() <= 1
    with pytest.raises(OutOfMemory), full_in(day.model._pipe.transformer.blocks[0].ffn):
        day.video(day.model, day.loras[0], "adapter")
    assert day.requests()["its twin"](day.model) == day.expected("its twin")


def test_a_stop_between_steps_leaves_the_model_as_it_was(tiny: Path, tmp_path: Path, device: StandInDevice) -> None:
    class Stopped(Exception):
        pass

    def stop(_step: int) -> None:
        raise Stopped

    for model_id, mode in PLACES[:2]:
        day = Day(tiny, tmp_path, device, model_id, mode)  # type: ignore[arg-type]
        day.model.apply_loras(day.loras[:1])
        with pytest.raises(Stopped):
            list(day.model.generate(day.sampling, None, stop))
        for name in ("merged", "no LoRA"):
            assert day.requests()[name](day.model) == day.expected(name)


def test_a_device_without_room_for_what_was_there_before_is_lost(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode finds no room, the transformer goes, and does not come back."""
    model = load_pipeline("wan21_1b", tiny, "cpu")
    moves: list[object] = []

    def move(target: object) -> None:
        moves.append(target)
        if target != "cpu":
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(model._pipe.text_encoder, "to", move)
    monkeypatch.setattr(model._decoder, "_rest_of_the_model", lambda: [model._pipe.text_encoder])
    with pytest.raises(DeviceLost, match="does not fit back"), full_in(model._pipe.vae.decoder):
        list(model.generate(SAMPLING))
    assert moves == ["cpu", model.device]
