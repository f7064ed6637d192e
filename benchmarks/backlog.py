"""Eight jobs in a queue and a bucket that takes a second per upload: how long the GPU would work, and how long it takes.

    python -m benchmarks.backlog

The real worker takes the jobs from an emulated queue and stores the results in a real S3 server behind a gateway that holds
each PUT for a second. The pure model time is that of the same eight videos made by the pipeline alone. Plain use makes,
exports and uploads one after another. All on tiny checkpoints, with one thread for torch in each process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.baseline import export, load_plain
from builder import tiny_checkpoints
from pipelines import Sampling, load_pipeline
from tests import s3_server
from tests.cloud import Cloud
from tests.faults import Slow
from tests.s3_server import Gateway
from tests.worker_process import Endpoint, environment
from worker.settings import Settings
from worker.storage.base import Limit
from worker.storage.choice import storage_of

JOBS = 8
UPLOAD_SECONDS = 1
WIDTH, HEIGHT, NUM_FRAMES, STEPS = 320, 192, 17, 6


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.backlog", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the worker's process
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, s3_server.serve() as server:
        folder = Path(name)
        tiny_checkpoints.write_checkpoints(folder)
        tiny_checkpoints.write_loras(folder / "loras")
        gateway = Gateway(server)
        gateway.faults.order("PUT", Slow(UPLOAD_SECONDS), times=10_000)
        seconds = {
            "model_s": model_alone(folder),
            "worker_s": worker(folder, gateway),
            "plain_s": plain(folder, gateway),
        }
        gateway.close()
    rounded = {key: round(value, 1) for key, value in seconds.items()}
    ratios = {
        "worker_to_model": round(seconds["worker_s"] / seconds["model_s"], 2),
        "plain_to_model": round(seconds["plain_s"] / seconds["model_s"], 2),
    }
    size = f"{WIDTH}x{HEIGHT}x{NUM_FRAMES}, {STEPS} steps"
    report.write("backlog", [rounded | ratios], jobs=JOBS, upload_seconds=UPLOAD_SECONDS, size=size)
    return 0


def model_alone(folder: Path) -> float:
    model = load_pipeline("wan21_1b", folder, "cpu")
    model.apply_loras([])
    samplings = [
        Sampling("a boat", "", WIDTH, HEIGHT, NUM_FRAMES, num_inference_steps=STEPS, seed=seed) for seed in range(JOBS + 1)
    ]
    list(model.generate(samplings.pop()))
    return report.seconds(lambda: [list(model.generate(sampling)) for sampling in samplings])


def worker(folder: Path, gateway: Gateway) -> float:
    """From the first job's submission to the last result's arrival, on a worker that has done one job before."""
    cloud = Cloud()
    env = environment(folder, "wan21_1b", **gateway.environment())
    with Endpoint(cloud, env, folder) as endpoint:
        endpoint.wait_until_ready(endpoint.start())
        names = [f"job-{number}" for number in range(JOBS)]
        cloud.submit("warm-up", request(JOBS))
        cloud.wait_for("warm-up")
        started = time.monotonic()
        for seed, name in enumerate(names):
            cloud.submit(name, request(seed))
        for name in names:
            assert "output" in cloud.wait_for(name, seconds=600)
        took = time.monotonic() - started
    cloud.close()
    return took


def request(seed: int) -> dict[str, object]:
    prompt = {"prompt": "a boat", "width": WIDTH, "height": HEIGHT, "num_frames": NUM_FRAMES, "sample_steps": STEPS}
    return {"model": "wan21_1b", "loras": [{"path": "wan21_1b/rank4.safetensors"}], "prompts": [prompt | {"seed": seed}]}


def plain(folder: Path, gateway: Gateway) -> float:
    pipe = load_plain(folder / tiny_checkpoints.T2V_1B, folder / "loras/wan21_1b/rank4.safetensors")
    bucket = {name.lower(): value for name, value in gateway.environment().items()}
    storage = storage_of(Settings(model_id="wan21_1b", **bucket))

    def one(seed: int) -> None:
        call = {"prompt": "a boat", "negative_prompt": "", "width": WIDTH, "height": HEIGHT, "num_frames": NUM_FRAMES}
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(**call, num_inference_steps=STEPS, guidance_scale=4.0, generator=generator).frames[0]
        export(frames, folder / "plain.mp4")
        storage.put(folder / "plain.mp4", f"plain/{seed}.mp4", "video/mp4", "", Limit(threading.Event()))

    one(JOBS)

    def all_of_them() -> None:
        for seed in range(JOBS):
            one(seed)

    return report.seconds(all_of_them)


if __name__ == "__main__":
    sys.exit(main())
