"""`preview`: the frames are those that ai-toolkit itself makes, by its own model classes from a real checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Adapter, load_pipeline
from pipelines.catalog import MODELS
from pipelines.lora.file import LoraFile
from pipelines.recipes import Era, preview
from tests import trainer
from tests.conftest import REAL_TOOLKIT
from tests.pipelines.test_models import PICTURE, lora_paths, make
from tests.reference import Wanted

CASES = [*((model_id, False) for model_id in MODELS), ("wan22_5b", True)]


@pytest.mark.toolkit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("era", ["flowmatch", "unipc"])
@pytest.mark.parametrize(("model_id", "with_image"), CASES, ids=[f"{m}{'-image' if i else ''}" for m, i in CASES])
def test_preview_frames_are_the_trainers_own(
    model_id: str, with_image: bool, era: Era, dtype: torch.dtype, tiny: Path, tmp_path: Path
) -> None:
    assert REAL_TOOLKIT
    spec = MODELS[model_id]
    image = PICTURE if with_image or spec.control_image == "required" else None
    loras = [(path, 0.8, side) for path, side in lora_paths(model_id, tiny)]
    # 112 is a multiple of 16 and not of 32; 7 is no count of the form 4n+1.
    wanted = Wanted("a boat", 128 if model_id == "wan22_5b" else 112, 64, 7, neg="dark", steps=4, image=image, loras=loras)
    theirs = trainer.sample(model_id, tiny, REAL_TOOLKIT, wanted, era, dtype, tmp_path)

    model = load_pipeline(model_id, tiny, "cpu", toolkit_path=REAL_TOOLKIT, dtype=dtype)
    model.apply_loras([Adapter(LoraFile.read(path), scale, side) for path, scale, side in loras], "merge")
    ours = make(
        model,
        preview(spec, era, "a test"),
        width=wanted.width,
        height=64,
        num_frames=7,
        negative_prompt="dark",
        num_inference_steps=4,
        control_image=image,
    )
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= (1 if dtype is torch.float32 else 0)
