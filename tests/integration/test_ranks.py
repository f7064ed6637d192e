"""A worker of two ranks, each a process: the same results, and an end in which nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.cloud import Cloud
from tests.integration.test_local_api import frames_of, request_for
from tests.s3_server import serve
from tests.worker_process import ROOT, LocalApi, environment, local_api, run_handler

MODEL = "wan22_14b_t2v"
WHICH = ("prompt_index", "video_index", "seed")
SLOW = {"width": 128, "height": 128, "num_frames": 33, "sample_steps": 150}


@pytest.fixture
def pair(tiny: Path, tmp_path: Path) -> Iterator[LocalApi]:
    with local_api(environment(tiny, MODEL, OUTPUT_DIR=tmp_path / "out", GPUS="2"), tmp_path) as api:
        yield api


def ranks_of(worker: int) -> list[int]:
    """The process ids of its other ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if parent == worker and "worker.rank" in command:
            found.append(int(folder.name))
    return found


def ends_within(seconds: float, pid: int) -> bool:
    """Whether the process ends; one that nobody has waited for yet has ended too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def write_for_ranks(folder: Path, *lines: str) -> None:
    """Have every rank but 0 run these lines first, when PYTHONPATH is the folder."""
    code = [
        "import os, sys",
        "if 'worker.rank' in sys.orig_argv:",
        "    import torch.distributed",
        *(f"    {line}" for line in lines),
    ]
    (folder / "sitecustomize.py").write_text("\n".join(code))


def started(api: LocalApi, request: dict[str, Any]) -> str:
    """A job that denoises."""
    job_id = requests.post(f"{api.url}/run", json={"input": request}, timeout=30).json()["id"]
    end = time.monotonic() + 60
    while "denoise" not in str(status(api, job_id).get("output")):
        assert time.monotonic() < end, status(api, job_id)
        time.sleep(0.02)
    return job_id


def status(api: LocalApi, job_id: str) -> dict[str, Any]:
    return requests.get(f"{api.url}/status/{job_id}", timeout=30).json()


def check_alike(one: LocalApi, two: LocalApi, tiny: Path) -> None:
    request, plain = request_for(MODEL, tiny), request_for(MODEL, tiny, guidance_scale=1)
    for asked in (request, request | {"match": "preview"}, plain, plain | {"prompts": 2 * plain["prompts"]}):
        alone, both = (api.run(asked)["output"] for api in (one, two))
        assert (alone["settings"]["gpus"], both["settings"]["gpus"]) == (1, 2)
        for its, theirs in zip(alone["outputs"]["videos"], both["outputs"]["videos"], strict=True):
            assert (frames_of(its) == frames_of(theirs)).all()
        idle = [text for text in both["warnings"] if "one of the worker's GPUs makes this video" in text]
        assert len(idle) == (asked is plain)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_serve_as_one_does_and_the_death_of_one_ends_both(tiny: Path, tmp_path: Path) -> None:
    with ExitStack() as workers:
        apis = []
        for gpus in ("1", "2"):
            (folder := tmp_path / gpus).mkdir()
            env = environment(tiny, MODEL, DEVICE="cuda", OUTPUT_DIR=folder / "out", GPUS=gpus)
            apis.append(workers.enter_context(local_api(env, folder)))
        check_alike(*apis, tiny)
        job_id = started(apis[1], request_for(MODEL, tiny, **SLOW))
        (rank,) = ranks_of(apis[1].process.pid)
        os.kill(rank, signal.SIGKILL)  # the other may wait for its result over NCCL, which does not notice
        error = requests.post(f"{apis[1].url}/status/{job_id}", timeout=60).json()["error"]
        assert error == "INTERNAL: the GPU failed and this worker is shutting down; send the job again"
        assert apis[1].process.wait(timeout=60) == 1


def test_two_ranks_serve_as_one_does_and_the_death_of_one_ends_both(pair: LocalApi, worker: LocalApi, tiny: Path) -> None:
    request = request_for(MODEL, tiny)
    check_alike(worker, pair, tiny)
    job_id = started(pair, request_for(MODEL, tiny, **SLOW))
    requests.post(f"{pair.url}/cancel/{job_id}", timeout=30)
    assert pair.run(request)["status"] == "COMPLETED"
    loads = pair.log.read_text().count("load done")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(pair.run, request_for(MODEL, tiny, **SLOW))
        while pair.log.read_text().count("load done") == loads:  # it denoises next
            time.sleep(0.02)
        (rank,) = ranks_of(pair.process.pid)
        os.kill(rank, signal.SIGKILL)
    assert answer.result()["error"] == "INTERNAL: the GPU failed and this worker is shutting down; send the job again"
    assert pair.process.wait(timeout=60) == 1
    assert ends_within(0.1, rank)


def test_two_ranks_make_videos_without_guidance_side_by_side(pair: LocalApi, worker: LocalApi, tiny: Path) -> None:
    request = request_for(MODEL, tiny, guidance_scale=1)
    (plain,) = request["prompts"]
    guided, other = plain | {"guidance_scale": 5}, plain | {"prompt": "no boat"}
    several = request | {"prompts": [plain, plain | {"num_videos": 3, "seed": 7, "num_frames": 5}, guided, other]}
    alone, both = (api.run(several)["output"] for api in (worker, pair))
    assert alone["settings"] | {"gpus": 2} == both["settings"]
    for one, two in zip(alone["outputs"]["videos"], both["outputs"]["videos"], strict=True):
        assert [one.get(name) for name in WHICH] == [two.get(name) for name in WHICH]
        assert (frames_of(one) == frames_of(two)).all()
    assert [text.partition(":")[0] for text in both["warnings"] if "makes this video" in text] == ["prompts[3]"]
    lines = [json.loads(line) for line in pair.log.read_text().splitlines() if '"stage": "generate"' in line]
    assert len(lines) == 6
    made_by = {rank: {line["prompt_index"] for line in lines if line.get("gpu", 0) == rank} for rank in (0, 1)}
    assert made_by[0] >= {0, 2, 3}
    assert made_by[1] == {1}, "the first rank takes the first video, and shares or makes alone what nothing can go beside"

    slow = request | {"prompts": [plain | SLOW | {"seed": seed} for seed in (1, 2, 3)]}
    requests.post(f"{pair.url}/cancel/{started(pair, slow)}", timeout=30)
    again = pair.run(several)["output"]
    for before, after in zip(both["outputs"]["videos"], again["outputs"]["videos"], strict=True):
        assert (frames_of(before) == frames_of(after)).all()

    job_id = started(pair, slow)
    (rank,) = ranks_of(pair.process.pid)
    os.kill(rank, signal.SIGKILL)
    left = requests.post(f"{pair.url}/status/{job_id}", timeout=120).json()["output"]
    assert [video["prompt_index"] for video in left["outputs"]["videos"]] == [0], "what needed no other rank is finished"
    assert [(error["prompt_index"], error["code"]) for error in left["errors"]] == [(1, "INTERNAL"), (2, "INTERNAL")]
    assert pair.process.wait(timeout=60) == 1


def test_a_rank_that_dies_while_the_worker_does_not_look_ends_the_job_and_the_worker(tiny: Path, tmp_path: Path) -> None:
    """A call that never ends stands for one of the driver's, which waits for a result that the dead rank was to send."""
    lines = [
        "import handler, threading",
        "from pipelines import WanModel",
        "WanModel._denoise = lambda *_: print('held', flush=True) or threading.Event().wait()",
        "handler.main()",
    ]
    cloud = Cloud()
    with serve() as bucket:
        env = environment(tiny, MODEL, GPUS="2", TMPDIR=tmp_path, **bucket.environment(), **cloud.environment())
        command = [sys.executable, "-c", "\n".join(lines)]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as worker:
            cloud.submit("unlucky", request_for(MODEL, tiny))
            assert worker.stdout is not None
            assert any(line == b"held\n" for line in worker.stdout)
            (rank,) = ranks_of(worker.pid)
            os.kill(rank, signal.SIGKILL)
            assert cloud.wait_for("unlucky")["error"].startswith("INTERNAL: the GPU failed and this worker is shutting down")
            assert worker.wait(timeout=60) == 1
    cloud.close()


