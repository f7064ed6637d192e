"""What a model does when its device fails: runs out of memory while it decodes, or dies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Sampling, WanModel, load_pipeline
from pipelines.errors import DeviceLost, OutOfMemory

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling("a boat", width=64, height=64, num_frames=9, num_inference_steps=1)


@pytest.fixture
def model(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu")


@pytest.fixture
def memory(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A device whose VAE finds room for the second piece only when so many other parts are out of the way."""
    state = {"needed": 0, "out": 0}
    pipe, decoder_forward = model._pipe, model._pipe.vae.decoder.forward
    parts = [pipe.text_encoder, pipe.transformer]

    def move(target: object) -> None:
        state["out"] += 1 if target == "cpu" else -1

    def forward(*arguments: object, **named: object) -> torch.Tensor:
        if not named["first_chunk"] and state["out"] < state["needed"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder_forward(*arguments, **named)

    for part in parts:
        monkeypatch.setattr(part, "to", move)
    monkeypatch.setattr(pipe.vae.decoder, "forward", forward)
    monkeypatch.setattr(model, "_rest_of_the_model", lambda: list(parts))
    return state


@pytest.mark.parametrize("needed", [1, 2])
def test_a_decode_that_runs_out_of_memory_is_done_again_with_the_rest_out_of_the_way(
    model: WanModel, memory: dict[str, int], needed: int
) -> None:
    plain = np.concatenate(list(model.generate(SAMPLING)))
    memory["needed"] = needed
    again = np.concatenate(list(model.generate(SAMPLING)))
    assert again.shape == (9, 64, 64, 3) and (again == plain).all()
    assert memory["out"] == 0  # everything is back


def test_a_decode_for_which_nothing_makes_room_is_out_of_memory(model: WanModel, memory: dict[str, int]) -> None:
    memory["needed"] = 3
    with pytest.raises(OutOfMemory):
        list(model.generate(SAMPLING))
    assert memory["out"] == 0
    memory["needed"] = 0
    assert sum(len(frames) for frames in model.generate(SAMPLING)) == 9


def test_a_device_that_computes_answers(model: WanModel) -> None:
    assert model.device_answers()


def failing(model: WanModel, monkeypatch: pytest.MonkeyPatch, answers: bool) -> WanModel:
    """A model whose device raises an error that says nothing, after which it answers or does not."""

    def denoise(*_: object) -> torch.Tensor:
        raise RuntimeError("something went wrong")

    monkeypatch.setattr(model, "_denoise", denoise)
    monkeypatch.setattr(model, "device_answers", lambda: answers)
    return model


def test_an_error_after_which_the_device_is_silent_means_that_it_is_lost(
    model: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceLost):
        list(failing(model, monkeypatch, answers=False).generate(SAMPLING))


def test_an_error_after_which_the_device_answers_is_only_that_error(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="something went wrong"):
        list(failing(model, monkeypatch, answers=True).generate(SAMPLING))


@pytest.mark.gpu
def test_a_gpu_after_a_device_assert_does_not_answer(tiny: Path) -> None:
    """In a process of its own: nothing can use the GPU there afterwards."""
    lines = [
        "import sys, torch",
        "from pathlib import Path",
        "from pipelines import load_pipeline",
        "model = load_pipeline('wan21_1b', Path(sys.argv[1]), 'cuda')",
        "print(model.device_answers())",
        "try:",
        "    torch.zeros(2, device='cuda')[torch.tensor([5], device='cuda')].sum().item()",
        "except RuntimeError:",
        "    print(model.device_answers())",
    ]
    command = [sys.executable, "-c", "\n".join(lines), str(tiny)]
    assert subprocess.check_output(command, cwd=ROOT, text=True).split() == ["True", "False"]


@pytest.mark.gpu
def test_a_gpu_that_is_too_full_to_decode_makes_the_same_frames(tiny: Path) -> None:
    model = load_pipeline("wan21_1b", tiny, "cuda")
    plain = np.concatenate(list(model.generate(SAMPLING)))
    ballast = torch.nn.Linear(16384, 16384, device="cuda")  # 1 GB that only a move to the CPU frees
    model._pipe.transformer.add_module("ballast", ballast)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    latents_of = model._denoise

    def denoise(*arguments: object) -> torch.Tensor:
        latents = latents_of(*arguments)  # type: ignore[arg-type]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
        return latents

    model._denoise = denoise  # type: ignore[method-assign]
    try:
        assert (np.concatenate(list(model.generate(SAMPLING))) == plain).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert next(ballast.parameters()).device.type == "cuda"
