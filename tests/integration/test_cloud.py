"""The worker in RunPod's job loop, against a local job API and a real S3 server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.integration.test_local_api import request_for
from tests.s3_server import S3Server, serve
from tests.worker_process import Cloud, environment, process


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Server]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cloud") / "worker.log"


@pytest.fixture(scope="module")
def cloud(tiny: Path, bucket: S3Server, log: Path) -> Iterator[Cloud]:
    """A worker of wan21_1b that takes its jobs from here."""
    cloud = Cloud()
    env = environment(tiny, "wan21_1b", **bucket.environment(), **cloud.environment(), BUCKET_KEY_PREFIX="videos/")
    with process(env, log):
        yield cloud
    cloud.close()


def test_a_job_from_the_queue_becomes_a_url_that_plays(cloud: Cloud, tiny: Path, log: Path) -> None:
    cloud.submit("first", request_for("wan21_1b", tiny) | {"output_format": "mp4"})
    (video,) = cloud.wait_for("first")["output"]["outputs"]["videos"]
    assert video["key"] == "videos/first/0.mp4"
    answer = requests.get(video["url"], timeout=30)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "video/mp4")
    assert len(answer.content) == int(answer.headers["Content-Length"]) == video["bytes"]
    assert answer.content[4:8] == b"ftyp"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", video["expires_at"])
    assert "X-Amz" not in log.read_text()
    assert "test-secret-key" not in log.read_text()


def test_progress_comes_in_order_and_ends_before_the_result(cloud: Cloud, tiny: Path) -> None:
    cloud.submit("slow", request_for("wan21_1b", tiny, width=256, height=256, num_frames=33, sample_steps=12))
    cloud.wait_for("slow")
    updates = cloud.progress_of("slow")
    assert "denoise" in {update["stage"] for update in updates}
    assert [update["percent"] for update in updates] == sorted(update["percent"] for update in updates)
    assert all(update["steps"] == 12 and update["prompts"] == 1 for update in updates)
    assert [body for job, body in cloud.posts if job == "slow"][-1].get("status") != "IN_PROGRESS"


def test_a_stopped_job_posts_no_result_and_the_next_one_is_right(cloud: Cloud, tiny: Path) -> None:
    cloud.submit("endless", request_for("wan21_1b", tiny, width=256, height=256, num_frames=81, sample_steps=150))
    cloud.wait_for("endless", stage="denoise")
    cloud.stop("endless")
    cloud.submit("after", request_for("wan21_1b", tiny))
    assert "output" in cloud.wait_for("after")
    assert all(body.get("status") == "IN_PROGRESS" for job, body in cloud.posts if job == "endless")
    assert max(update["percent"] for update in cloud.progress_of("endless")) < 100


def test_a_bad_job_is_an_error_and_the_loop_goes_on(cloud: Cloud, tiny: Path) -> None:
    cloud.submit("bad", {"model": "wan21_1b"})
    assert cloud.wait_for("bad")["error"].startswith("INVALID_INPUT: ")
    cloud.submit("good", request_for("wan21_1b", tiny))
    assert "output" in cloud.wait_for("good")


def test_a_job_can_bring_its_own_bucket(cloud: Cloud, tiny: Path, bucket: S3Server) -> None:
    own = "own-bucket"
    bucket.client().create_bucket(Bucket=own)
    config = {"accessId": bucket.access_key_id, "accessSecret": bucket.secret_access_key, "bucketName": own}
    cloud.submit("own", request_for("wan21_1b", tiny), s3Config={**config, "endpointUrl": bucket.endpoint_url})
    (video,) = cloud.wait_for("own")["output"]["outputs"]["videos"]
    assert bucket.client().head_object(Bucket=own, Key=video["key"])["ContentLength"] == video["bytes"]


def test_a_job_with_half_a_bucket_is_told_which_half_is_missing(cloud: Cloud, tiny: Path) -> None:
    cloud.submit(
        "half", request_for("wan21_1b", tiny), s3Config={"accessId": "a", "accessSecret": "s3cret", "bucketName": "abc"}
    )
    error = cloud.wait_for("half")["error"]
    assert error.startswith("INVALID_INPUT: `s3Config.endpointUrl`")
    assert "s3cret" not in error
