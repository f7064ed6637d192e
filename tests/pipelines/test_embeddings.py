"""What is kept of the text encoder's work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipelines import Sampling, WanModel, load_pipeline
from pipelines.embeddings import KEPT

SAMPLING = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=1)


@pytest.fixture
def model(tiny: Path) -> WanModel:
    return load_pipeline("wan21_1b", tiny, "cpu")


@pytest.fixture
def encoded(model: WanModel) -> Counter[str]:
    """How often the text encoder has run."""
    count: Counter[str] = Counter()
    model._pipe.text_encoder.register_forward_hook(lambda *_: count.update(["times"]))
    return count


def test_a_text_is_encoded_once_and_the_frames_stay_the_same(model: WanModel, encoded: Counter[str]) -> None:
    first = next(model.generate(SAMPLING))
    assert encoded["times"] == 2  # the prompt and the negative one
    assert (next(model.generate(SAMPLING)) == first).all()
    assert encoded["times"] == 2


def test_another_prompt_costs_one_text(model: WanModel, encoded: Counter[str]) -> None:
    from dataclasses import replace

    one = next(model.generate(SAMPLING))
    other = next(model.generate(replace(SAMPLING, prompt="a house")))
    assert encoded["times"] == 3
    assert (one != other).any()


def test_only_so_many_texts_are_kept_the_least_recently_used_are_dropped(model: WanModel, encoded: Counter[str]) -> None:
    encode = model._pipe._get_t5_prompt_embeds
    for prompt in range(KEPT):
        encode([f"{prompt}"])
    encode(["0"])  # used again: the next one is the oldest
    encode(["one more"])
    assert encoded["times"] == KEPT + 1
    encode(["0"])
    assert encoded["times"] == KEPT + 1
    encode(["1"])
    assert encoded["times"] == KEPT + 2
