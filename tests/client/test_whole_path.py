"""The client as a user starts it, a real worker on a tiny model, and everything between them."""

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
import requests

from client import Client, JobStopped
from tests.client.endpoint import KEY, Api, CloudQueue
from tests.client.endpoint import serve as serve_api
from tests.cloud import Cloud
from tests.faults import Dropped, Status
from tests.s3_server import Gateway
from tests.s3_server import serve as serve_bucket
from tests.worker_process import ROOT, Endpoint, LocalApi, environment, local_api

SLOW = {"width": 128, "height": 128, "num_frames": 33, "sample_steps": 30}
"""A prompt that denoises for some seconds."""


def client_command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False, timeout=120)


def frames_of(path: str) -> int:
    with av.open(path) as video:
        return sum(1 for _ in video.decode(video=0))


# RunPod: client → endpoint → queue → worker → bucket → client.


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with serve_bucket() as bucket:
        gateway = Gateway(bucket)
        yield gateway
        gateway.close()


@pytest.fixture(scope="module")
def api(tiny: Path, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An endpoint with one worker of wan21_1b."""
    cloud, folder = Cloud(), tmp_path_factory.mktemp("endpoint")
    env = environment(tiny, "wan21_1b", **gateway.environment(), RECOVERY_DIR=folder / "recovery")
    with Endpoint(cloud, env, folder) as endpoint, serve_api(CloudQueue(cloud)) as api:
        endpoint.wait_until_ready(endpoint.start())
        yield api
    cloud.close()


def test_a_command_becomes_a_video_in_a_folder_though_everything_fails_once(api: Api, gateway: Gateway, tmp_path: Path) -> None:
    api.faults.order("run", Status(503))
    for fault in (Dropped(), Status(502)):
        api.faults.order("status", fault)
    gateway.faults.order("GET", Status(503))
    gateway.faults.order("HEAD", Status(503))
    words = ["run", "--endpoint", "endpoint", "--output-dir", str(tmp_path / "videos"), "--model", "wan21_1b"]
    words += ["--lora", "wan21_1b/rank4.safetensors@0.8", "--trigger-word", "sks", "--prompt", "[trigger] a boat"]
    words += ["--width", "128", "--height", "128", "--num-frames", "17", "--sample-steps", "150"]
    done = client_command(*words, RUNPOD_ENDPOINT_BASE_URL=api.base_url, RUNPOD_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    path = f"{tmp_path}/videos/sks-a-boat-42.mp4"
    assert done.stdout == f"{path}\n"
    assert frames_of(path) == 17
    assert "denoise, step " in done.stderr
    assert api.faults.met.total() == 3
    assert KEY not in done.stderr


def test_a_job_that_is_cancelled_stops(api: Api, tiny: Path) -> None:
    client = Client.endpoint("endpoint", KEY, base_url=api.base_url)
    prompt = {"prompt": "a boat", **SLOW, "num_frames": 81, "sample_steps": 150}
    job_id = client.submit({"model": "wan21_1b", "loras": [{"path": "wan21_1b/rank4.safetensors"}], "prompts": [prompt]})
    stop = time.monotonic() + 60
    while client.status(job_id).stage != "denoise":
        assert time.monotonic() < stop
        time.sleep(0.1)
    assert client.cancel(job_id) == "CANCELLED"
    with pytest.raises(JobStopped):
        client.wait(job_id)
    assert isinstance(api.queue, CloudQueue)
    api.queue.cloud.wait(lambda: [stop for stop in api.queue.cloud.stops if stop.job_id == job_id], "stop")  # type: ignore


# The local API.


@pytest.fixture(scope="module")
def local(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    folder = tmp_path_factory.mktemp("local")
    with local_api(environment(tiny, "wan21_i2v_14b480p", OUTPUT_DIR=folder / "out"), folder) as api:
        yield api


def request_file(folder: Path, **changes: Any) -> Path:
    """The example of the model, small, and with its tiny LoRA."""
    request = json.loads((ROOT / "examples/wan21_i2v_14b480p.json").read_text())["input"]
    request["loras"][0]["path"] = "wan21_i2v/rank8.safetensors"
    request["prompts"][0] |= {"width": 64, "height": 64, "num_frames": 5, "sample_steps": 3, **changes}
    file = folder / "request.json"
    file.write_text(json.dumps(request))
    return file


def test_a_local_api_makes_a_video_from_an_image_of_this_computer(local: LocalApi, tmp_path: Path) -> None:
    file, image = str(request_file(tmp_path)), str(ROOT / "examples/first_frame.jpg")
    folder = tmp_path / "videos"
    words = ["run", file, "--url", local.url, "--output-dir", str(folder), "--json", "--output-format", "mp4"]
    plain, other = client_command(*words), client_command(*words, "--image", image)
    assert (plain.returncode, other.returncode) == (0, 0), plain.stderr + other.stderr
    (first,), (second,) = (json.loads(done.stdout)["files"] for done in (plain, other))
    assert first["path"] == f"{folder}/the-sail-fills-with-wind-42.mp4"
    assert second["path"] == f"{folder}/the-sail-fills-with-wind-42-2.mp4"
    assert frames_of(first["path"]) == frames_of(second["path"]) == 5


def test_a_local_error_is_the_workers(local: LocalApi, tmp_path: Path) -> None:
    done = client_command("run", str(request_file(tmp_path)), "--url", local.url, "--lora", "nothing.safetensors")
    assert done.returncode == 1
    assert "\nLORA_NOT_FOUND: " in done.stderr
    gone = client_command("resume", "test-0", "--url", local.url)
    assert gone.returncode == 3
    assert "OUTPUT_DIR, below test-0/" in gone.stderr


def test_a_local_job_whose_connection_broke_is_made_once_and_its_result_comes(local: LocalApi, tmp_path: Path) -> None:
    client = Client.local(local.url)
    job_id = client.submit(json.loads(request_file(tmp_path, **SLOW).read_text()))
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{local.url}/status/{job_id}", timeout=0.2)
    assert client.wait(job_id).outputs[0].bytes
    lines = [json.loads(line) for line in local.log.read_text().splitlines() if line.startswith("{")]
    assert sum(line.get("job") == job_id and line["message"] == "generate done" for line in lines) == 1
