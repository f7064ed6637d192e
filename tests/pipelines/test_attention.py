"""Attention kernels are checked before they are used, and chosen by the device alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName as Backend

from pipelines import attention, load_pipeline
from pipelines.attention import why_not
from pipelines.errors import DeviceUnavailable

CPU = torch.device("cpu")


def test_plain_use_and_auto_on_a_cpu_are_torchs_own_kernels(tiny: Path) -> None:
    for asked in ("native", "auto"):
        assert load_pipeline("wan21_1b", tiny, "cpu", attention=asked).facts["attention"] == "native"  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["cudnn", "flash", "flash3"])
def test_kernels_that_do_not_work_here_stop_the_start(tiny: Path, asked: Any) -> None:
    with pytest.raises(
        DeviceUnavailable, match=rf"ATTENTION={asked} does not work here, .*; set ATTENTION to native, or to auto"
    ):
        load_pipeline("wan21_1b", tiny, "cpu", attention=asked)


def test_other_kernels_that_compute_the_same_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are torch's plain kernels here: its others are more than twice as exact on some CPUs."""
    for name in ("flash", "native"):
        monkeypatch.setitem(attention._BACKENDS, name, "_NATIVE_MATH")
    assert why_not("flash", CPU) == ""


def test_kernels_that_compute_something_else_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._BACKENDS, "flash", "_NATIVE_MATH")
    native = attention_dispatch._AttentionBackendRegistry._backends[Backend._NATIVE_MATH]
    wrong = lambda *args, **kwargs: native(*args, **kwargs) * 1.001  # noqa: E731
    monkeypatch.setitem(attention_dispatch._AttentionBackendRegistry._backends, Backend._NATIVE_MATH, wrong)
    assert "is off by" in why_not("flash", CPU)


@pytest.mark.parametrize(
    ("generation", "works", "chosen"),
    [
        (9, {"flash3", "cudnn", "native"}, "flash3"),
        (9, {"cudnn", "native"}, "cudnn"),
        (9, {"native"}, "native"),
        (12, {"cudnn", "native"}, "cudnn"),
        (8, {"cudnn", "native"}, "native"),
    ],
)
def test_auto_takes_the_first_that_works_on_this_kind_of_gpu(
    monkeypatch: pytest.MonkeyPatch, generation: int, works: set[str], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(attention, "why_not", lambda name, device: "" if name in works else "no")
    assert attention._best(torch.device("cuda")) == chosen


@pytest.mark.gpu
def test_auto_finds_kernels_on_a_gpu_that_change_a_frame_by_no_more_than_rounding(tiny: Path) -> None:
    from pipelines import Sampling

    sampling = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)
    native, auto = (
        next(load_pipeline("wan21_1b", tiny, "cuda", attention=asked).generate(sampling)).astype(int)  # type: ignore[arg-type]
        for asked in ("native", "auto")
    )
    assert abs(native - auto).max() <= 8