def test_a_rank_that_dies_while_the_ranks_meet_ends_the_start_soon(tiny: Path, tmp_path: Path) -> None:
    write_for_ranks(tmp_path, "torch.distributed.init_process_group = lambda *_, **__: os._exit(9)")
    cloud = Cloud()
    with serve() as bucket:
        env = environment(tiny, MODEL, GPUS="2", PYTHONPATH=tmp_path, **bucket.environment(), **cloud.environment())
        started = run_handler(env)
    cloud.close()
    assert started.returncode == 1
    assert "worker-wan-lora cannot start: INTERNAL: another GPU's process ended" in started.stderr
    assert "another GPU's process ended" in cloud.pings[-1].unhealthy_because


def test_memory_that_runs_out_in_an_exchange_is_named_and_ends_the_worker(tiny: Path, tmp_path: Path) -> None:
    write_for_ranks(
        tmp_path, "def full(*_): raise torch.OutOfMemoryError('CUDA out of memory')", "torch.distributed.broadcast = full"
    )
    env = environment(tiny, MODEL, GPUS="2", PYTHONPATH=tmp_path, OUTPUT_DIR=tmp_path / "out")
    with local_api(env, tmp_path) as api:
        answer = api.run(request_for(MODEL, tiny))
        assert answer["error"].startswith("OUT_OF_MEMORY: the memory ran out while the GPUs exchanged their results; ask for")
        assert api.process.wait(timeout=60) == 1
        lines = [json.loads(line) for line in api.log.read_text().splitlines() if line.startswith('{"time"')]
    assert [line["gpu"] for line in lines if line["message"] == "this GPU is lost"] == [1]


def test_ranks_end_with_their_worker_whatever_they_are_doing(tiny: Path, tmp_path: Path) -> None:
    code = "import time; from worker.ranks import Ranks; ranks = Ranks(3); print('ready', flush=True); time.sleep(60)"
    env = {**environment(tiny, MODEL, GPUS="4"), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        time.sleep(1)  # they import their libraries by now; at first, /proc may not have their command lines yet
        ranks = ranks_of(worker.pid)
        assert len(ranks) == 3
        worker.kill()
        assert all(ends_within(5, rank) for rank in ranks)
    subprocess.run([sys.executable, "-c", "from worker.files import scratch; scratch()"], cwd=ROOT, env=env, check=True)
    assert list(tmp_path.iterdir()) == [], "the next worker deletes what the killed one left"
