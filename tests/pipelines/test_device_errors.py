"""What a model does when its device fails: runs out of memory while it decodes, or dies."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Adapter, Sampling, WanModel, device, load_pipeline
from pipelines.catalog import OffloadMode
from pipelines.errors import DeviceLost, LoraIncompatible, MemoryLost, OutOfMemory
from pipelines.lora.file import LoraFile

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling("a boat", width=64, height=64, num_frames=9, num_inference_steps=1)


@pytest.fixture
def model(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu")


@pytest.fixture
def memory(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A device whose VAE finds room for the second piece only when so many other parts are out of the way."""
    state = {"needed": 0, "out": 0, "failed": 0}
    pipe, decoder_forward = model._pipe, model._pipe.vae.decoder.forward
    parts = [pipe.text_encoder, pipe.transformer]

    def move(target: object) -> None:
        state["out"] += 1 if target == "cpu" else -1

    def forward(*arguments: object, **named: object) -> torch.Tensor:
        if not named["first_chunk"] and state["out"] < state["needed"]:
            state["failed"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder_forward(*arguments, **named)

    for part in parts:
        monkeypatch.setattr(part, "to", move)
    monkeypatch.setattr(pipe.vae.decoder, "forward", forward)
    monkeypatch.setattr(model._decoder, "_rest_of_the_model", lambda: list(parts))
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


def test_a_decode_of_a_known_size_makes_room_before_it_runs_out(model: WanModel, memory: dict[str, int]) -> None:
    memory["needed"] = 1
    list(model.generate(SAMPLING))
    memory["failed"] = 0
    list(model.generate(SAMPLING))
    assert memory["failed"] == 0 and memory["out"] == 0


def test_nothing_comes_back_to_the_device_while_a_failed_decode_holds_it(
    model: WanModel, memory: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    clamp, move = torch.Tensor.clamp, model._pipe.transformer.to

    def watched(tensor: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        alive.append(weakref.ref(tensor))
        return clamp(tensor, *arguments, **named)  # type: ignore[arg-type, call-overload, no-any-return]

    def to(target: object) -> None:
        held.append(sum(reference() is not None for reference in alive))
        move(target)

    monkeypatch.setattr(torch.Tensor, "clamp", watched)
    monkeypatch.setattr(model._pipe.transformer, "to", to)
    memory["needed"] = 3
    with pytest.raises(OutOfMemory):
        list(model.generate(SAMPLING))
    assert alive and held == [0, 0]


def test_a_device_that_computes_answers(model: WanModel) -> None:
    assert device.answers(model.device)


def failing(model: WanModel, monkeypatch: pytest.MonkeyPatch, answers: bool) -> WanModel:
    """A model whose device raises an error that says nothing, after which it answers or does not."""

    def denoise(*_: object) -> torch.Tensor:
        raise RuntimeError("something went wrong")

    monkeypatch.setattr(model, "_denoise", denoise)
    monkeypatch.setattr(device, "answers", lambda _: answers)
    return model


def test_an_error_after_which_the_device_is_silent_means_that_it_is_lost(
    model: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceLost):
        list(failing(model, monkeypatch, answers=False).generate(SAMPLING))


def test_an_error_after_which_the_device_answers_is_only_that_error(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="something went wrong"):
        list(failing(model, monkeypatch, answers=True).generate(SAMPLING))


def lora(tiny: Path) -> Adapter:
    return Adapter(LoraFile.read(tiny / "loras/wan21_1b/rank16.safetensors"))


def test_a_device_that_dies_while_loras_are_applied_is_lost_though_nothing_can_be_put_back(
    model: WanModel, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    model.apply_loras([lora(tiny)], "merge")
    monkeypatch.setattr(model.loras._merges, "_restore", dead)
    monkeypatch.setattr(device, "answers", lambda _: False)
    with pytest.raises(DeviceLost):
        model.apply_loras([], "merge")


def test_a_device_that_dies_while_a_failed_lora_is_taken_out_is_lost(
    model: WanModel, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LoraIncompatible("the LoRA does not fit")

    def dead(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(model.loras._adapters, "apply", fail)
    monkeypatch.setattr(model.loras._adapters, "drop_all", dead)
    monkeypatch.setattr(device, "answers", lambda _: False)
    with pytest.raises(DeviceLost):
        model.apply_loras([lora(tiny)])


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("CUDA error: an illegal memory access was encountered", False, DeviceLost),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", True, OutOfMemory),
        ("CUDA error: out of memory", True, OutOfMemory),
        ("something else", True, RuntimeError),
    ],
)
def test_what_the_device_raises_while_an_adapter_loads_is_not_the_loras_fault(
    model: WanModel, tiny: Path, monkeypatch: pytest.MonkeyPatch, text: str, answers: bool, expected: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(model._pipe.transformer, "load_lora_adapter", fail)
    monkeypatch.setattr(device, "answers", lambda _: answers)
    with pytest.raises(expected) as error:
        model.apply_loras([lora(tiny)])
    assert error.type is expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported (cudaHostAlloc)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_every_way_to_run_out_of_memory_is_out_of_memory(
    model: WanModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def denoise(*_: object) -> None:
        raise error

    monkeypatch.setattr(model, "_denoise", denoise)
    with pytest.raises(OutOfMemory, match="or run the worker on a machine with more memory"):
        list(model.generate(SAMPLING))


@pytest.mark.parametrize(
    ("mode", "compiled", "merged", "remedy"),
    [
        ("none", False, False, "run the worker with OFFLOAD_MODE=text_encoder"),
        ("text_encoder", False, False, "run the worker with OFFLOAD_MODE=group"),
        ("group", False, False, "run the worker with OFFLOAD_MODE=sequential"),
        ("group", False, True, "use a GPU with more memory"),
        ("text_encoder", True, False, "run the worker with OFFLOAD_MODE=model"),
        ("sequential", False, False, "use a GPU with more memory"),
    ],
)
def test_out_of_memory_advises_only_what_takes_less_and_can_be_used(
    model: WanModel, tiny: Path, mode: OffloadMode, compiled: bool, merged: bool, remedy: str
) -> None:
    if merged:
        model.apply_loras([lora(tiny)], "merge")
    gigabytes = {"none": 40, "text_encoder": 29.5, "group": 1.7, "model": 28.6, "sequential": 0}
    model.bytes_by_mode = {name: int(size * 1e9) for name, size in gigabytes.items()}  # type: ignore[misc]
    model.facts |= {"offload_mode": mode, "compiled": compiled}
    model.device = torch.device("cuda")
    assert model._memory_remedy() == remedy


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), MemoryLost, "memory ran out.*GPUS=1 or larger"),
        (
            RuntimeError("NCCL error: Call to CUDA function failed. Cuda failure 2 'out of memory'"),
            MemoryLost,
            "memory ran out",
        ),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4711"), DeviceLost, "process ended, or is silent"),
    ],
)
def test_an_exchange_that_fails_is_a_lost_device_and_says_whether_memory_was_the_reason(
    error: Exception, kind: type[Exception], text: str
) -> None:
    with pytest.raises(DeviceLost, match=text) as raised, device.exchange_errors():
        raise error
    assert type(raised.value) is kind


def test_a_load_that_runs_out_of_memory_is_out_of_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffusers.WanTransformer3DModel.from_pretrained", fail)
    with pytest.raises(OutOfMemory, match="the memory ran out while wan21_1b was loaded; use a machine with more memory"):
        load_pipeline("wan21_1b", tiny, "cpu")


def test_a_video_that_nobody_takes_to_its_end_leaves_nothing_behind(model: WanModel) -> None:
    plain = np.concatenate(list(model.generate(SAMPLING)))
    chunks = model.generate(SAMPLING)
    next(chunks)
    assert any(cache is not None for cache in model._pipe.vae._feat_map)
    chunks.close()
    assert all(cache is None for cache in model._pipe.vae._feat_map)
    assert (np.concatenate(list(model.generate(SAMPLING))) == plain).all()


@pytest.mark.gpu
def test_a_gpu_after_a_device_assert_does_not_answer(tiny: Path) -> None:
    """In a process of its own: nothing can use the GPU there afterwards."""
    lines = [
        "import sys, torch",
        "from pathlib import Path",
        "from pipelines import device, load_pipeline",
        "model = load_pipeline('wan21_1b', Path(sys.argv[1]), 'cuda')",
        "print(device.answers(model.device))",
        "try:",
        "    torch.zeros(2, device='cuda')[torch.tensor([5], device='cuda')].sum().item()",
        "except RuntimeError:",
        "    print(device.answers(model.device))",
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
