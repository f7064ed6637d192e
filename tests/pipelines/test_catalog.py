"""The model table and its arithmetic. The numbers here are typed from the model pages, not read from the catalog."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.catalog import MODELS, ModelSpec
from pipelines.recipes import documented

specs = st.sampled_from(list(MODELS.values()))


@pytest.mark.parametrize(
    ("model_id", "divisor", "image", "moe", "toolkit", "flow_shift", "boundary"),
    [
        ("wan22_14b_i2v", 16, "required", True, True, 3.0, 0.9),
        ("wan22_14b_t2v", 32, "none", True, False, None, None),
        ("wan22_5b", 32, "optional", False, True, 5.0, None),
        ("wan21_i2v_14b", 16, "required", False, False, None, None),
        ("wan21_i2v_14b480p", 16, "required", False, False, None, None),
        ("wan21_14b", 16, "none", False, False, None, None),
        ("wan21_1b", 16, "none", False, False, None, None),
    ],
)
def test_the_catalog_says_what_the_model_pages_say(
    model_id: str, divisor: int, image: str, moe: bool, toolkit: bool, flow_shift: float | None, boundary: float | None
) -> None:
    spec = MODELS[model_id]
    assert (spec.size_divisor, spec.control_image, spec.moe, spec.needs_toolkit) == (divisor, image, moe, toolkit)
    assert (spec.flow_shift, spec.boundary_ratio) == (flow_shift, boundary)


def test_14b_t2v_takes_its_transformers_from_the_toolkit_repo() -> None:
    sources = {part: str(source) for part, source in MODELS["wan22_14b_t2v"].sources.items()}
    assert sources["transformer_2"] == "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16/transformer_2"
    assert sources["scheduler"] == "Wan-AI/Wan2.2-T2V-A14B-Diffusers/scheduler"


def test_14b_i2v_takes_its_vae_from_a_repo_root() -> None:
    assert str(MODELS["wan22_14b_i2v"].sources["vae"]) == "ai-toolkit/wan2.1-vae"


@given(specs, st.integers(64, 4096), st.integers(64, 4096))
def test_a_size_is_floored_to_the_divisor(spec: ModelSpec, width: int, height: int) -> None:
    for asked, made in zip((width, height), documented(spec).effective_size(width, height), strict=True):
        assert made % spec.size_divisor == 0
        assert 0 <= asked - made < spec.size_divisor


@given(specs, st.integers(1, 1000))
def test_a_frame_count_becomes_4n_plus_1_close_by(spec: ModelSpec, asked: int) -> None:
    made = documented(spec).effective_frames(asked)
    assert made % 4 == 1 and abs(asked - made) <= 3
    assert documented(spec).effective_frames(made) == made


@pytest.mark.parametrize(
    ("asked", "dropping", "rounding"), [(1, 1, 1), (3, 1, 1), (4, 1, 5), (40, 37, 41), (41, 41, 41), (44, 41, 45)]
)
def test_the_toolkit_models_drop_incomplete_frames_and_the_others_do_as_diffusers(
    asked: int, dropping: int, rounding: int
) -> None:
    for spec in MODELS.values():
        expected = dropping if spec.id in ("wan22_14b_i2v", "wan22_5b") else rounding
        assert documented(spec).effective_frames(asked) == expected
