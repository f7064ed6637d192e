"""Weights in bf16: the bits that torch makes of the float32 ones, and no others."""

from __future__ import annotations

import io
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from builder.convert import KEPT_IN_FLOAT32, rounded, to_bf16


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 500_000, dtype=np.uint32)
    bits[:4096] = (np.arange(4096, dtype=np.uint32) << 16) | 0x8000  # ties
    numbers = bits.view(np.float32).copy()
    numbers[-5:] = np.nan, np.inf, -np.inf, 0.0, -0.0
    ours = torch.from_numpy(rounded(numbers).view(np.int16).copy()).view(torch.bfloat16)
    theirs = torch.from_numpy(numbers).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0).view(torch.int16), theirs.nan_to_num(0).view(torch.int16))


def test_what_stays_in_float32_is_what_diffusers_keeps() -> None:
    assert set(diffusers.WanTransformer3DModel._keep_in_fp32_modules) == KEPT_IN_FLOAT32


def test_names_shapes_metadata_and_other_dtypes_stay(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.time_embedder.weight": torch.randn(2, 2),
        "c.half": torch.randn(4).half(),
        "d.empty": torch.randn(0, 3),
        "e.count": torch.arange(3),
    }
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    out = io.BytesIO()
    assert to_bf16(tmp_path / "file", out)
    converted = load(out.getvalue())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in converted.items()} == {
        name: (torch.bfloat16 if name in ("b.weight", "d.empty") else tensor.dtype, tensor.shape)
        for name, tensor in tensors.items()
    }
    assert all(torch.equal(converted[name], tensor.to(converted[name].dtype)) for name, tensor in tensors.items())
    (tmp_path / "again").write_bytes(out.getvalue())
    assert to_bf16(tmp_path / "again", io.BytesIO()) is None
    assert load_file(tmp_path / "file").keys() == converted.keys()


def test_a_file_that_is_none_of_the_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="not in safetensors format"):
        to_bf16(tmp_path / "file", io.BytesIO())
