"""The toy world, and the tiny weights that have learned it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from builder.demo import captions, install, world
from builder.demo.judge import judge
from builder.demo.measure import film
from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from pipelines.lora.file import LoraFile


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    install.install(root)
    return root


@pytest.mark.parametrize("shape", [(64, 96, 9), (128, 96, 5)])
@pytest.mark.parametrize("striped", [False, True])
def test_a_clip_shows_what_it_says(shape: tuple[int, int, int], striped: bool) -> None:
    rng = random.Random(1)
    for kind in world.OBJECTS:
        clip = world.sample(rng, object=kind, striped=striped)
        seen = judge(world.draw(clip, *shape))
        assert (seen.object, seen.colour, seen.direction, seen.ground) == (kind, clip.colour, clip.direction, clip.ground)
        assert seen.striped == (striped and kind == "boat")


def test_noise_shows_nothing() -> None:
    noise = torch.rand(3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judge(noise).object is None


def test_a_full_phrase_says_every_attribute_in_a_known_word() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        clip = world.sample(rng)
        words = captions.phrase(vars(clip), rng).lower().replace(",", " ").replace(".", " ").split()
        for meaning in (clip.object, clip.colour, clip.direction, clip.ground):
            assert set(words) & set(captions.MEANINGS[meaning]), (words, meaning)


@pytest.mark.parametrize("model_id", install.MODEL_IDS)
def test_the_weights_are_checkpoints_of_every_t2v_model(demo: Path, model_id: str) -> None:
    assert Checkpoints(MODELS[model_id], demo).missing_parts == []


def test_the_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in install.WEIGHTS.rglob("*") if file.is_file()) < 5.5e6


def test_plain_diffusers_makes_what_the_prompt_says(demo: Path) -> None:
    pipe = WanPipeline.from_pretrained(demo / MODELS["wan21_1b"].sources["vae"].repo, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = judge(film(pipe, "a red boat sails to the left over the sea", (96, 128, 17), seed=1))
    assert (seen.object, seen.colour, seen.direction, seen.ground) == ("boat", "red", "left", "sea")


def test_the_lora_is_one_for_these_transformers(demo: Path) -> None:
    pair = [demo / f"loras/wan22_14b_t2v/wan22_14b_t2v_{side}_noise.safetensors" for side in ("high", "low")]
    weights = load_file(demo / "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16/transformer/diffusion_pytorch_model.safetensors")
    for file in map(LoraFile.read, pair):
        assert file.metadata["ss_output_name"] == "striped_sail"
        rank, width = file.shapes["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]
        assert (rank, width) == (8, weights["blocks.0.attn1.to_q.weight"].shape[1])
