"""The client's command, a real worker with a tiny model, and everything between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from client import Client, JobStopped
from client.cli import main
from tests.client.endpoint import KEY, Api, CloudQueue
from tests.client.endpoint import serve as serve_api
from tests.cloud import Cloud
from tests.faults import Dropped, Status
from tests.s3_server import Gateway
from tests.s3_server import serve as serve_bucket
from tests.worker_process import ROOT, Endpoint, LocalApi, environment

SMALL = ["--width", "64", "--height", "64", "--num-frames", "5", "--sample-steps", "3", "--contact-sheet"]
PAIR = [{"path": f"wan22_14b_t2v/wan22_14b_t2v_{side}_noise.safetensors", "transformer": side} for side in ("high", "low")]


def frames_of(path: str) -> int:
    with av.open(path) as video:
        return sum(1 for _ in video.decode(video=0))


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with serve_bucket() as bucket:
        gateway = Gateway(bucket)
        yield gateway
        gateway.close()


@pytest.fixture(scope="module")
def api(tiny: Path, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An endpoint with one worker of wan21_i2v_14b480p."""
    cloud, folder = Cloud(), tmp_path_factory.mktemp("endpoint")
    env = environment(tiny, "wan21_i2v_14b480p", **gateway.environment(), RECOVERY_DIR=folder / "recovery")
    with Endpoint(cloud, env, folder) as endpoint, serve_api(CloudQueue(cloud)) as api:
        endpoint.wait_until_ready(endpoint.start())
        yield api
    cloud.close()


def test_a_command_becomes_a_video_in_a_folder_though_everything_fails_once(api: Api, gateway: Gateway, tmp_path: Path) -> None:
    """Client → endpoint → queue → worker → bucket → client."""
    api.faults.order("run", Status(503))
    for fault in (Dropped(), Status(502)):
        api.faults.order("status", fault)
    gateway.faults.order("GET", Status(503))
    gateway.faults.order("HEAD", Status(503))
    words = ["run", "examples/wan21_i2v_14b480p.json", "--endpoint", "endpoint", "--output-dir", str(tmp_path / "videos")]
    words += ["--lora", "wan21_i2v/rank8.safetensors@0.8", "--trigger-word", "sks", "--prompt", "[trigger] a boat", *SMALL]
    words += ["--image", "examples/first_frame.jpg", "--output-format", "mp4"]
    env = os.environ | {"RUNPOD_ENDPOINT_BASE_URL": api.base_url, "RUNPOD_API_KEY": KEY}
    command = [sys.executable, "-m", "client", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    video, sheet = done.stdout.splitlines()
    assert (video, sheet) == (f"{tmp_path}/videos/sks-a-boat-42.mp4", f"{tmp_path}/videos/sks-a-boat-42.sheet.jpg")
    assert frames_of(video) == 5
    assert Image.open(sheet).format == "JPEG"
    assert api.faults.met.total() == 3
    assert KEY not in done.stderr


def test_a_local_worker_reports_progress_and_its_files_are_copied(
    worker: LocalApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"model": "wan22_14b_t2v", "loras": PAIR, "prompts": [{"prompt": "sks"}]}))
    assert main(["run", str(file), "--url", worker.url, "--output-dir", str(tmp_path / "videos"), "--posters", *SMALL]) == 0
    out, err = capsys.readouterr()
    video, *pictures = out.splitlines()
    assert frames_of(video) == 5
    assert [Path(path).name for path in pictures] == ["sks-42.sheet.jpg", "sks-42.poster.jpg"]
    assert all(Image.open(path).format == "JPEG" for path in pictures)
    assert "\nfetch, 0%\n" in err


def test_a_sweep_that_is_killed_halfway_goes_on(worker: LocalApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "request.json", tmp_path / "sweep"
    prompt = {"prompt": "sks", "width": 64, "height": 64, "num_frames": 5, "sample_steps": 3}
    file.write_text(json.dumps({"model": "wan22_14b_t2v", "loras": PAIR, "prompts": [prompt]}))
    command = ["sweep", str(file), "--url", worker.url, "--output-dir", str(folder), "--concurrency", "2"]
    command += ["--lora", "wan22_14b_t2v/wan22_14b_t2v", "--scale", "0,1", "--seed", "1,2"]
    record = folder / "sweep.jsonl"
    with subprocess.Popen([sys.executable, "-m", "client", *command], cwd=ROOT, stderr=subprocess.PIPE) as killed:
        while not record.exists() or record.read_text().count('"id"') < 3:
            assert killed.poll() is None
            time.sleep(0.02)
        killed.kill()
    assert main(command) == 0
    grid, sheet, page = capsys.readouterr().out.splitlines()
    assert frames_of(grid) == 5
    assert Path(page).read_text().count("<canvas") == 4 and Image.open(sheet).format == "JPEG"
    videos = [path.read_bytes() for path in sorted(folder.glob("videos/*.mp4"))]
    assert len(set(videos)) == 4
    jobs = {json.loads(line)["job"]["id"] for line in record.read_text().splitlines() if '"id"' in line}
    assert len(jobs) == 4, "no job was sent twice"


def test_a_local_error_is_the_workers(worker: LocalApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["--model", "wan22_14b_t2v", "--lora", "high=nothing.safetensors", "--prompt", "a boat"]
    assert main(["run", "--url", worker.url, *request]) == 1
    assert "\nLORA_NOT_FOUND: " in capsys.readouterr().err
    assert main(["resume", "test-0", "--url", worker.url]) == 3
    assert "below test-0/ in the bucket or in OUTPUT_DIR" in capsys.readouterr().err


@pytest.fixture(params=["RunPod", "local"])
def long_job(request: pytest.FixtureRequest) -> tuple[Client, dict[str, Any]]:
    """A client, and a request that keeps its worker busy for a minute."""
    prompt: dict[str, Any] = {"prompt": "a boat", "width": 128, "height": 128, "num_frames": 81, "sample_steps": 150}
    if request.param == "local":
        client = Client.local(request.getfixturevalue("worker").url)
        return client, {"model": "wan22_14b_t2v", "loras": PAIR, "prompts": [prompt]}
    example = json.loads((ROOT / "examples/wan21_i2v_14b480p.json").read_text())["input"]
    prompt["ctrl_img"] = example["prompts"][0]["ctrl_img"]
    client = Client.endpoint("endpoint", KEY, base_url=request.getfixturevalue("api").base_url)
    return client, example | {"loras": [{"path": "wan21_i2v/rank8.safetensors"}], "prompts": [prompt]}


def test_a_job_that_is_cancelled_stops(long_job: tuple[Client, dict[str, Any]]) -> None:
    client, wanted = long_job
    job_id = client.submit(wanted)
    while (progress := client.status(job_id)).stage is None:
        assert progress.status in ("IN_QUEUE", "IN_PROGRESS")
        time.sleep(0.05)
    assert client.cancel(job_id) == "CANCELLED"
    with pytest.raises(JobStopped):
        client.wait(job_id)
