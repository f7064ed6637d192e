"""The files of examples/ are valid, need no rounding, and run on tiny models."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from client.request import job_of
from pipelines.catalog import MODELS
from pipelines.recipes import documented, preview
from tests.conftest import REAL_TOOLKIT, STAND_IN
from tests.pipelines.test_models import lora_paths
from tests.worker_process import ROOT
from worker.decide import shots_of
from worker.parse import parse
from worker.settings import Settings
from worker.startup.cold_start import cold_start

EXAMPLES = ROOT / "examples"


def example(model_id: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{model_id}.json").read_text())


def test_there_is_one_example_per_model_and_the_table_has_them() -> None:
    files = {path.name for path in EXAMPLES.glob("*.json")}
    assert files == {f"{model_id}.json" for model_id in MODELS}
    assert set(re.findall(r"\]\((\w+\.json)\)", (EXAMPLES / "README.md").read_text())) == files


@pytest.mark.parametrize("model_id", MODELS)
def test_an_example_is_valid_and_made_without_rounding(model_id: str) -> None:
    job = example(model_id)
    assert job_of(job, EXAMPLES, is_local=False) == job
    spec = MODELS[model_id]
    request = parse(job["input"], spec)
    recipe = preview(spec, "", "") if request.match == "preview" else documented(spec)
    assert not [warning for shot in shots_of(request, lambda _: recipe, lambda _: 0, {}) for warning in shot.warnings]


@pytest.mark.parametrize("model_id", MODELS)
def test_an_example_runs(model_id: str, tiny: Path, tmp_path: Path) -> None:
    """Uses the tiny model and its LoRAs, and fewer pixels, frames and steps; the rest is the file's."""
    settings = Settings(
        model_id=model_id,
        checkpoint_dir=tiny,
        lora_dir=tiny / "loras",
        device="cpu",
        ai_toolkit_path=REAL_TOOLKIT or STAND_IN,
        output_dir=tmp_path,
        recovery_dir=tmp_path / "recovery",
    )
    request = example(model_id)["input"]
    for lora, (path, _) in zip(request["loras"], lora_paths(model_id, tiny), strict=True):
        lora["path"] = str(path.relative_to(tiny / "loras"))
    for prompt in request["prompts"]:
        prompt |= {"width": 64, "height": 64, "sample_steps": 2, "num_frames": min(prompt["num_frames"], 5)}

    async def run() -> dict[str, Any]:
        return await cold_start(settings).run({"id": "example", "input": request})

    result = asyncio.run(run())
    assert "error" not in result, result["error"]
    made = result["outputs"]["videos"] + result["outputs"]["images"]
    assert len(made) == len(request["prompts"])
    assert all((tmp_path / item["key"]).stat().st_size == item["bytes"] > 0 for item in made)
