"""The selective loading of an ai-toolkit checkout."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from pipelines import Sampling, load_pipeline
from pipelines.catalog import TOOLKIT_COMMIT
from pipelines.errors import ToolkitRequired
from pipelines.toolkit import load_toolkit
from tests.conftest import REAL_TOOLKIT, STAND_IN


def test_no_package_init_of_the_checkout_is_run(toolkit_path: Path) -> None:
    """The stand-in's raise ImportError; the real ones import the whole trainer."""
    toolkit = load_toolkit(toolkit_path)
    assert toolkit.Wan22Pipeline.__module__ == "extensions_built_in.diffusion_models.wan22.wan22_pipeline"
    trainer = {name for name in sys.modules if name.startswith(("toolkit.", "extensions_built_in."))}
    assert {name for name in trainer if getattr(sys.modules[name], "__file__", None)} == {
        "toolkit.basic",
        "toolkit.models.wan21.wan_utils",
        "extensions_built_in.diffusion_models.wan22.wan22_pipeline",
    }


@pytest.mark.parametrize("model_id", ["wan22_14b_i2v", "wan22_5b"])
@pytest.mark.parametrize("checkout", ["none", "empty", "broken"])
def test_a_model_on_the_toolkit_says_what_it_lacks(model_id: str, checkout: str, tiny: Path, tmp_path: Path) -> None:
    if checkout == "broken":
        for name in ("extensions_built_in/diffusion_models/wan22/wan22_pipeline.py", "toolkit/models/wan21/wan_utils.py"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("import a_package_that_is_not_there\n")
    says = {"none": "set AI_TOOLKIT_PATH", "empty": "lacks .*wan22_pipeline.py", "broken": "a_package_that_is_not_there"}
    with pytest.raises(ToolkitRequired, match=says[checkout]):
        load_pipeline(model_id, tiny, "cpu", toolkit_path=None if checkout == "none" else tmp_path)


def test_the_other_models_need_no_checkout(tiny: Path) -> None:
    assert load_pipeline("wan21_1b", tiny, "cpu", toolkit_path=None).spec.id == "wan21_1b"


def test_a_checkout_at_another_commit_than_the_tested_one_is_refused(tmp_path: Path) -> None:
    checkout = shutil.copytree(STAND_IN, tmp_path / "checkout")
    (checkout / ".git").mkdir()
    (checkout / ".git/HEAD").write_text("a" * 40)
    with pytest.raises(ToolkitRequired, match=r"set AI_TOOLKIT_COMMIT=a{40} to run with yours"):
        load_toolkit(checkout, "b" * 40)
    assert load_toolkit(checkout, "a" * 40).Wan22Pipeline


@pytest.mark.toolkit
def test_the_real_checkout_is_at_the_tested_commit() -> None:
    assert REAL_TOOLKIT and load_toolkit(REAL_TOOLKIT, TOOLKIT_COMMIT)


@pytest.mark.toolkit
@pytest.mark.parametrize("function", ["add_first_frame_conditioning", "add_first_frame_conditioning_v22"])
def test_the_stand_in_conditions_as_the_real_toolkit(function: str, tiny: Path) -> None:
    assert REAL_TOOLKIT
    repo = "ai-toolkit/wan2.1-vae" if function.endswith("conditioning") else "Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae"
    vae = AutoencoderKLWan.from_pretrained(tiny / repo)
    latents = torch.randn(1, vae.config.z_dim, 3, 4, 6, generator=torch.manual_seed(1))
    image = torch.rand(1, 3, 50, 70, generator=torch.manual_seed(2)) * 2 - 1
    results = []
    for checkout in (STAND_IN, REAL_TOOLKIT):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(getattr(load_toolkit(checkout), function)(latents, image, vae))
    pairs = zip(*results, strict=True) if isinstance(results[0], tuple) else [results]
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.toolkit
@pytest.mark.parametrize("model_id", ["wan22_14b_i2v", "wan22_5b"])
def test_the_stand_in_makes_the_frames_of_the_real_toolkit(model_id: str, tiny: Path) -> None:
    from PIL import Image

    assert REAL_TOOLKIT
    sampling = Sampling(
        "x", width=96, height=64, num_frames=5, num_inference_steps=3, control_image=Image.new("RGB", (9, 9), "red")
    )
    made = [
        next(load_pipeline(model_id, tiny, "cpu", toolkit_path=checkout).generate(sampling))
        for checkout in (STAND_IN, REAL_TOOLKIT)
    ]
    assert np.abs(made[0].astype(int) - made[1]).max() <= 1
