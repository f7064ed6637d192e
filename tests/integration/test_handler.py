"""`python handler.py`: one local run, and starts that must fail with one clear line."""

from __future__ import annotations

import ast
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import av
import pytest
import requests

from tests.conftest import STAND_IN
from tests.integration.test_local_api import request_for
from tests.s3_server import serve
from tests.worker_process import ROOT, Cloud, environment, local_api, process, run_handler


def test_test_input_json_runs_as_it_is_to_a_playable_mp4(tiny: Path, tmp_path: Path) -> None:
    done = run_handler(environment(tiny, "wan22_14b_t2v", OUTPUT_DIR=tmp_path))
    assert done.returncode == 0, done.stderr
    result = ast.literal_eval(done.stdout.split("Job result: ")[1].splitlines()[0])["output"]
    wanted = json.loads((ROOT / "test_input.json").read_text())["input"]["prompts"][0]
    with av.open(str(tmp_path / "local_test/0.mp4")) as video:
        frames = list(video.decode(video=0))
    assert result["outputs"]["videos"][0]["url"] == (tmp_path / "local_test/0.mp4").as_uri()
    assert (len(frames), frames[0].width, frames[0].height) == (wanted["num_frames"], wanted["width"], wanted["height"])


def test_a_local_error_ends_with_status_1_and_says_the_code(tiny: Path, tmp_path: Path) -> None:
    job = json.dumps({"input": {"model": "wan21_1b"}})
    done = run_handler(environment(tiny, "wan21_1b", OUTPUT_DIR=tmp_path), "--test_input", job)
    assert done.returncode == 1
    assert "INVALID_INPUT: " in done.stdout


def test_a_terminal_shows_a_progress_bar(tiny: Path, tmp_path: Path) -> None:
    job = json.dumps({"input": request_for("wan21_1b", tiny, width=128, height=128, num_frames=33, sample_steps=150)})
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, str(ROOT / "handler.py"), "--test_input", job]
    env = environment(tiny, "wan21_1b", OUTPUT_DIR=tmp_path)
    with subprocess.Popen(command, env=env, cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL):
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
    os.close(ours)
    assert b"100%" in seen
    assert b"denoise 1/1" in seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MODEL_ID": ""}, "MODEL_ID is not set"),
        ({"MODEL_ID": "flux"}, "MODEL_ID: 'flux' is not a model id"),
        ({"PRESIGNED_URL_TTL": "700000"}, "PRESIGNED_URL_TTL: "),
        ({"OFFLOAD_MODE": "some"}, "OFFLOAD_MODE: "),
        ({"OFFLOAD_MODE": "model"}, "OFFLOAD_MODE=model needs DEVICE=cuda"),
        ({"BUCKET_NAME": "Bad Name!"}, "BUCKET_NAME: is not a bucket name"),
        ({"BUCKET_NAME": "bucket"}, "set BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY too"),
        ({"CHECKPOINT_DIR": "/nowhere"}, "CHECKPOINT_NOT_FOUND: "),
        ({"MODEL_ID": "wan22_5b"}, "AI_TOOLKIT_REQUIRED: "),
        ({"MODEL_ID": "wan22_14b_i2v", "AI_TOOLKIT_PATH": "/nowhere"}, "AI_TOOLKIT_REQUIRED: "),
        ({"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/$ID?x"}, "STORAGE_NOT_CONFIGURED: "),
    ],
)
def test_a_worker_that_cannot_work_stops_at_start_with_one_clear_line(tiny: Path, change: dict[str, str], says: str) -> None:
    done = run_handler(environment(tiny, "wan21_1b", **change))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith("worker-wan-lora cannot start: ")
    assert says in line
    assert "Starting Serverless Worker" not in done.stdout


def test_sigterm_finishes_the_running_job(tiny: Path, tmp_path: Path) -> None:
    cloud = Cloud()
    with serve() as bucket:
        env = environment(tiny, "wan22_5b", AI_TOOLKIT_PATH=STAND_IN, **bucket.environment(), **cloud.environment())
        with process(env, tmp_path / "worker.log") as worker:
            cloud.submit("last", request_for("wan22_5b", tiny, width=128, height=128, num_frames=33, sample_steps=40))
            cloud.wait(lambda: cloud.progress_of("last"), "progress")
            worker.terminate()
            assert "output" in cloud.wait_for("last")
            assert worker.wait(timeout=120) == 0
    cloud.close()


def test_a_cloud_worker_that_cannot_start_tells_the_platform_why(tiny: Path) -> None:
    cloud = Cloud()
    try:
        done = run_handler(environment(tiny, "wan21_1b", **cloud.environment()))
        assert done.returncode == 1
        assert "STORAGE_NOT_CONFIGURED" in cloud.pings[-1].unhealthy_because
    finally:
        cloud.close()


def test_a_cloud_worker_whose_gpu_died_gives_its_error_and_leaves_with_status_1(tiny: Path, tmp_path: Path) -> None:
    """The death is played: no device here can be killed. That a real one is noticed is a test marked `gpu`."""
    lines = [
        "import handler",
        "from pipelines import WanModel, device",
        "def denoise(*_): raise RuntimeError('CUDA error: an illegal memory access was encountered')",
        "WanModel._denoise, device.answers = denoise, lambda _: False",
        "handler.main()",
    ]
    cloud = Cloud()
    with serve() as bucket:
        env = environment(tiny, "wan21_1b", **bucket.environment(), **cloud.environment())
        command = [sys.executable, "-c", "\n".join(lines)]
        with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
            cloud.submit("unlucky", request_for("wan21_1b", tiny))
            assert cloud.wait_for("unlucky")["error"].startswith("INTERNAL: the GPU failed and this worker is shutting down")
            assert worker.wait(timeout=60) == 1
    cloud.close()


def test_a_local_api_that_is_told_to_leave_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir()
    env = environment(tiny, "wan21_1b", OUTPUT_DIR=tmp_path, TMPDIR=tmp_path / "temp")
    with local_api(env, tmp_path) as api:
        assert list((tmp_path / "temp").glob("worker-wan-lora-*"))
        long = request_for("wan21_1b", tiny, sample_steps=150, num_frames=201)
        assert requests.post(f"{api.url}/run", json={"input": long}, timeout=30).json()["status"] == "IN_PROGRESS"
        api.process.terminate()
        assert api.process.wait(timeout=30) == 0
    assert not list((tmp_path / "temp").glob("worker-wan-lora-*"))


def test_an_empty_address_of_the_queue_counts_as_none(tiny: Path, tmp_path: Path) -> None:
    env = environment(tiny, "wan21_1b", OUTPUT_DIR=tmp_path, RUNPOD_WEBHOOK_GET_JOB="")
    done = run_handler(env, "--test_input", json.dumps({"input": request_for("wan21_1b", tiny)}))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "local_test/0.mp4").exists() or list(tmp_path.rglob("0.*"))
