"""What a prompt can choose beside the model page: shift, a second guidance, how an image is fitted, a last frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from pipelines import Sampling, WanModel, load_pipeline
from pipelines.base import fit_image
from pipelines.catalog import ImageFit
from pipelines.recipes import documented
from pipelines.toolkit_models import add_frames_conditioning
from tests.conftest import REAL_TOOLKIT, STAND_IN

OTHER_PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (64, 96, 3), dtype=np.uint8))
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8))
SAMPLING = Sampling("a boat", width=64, height=32, num_frames=5, num_inference_steps=4, control_image=PICTURE)


@pytest.fixture(scope="module")
def i2v(tiny: Path) -> WanModel:
    return load_pipeline("wan22_14b_i2v", tiny, "cpu", toolkit_path=REAL_TOOLKIT or STAND_IN)


@pytest.fixture(scope="module")
def t2v(tiny: Path) -> WanModel:
    return load_pipeline("wan22_14b_t2v", tiny, "cpu")


def frames(model: WanModel, shift: float | None = None, **changes: Any) -> np.ndarray:
    image = PICTURE if model.spec.control_image == "required" else None
    sampling = replace(SAMPLING, control_image=image, **changes)
    return np.concatenate(list(model.generate(sampling, documented(model.spec).with_shift(shift))))


@pytest.mark.parametrize("name", ["i2v", "t2v"])
def test_a_shift_is_that_of_the_schedule_and_leaves_the_next_video_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    usual = frames(model)
    own = model.schedulers.numbers_of(documented(model.spec))["shift"]
    shifted = documented(model.spec).with_shift(7.0)
    assert model.schedulers.numbers_of(shifted)["shift"] == 7.0
    scheduler = model.schedulers.of(shifted)
    scheduler.set_timesteps(4)
    linear = np.linspace(1, 1 / 1000, 5)[:-1]
    assert np.allclose(scheduler.sigmas[:4], 7 * linear / (1 + 6 * linear), atol=2e-3)
    assert not np.array_equal(frames(model, 7.0), usual)
    assert np.array_equal(frames(model, own), usual)
    assert np.array_equal(frames(model), usual)


@pytest.mark.parametrize("name", ["i2v", "t2v"])
def test_the_second_guidance_is_that_of_the_low_noise_transformer(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    usual = frames(model, num_inference_steps=2, shift=1.0)
    assert np.array_equal(frames(model, num_inference_steps=2, shift=1.0, guidance_scale_2=4.0), usual)
    assert not np.array_equal(frames(model, num_inference_steps=2, shift=1.0, guidance_scale_2=2.0), usual)
    # With one step, all is high noise, and the second guidance has nothing to say.
    one = frames(model, num_inference_steps=1)
    assert np.array_equal(frames(model, num_inference_steps=1, guidance_scale_2=2.0), one)


def test_an_image_is_stretched_cropped_or_padded() -> None:
    wide = Image.new("RGB", (128, 32), "red")
    wide.paste("blue", (48, 0, 80, 32))
    made = {fit: np.asarray(fit_image(wide, Sampling("", width=64, height=64, image_fit=fit))) for fit in get_args(ImageFit)}
    red, blue, black = (255, 0, 0), (0, 0, 255), (0, 0, 0)
    assert {image.shape for image in made.values()} == {(64, 64, 3)}
    assert [tuple(made["stretch"][32, x]) for x in (14, 32, 50)] == [red, blue, red]
    assert [tuple(made["crop"][32, x]) for x in (14, 32, 50)] == [blue, blue, blue]
    assert [tuple(made["pad"][y, 32]) for y in (14, 32, 50)] == [black, blue, black]
    assert np.array_equal(made["stretch"], np.asarray(wide.resize((64, 64), Image.Resampling.LANCZOS)))


def test_the_conditioning_with_a_last_frame_is_diffusers_own(i2v: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, noise = i2v._pipe, torch.randn(1, 16, 3, 8, 12)
    first, last = torch.rand(1, 3, 64, 96) * 2 - 1, torch.rand(1, 3, 64, 96) * 2 - 1
    # Without a last frame it is the toolkit's, which draws from the encoder's distribution.
    with torch.no_grad():
        torch.manual_seed(1)
        theirs = i2v._toolkit.add_first_frame_conditioning(noise, first, pipe.vae)  # type: ignore[attr-defined]
        torch.manual_seed(1)
        assert torch.equal(add_frames_conditioning(noise, first, None, pipe.vae), theirs)
        # diffusers takes the distribution's mode.
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        diffusers = WanImageToVideoPipeline(
            pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, transformer=pipe.transformer
        )
        _, condition = diffusers.prepare_latents(first, 1, 16, 64, 96, 9, torch.float32, torch.device("cpu"), None, noise, last)
        made = add_frames_conditioning(noise, first, last, pipe.vae)
    assert torch.equal(made[:, 16:20], condition[:, :4])
    assert torch.allclose(made[:, 20:], condition[:, 4:], atol=1e-5)
    assert torch.equal(made[:, :16], noise)


def test_a_last_image_changes_the_video_and_leaves_the_next_as_it_was(i2v: WanModel, t2v: WanModel) -> None:
    usual = frames(i2v)
    ended = frames(i2v, last_image=OTHER_PICTURE)
    assert not np.array_equal(ended, usual)
    assert np.array_equal(frames(i2v), usual)
    assert np.array_equal(frames(i2v, last_image=OTHER_PICTURE), ended)
    with pytest.raises(ValueError, match="takes no last image"):
        frames(t2v, last_image=OTHER_PICTURE)
