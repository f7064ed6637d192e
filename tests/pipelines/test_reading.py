"""Weights that are read to a device have the bits of the file, wherever they were before."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import Sampling, load_pipeline, reading
from pipelines.pristine import CheckpointFile
from pipelines.reading import read_into

REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CPU = torch.device("cpu")
SAMPLING = Sampling("a boat", width=32, height=32, num_frames=5, num_inference_steps=2)


@pytest.fixture(params=["main memory", "a device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces; for "a device" they go through the buffers."""
    monkeypatch.setattr(reading, "_BYTES_PER_PIECE", 1000)
    if request.param == "a device":
        monkeypatch.setattr(reading, "in_main_memory", lambda _: False)


@pytest.mark.usefixtures("place")
def test_tensors_get_the_bytes_of_their_places(tmp_path: Path) -> None:
    content = [np.frombuffer(os.urandom(10_003), np.uint8) for _ in range(2)]
    files = [tmp_path / "a", tmp_path / "b"]
    for file, data in zip(files, content, strict=True):
        file.write_bytes(data.tobytes())
    places = [(0, 3, 5000), (1, 0, 10_003), (0, 5003, 17), (1, 9000, 0), (0, 10_002, 1)]
    tensors = [torch.empty(count, dtype=torch.uint8) for _, _, count in places]
    read_into((files[number], begin, tensor) for (number, begin, _), tensor in zip(places, tensors, strict=True))
    for (number, begin, count), tensor in zip(places, tensors, strict=True):
        assert np.array_equal(tensor.numpy(), content[number][begin : begin + count])

    with pytest.raises(OSError, match="ends too soon"):
        read_into([(files[0], 9000, torch.empty(1004, dtype=torch.uint8))])


def test_a_tensor_may_have_any_dtype_and_shape(tmp_path: Path) -> None:
    values = [torch.randn(3, 5).to(torch.bfloat16), torch.tensor(2.5), torch.arange(7), torch.empty(0, 4)]
    for value in values:
        (tmp_path / "one").write_bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        read = torch.nn.Parameter(torch.zeros_like(value), requires_grad=value.is_floating_point())
        read_into([(tmp_path / "one", 0, read)])
        assert torch.equal(read, value)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_component_that_is_read_to_a_device_has_the_bits_of_the_load(tiny: Path, dtype: torch.dtype) -> None:
    """In bf16 the files, which are float32, are cast when they are loaded, but for what diffusers keeps in float32."""
    model = load_pipeline("wan21_1b", tiny, "cpu", dtype=dtype)
    for part in ("transformer", "text_encoder", "vae"):
        component = getattr(model._pipe, part)
        objects, before = list(component.parameters()), tensors_of(component)
        CheckpointFile(tiny / REPO / part, part).bring(component, CPU)
        after = tensors_of(component)
        assert all(now is then for now, then in zip(component.parameters(), objects, strict=True)), "ties stay"
        assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
        read = {name for name in before if after[name].data_ptr() != before[name].data_ptr()}
        in_float32 = {name for name, value in component.named_parameters() if value.dtype == torch.float32}
        assert read >= in_float32 and (read or part != "transformer")


def tensors_of(component: Any) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in chain(component.named_parameters(), component.named_buffers())}


@pytest.mark.usefixtures("place")
def test_shards_are_read_each_from_its_file(tiny: Path, tmp_path: Path) -> None:
    transformer = load_pipeline("wan21_1b", tiny, "cpu")._pipe.transformer
    transformer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = {name: value.clone() for name, value in transformer.state_dict().items()}
    with torch.no_grad():
        for value in transformer.parameters():
            value.data = torch.zeros_like(value)
    CheckpointFile(tmp_path, "transformer").bring(transformer, CPU)
    assert all(torch.equal(value, expected[name]) for name, value in transformer.state_dict().items())


def test_frames_are_those_of_weights_that_were_copied(tiny: Path) -> None:
    """A copy's frames, since kernels of a CPU round with the weight in its mapped file otherwise."""
    copied, read = (load_pipeline("wan21_1b", tiny, "cpu") for _ in range(2))
    for part in ("transformer", "text_encoder", "vae"):
        for value in getattr(copied._pipe, part).parameters():
            value.data = value.data.clone()
        CheckpointFile(tiny / REPO / part, part).bring(getattr(read._pipe, part), CPU)
    for model in (copied, read):
        model.apply_loras([])
    first, second = (b"".join(frames.tobytes() for frames in model.generate(SAMPLING)) for model in (copied, read))
    assert first == second
