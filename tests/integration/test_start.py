"""The start of `python handler.py`: what it imports, and what it says of its time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.catalog import MODELS
from tests.conftest import STAND_IN
from tests.integration.test_local_api import request_for
from tests.worker_process import ROOT, environment, run_handler
from worker.settings import Settings, SettingsError
from worker.startup.cold_start import cold_start

LEFT_OUT = {"sympy", "torch._dynamo.config", "torch.distributed.tensor", "paramiko.client", "fastapi", "imageio"}


def imported_by_handler(env: dict[str, str], folder: Path, *arguments: str) -> tuple[int, set[str]]:
    """(exit status, names of the modules that a run of the handler has imported in the end)."""
    (folder / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: print('imported:', *sys.modules, file=sys.stderr))\n"
    )
    done = run_handler(env | {"PYTHONPATH": str(folder)}, *arguments)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("imported:")]
    return done.returncode, set(line.split())


def test_a_start_and_a_job_import_no_compiler_no_other_processes_and_no_ssh(tiny: Path, tmp_path: Path) -> None:
    env = environment(tiny, "wan21_1b", OUTPUT_DIR=tmp_path)
    job = json.dumps({"input": request_for("wan21_1b", tiny)})
    status, imported = imported_by_handler(env, tmp_path, "--test_input", job)
    assert (status, imported & LEFT_OUT) == (0, set())
    assert "diffusers.pipelines.wan.pipeline_wan" in imported


def test_settings_are_found_wrong_before_anything_heavy_is_imported(tiny: Path, tmp_path: Path) -> None:
    status, imported = imported_by_handler(environment(tiny, "flux"), tmp_path)
    assert (status, imported & {"torch", "diffusers", "transformers", "runpod", "boto3", "av"}) == (1, set())


@pytest.mark.parametrize("model_id", ["wan21_i2v_14b", "wan22_14b_t2v", "wan22_5b"])
def test_the_ready_line_says_where_the_time_went(model_id: str, tiny: Path, tmp_path: Path) -> None:
    env = environment(tiny, model_id, OUTPUT_DIR=tmp_path, AI_TOOLKIT_PATH=STAND_IN)
    done = run_handler(env, "--test_input", json.dumps({"input": request_for(model_id, tiny)}))
    (ready,) = [json.loads(line) for line in done.stderr.splitlines() if '"cold start done"' in line]
    weights = {"text_encoder", "image_encoder", "vae", "transformer", "transformer_2"} & MODELS[model_id].sources.keys()
    assert {"settings", "sdk", "libraries", "storage"} | weights <= ready["took"].keys()
    assert all(0 <= seconds < 300 for seconds in ready["took"].values())
    assert ready["took"]["libraries"] > 0.1


def test_the_handler_starts_as_usual_with_versions_it_does_not_know(tiny: Path, tmp_path: Path) -> None:
    """Another version, made up by a module that is imported before all others."""
    (tmp_path / "sitecustomize.py").write_text(
        "from worker.startup import lean_imports\nlean_imports.TESTED_WITH['peft'] = '0.1'\n"
    )
    env = environment(tiny, "wan21_1b", OUTPUT_DIR=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = run_handler(env, "--test_input", json.dumps({"input": request_for("wan21_1b", tiny)}))
    assert done.returncode == 0, done.stderr
    assert "slow start: all modules of the libraries are imported, since peft is " in done.stderr


def test_exact_leaves_out_what_changes_a_bit_and_says_so(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    choices = {"model_id": "wan21_1b", "checkpoint_dir": tiny, "device": "cpu", "attention": "flash3", "compile": True}
    runner = cold_start(Settings(**choices, exact=True))
    assert (runner._gpu.model.facts["attention"], runner._gpu.model.facts["compiled"]) == ("native", False)
    assert "EXACT=1: ATTENTION and COMPILE are ignored" in caplog.text
    with pytest.raises(SettingsError, match="ATTENTION=flash3 does not work here"):
        cold_start(Settings(**choices))
