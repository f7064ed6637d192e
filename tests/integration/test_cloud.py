"""The worker in RunPod's job loop, against a local job API and a real S3 server, where everything fails that can fail."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.cloud import Cloud
from tests.faults import CutShort, Dropped, Fault, Garbage, Slow, Status, Unanswered
from tests.integration.test_local_api import request_for
from tests.s3_server import Gateway, S3Server, serve
from tests.worker_process import Endpoint, Worker, environment

SLOW = {"width": 128, "height": 128, "num_frames": 33, "sample_steps": 150}
"""A prompt that denoises for some seconds."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Server]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(bucket: S3Server) -> Iterator[Gateway]:
    gateway = Gateway(bucket)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def recovery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def endpoint(tiny: Path, gateway: Gateway, recovery: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """An endpoint of wan21_1b."""
    cloud = Cloud()
    env = environment(
        tiny,
        "wan21_1b",
        **gateway.environment(),
        BUCKET_KEY_PREFIX="videos/",
        RECOVERY_DIR=recovery,
        ALLOW_PRIVATE_DOWNLOADS="1",  # the bucket of a job is on this machine too
    )
    with Endpoint(cloud, env, tmp_path_factory.mktemp("cloud")) as endpoint:
        yield endpoint
    cloud.close()


@pytest.fixture
def worker(endpoint: Endpoint) -> Worker:
    """The one worker that is alive; a new one where the test before has ended the last."""
    endpoint.cloud.faults.forget()
    worker = endpoint.alive[0] if endpoint.alive else endpoint.start()
    endpoint.wait_until_ready(worker)
    return worker


@pytest.fixture
def cloud(endpoint: Endpoint, worker: Worker) -> Cloud:
    return endpoint.cloud


@pytest.fixture
def good(tiny: Path) -> dict[str, Any]:
    return request_for("wan21_1b", tiny)


def named(what: str, fault: Fault) -> str:
    """A job's id."""
    return re.sub(r"\W+", "-", f"{what} {fault}")


def videos_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    assert "error" not in result, result["error"]
    return result["output"]["outputs"]["videos"]


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its URLs, which are signed anew each time."""
    videos = [{**video, **{kind: unsigned(video[kind]) for kind in ("poster", "contact_sheet")}} for video in videos_of(result)]
    return {**result["output"], "outputs": [unsigned(video) for video in videos]}


def unsigned(item: dict[str, Any] | None) -> dict[str, Any] | None:
    return item and {**item, "url": None, "expires_at": None}


def bodies_of(result: dict[str, Any]) -> list[bytes]:
    """The files and their posters, as a client fetches them."""
    items = [item for video in videos_of(result) for item in (video, video["poster"])]
    answers = [requests.get(item["url"], timeout=30) for item in items]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    return [answer.content for answer in answers]


def renders_of(worker: Worker, job_id: str) -> int:
    """How many videos the worker has made for the job, from its log."""
    lines = [json.loads(line) for line in worker.log.read_text().splitlines() if line.startswith("{")]
    return sum(line.get("job") == job_id and line["message"] == "generate done" for line in lines)


def test_a_job_from_the_queue_becomes_a_url_that_plays(cloud: Cloud, good: dict[str, Any], worker: Worker) -> None:
    cloud.submit("first", good | {"output_format": "mp4"})
    (video,) = videos_of(cloud.wait_for("first"))
    assert video["key"] == "videos/first/0.mp4"
    answer = requests.get(video["url"], timeout=30)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "video/mp4")
    assert len(answer.content) == int(answer.headers["Content-Length"]) == video["bytes"]
    assert answer.content[4:8] == b"ftyp"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", video["expires_at"])
    assert "X-Amz" not in worker.log.read_text()
    assert "test-secret-key" not in worker.log.read_text()


def test_a_video_has_a_poster_and_a_contact_sheet_with_urls_of_their_own(cloud: Cloud, good: dict[str, Any]) -> None:
    cloud.submit("pictured", good | {"contact_sheet": True})
    (video,) = videos_of(cloud.wait_for("pictured"))
    for kind, name, size in (("poster", "0.poster.jpg", (64, 64)), ("contact_sheet", "0.sheet.jpg", (132, 132))):
        picture = video[kind]
        assert picture["key"] == f"videos/pictured/{name}"
        answer = requests.get(picture["url"], timeout=30)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/jpeg")
        assert len(answer.content) == picture["bytes"]
        assert Image.open(io.BytesIO(answer.content)).size == (picture["width"], picture["height"]) == size
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", picture["expires_at"])


def test_progress_comes_in_order_and_ends_before_the_result(cloud: Cloud, tiny: Path) -> None:
    cloud.submit("slow", request_for("wan21_1b", tiny, **SLOW))
    cloud.wait_for("slow")
    updates = cloud.progress_of("slow")
    assert "denoise" in {update["stage"] for update in updates}
    assert [update["percent"] for update in updates] == sorted(update["percent"] for update in updates)
    assert all(update["steps"] == SLOW["sample_steps"] and update["prompts"] == 1 for update in updates)
    assert [post for post in cloud.posts if post.job_id == "slow"][-1].is_result


def test_a_bad_job_is_an_error_and_the_loop_goes_on(cloud: Cloud, good: dict[str, Any]) -> None:
    cloud.submit("bad", {"model": "wan21_1b"})
    assert cloud.wait_for("bad")["error"].startswith("INVALID_INPUT: ")
    cloud.submit("good", good)
    assert "output" in cloud.wait_for("good")


def test_a_job_can_bring_its_own_bucket(cloud: Cloud, good: dict[str, Any], bucket: S3Server) -> None:
    own = "own-bucket"
    bucket.client().create_bucket(Bucket=own)
    config = {"accessId": bucket.access_key_id, "accessSecret": bucket.secret_access_key, "bucketName": own}
    cloud.submit("own", good, s3Config={**config, "endpointUrl": bucket.endpoint_url})
    (video,) = videos_of(cloud.wait_for("own"))
    assert bucket.client().head_object(Bucket=own, Key=video["key"])["ContentLength"] == video["bytes"]


def test_a_job_with_half_a_bucket_is_told_which_half_is_missing(cloud: Cloud, good: dict[str, Any]) -> None:
    cloud.submit("half", good, s3Config={"accessId": "a", "accessSecret": "s3cret", "bucketName": "abc"})
    error = cloud.wait_for("half")["error"]
    assert error.startswith("INVALID_INPUT: `s3Config.endpointUrl`")
    assert "s3cret" not in error


def test_pings_name_the_job_in_progress(cloud: Cloud, tiny: Path, worker: Worker) -> None:
    cloud.submit("pinged", request_for("wan21_1b", tiny, **SLOW))
    cloud.wait(lambda: any(ping.job_ids == ["pinged"] and ping.worker == worker.name for ping in cloud.pings), "ping")
    cloud.wait_for("pinged")
    done = time.monotonic()
    cloud.wait(lambda: any(ping.job_ids == [] and ping.at > done for ping in cloud.pings), "ping of an idle worker")


# Stops.


def test_a_stopped_job_leaves_the_gpu_at_once_and_the_next_one_is_right(cloud: Cloud, tiny: Path, good: dict[str, Any]) -> None:
    cloud.submit("before", good)
    cloud.submit("endless", request_for("wan21_1b", tiny, width=256, height=256, num_frames=81, sample_steps=150))
    cloud.wait_for("endless", stage="denoise")
    cloud.stop("endless")
    cloud.submit("after", good)
    assert bodies_of(cloud.wait_for("after")) == bodies_of(cloud.wait_for("before"))
    assert max(update["percent"] for update in cloud.progress_of("endless")) < 100
    assert not cloud.tries_of("endless")
    (stop,) = (stop for stop in cloud.stops if stop.job_id == "endless")
    (taken,) = (delivery for delivery in cloud.deliveries if delivery.job_id == "after")
    assert taken.at - stop.at < 5


def test_a_stop_that_comes_right_behind_its_job_is_heeded(cloud: Cloud, tiny: Path, good: dict[str, Any]) -> None:
    cloud.submit("regretted", request_for("wan21_1b", tiny, **SLOW))
    cloud.wait(lambda: [delivery for delivery in cloud.deliveries if delivery.job_id == "regretted"], "delivery")
    cloud.stop("regretted")
    cloud.submit("behind", good)
    cloud.wait_for("behind")
    assert not cloud.tries_of("regretted")


# A queue that fails.


@pytest.mark.parametrize(
    "fault",
    [Status(400), Status(429), Status(500), Status(502), Garbage(), Dropped(), Unanswered(), CutShort(), Slow(1)],
    ids=str,
)
def test_after_any_failure_to_take_a_job_the_worker_takes_the_next(cloud: Cloud, good: dict[str, Any], fault: Fault) -> None:
    before, job_id = cloud.faults.met.total(), named("taken after", fault)
    cloud.fail("take", fault)
    cloud.submit(job_id, good)
    cloud.wait_for(job_id)
    cloud.wait(lambda: cloud.faults.met.total() > before, "fault")


@pytest.mark.parametrize("fault", [Status(500), Status(400), Status(302), Garbage()], ids=str)
def test_a_queue_that_is_down_is_not_asked_hundreds_of_times_a_second(cloud: Cloud, good: dict[str, Any], fault: Fault) -> None:
    kind = f"take {type(fault).__name__}"
    cloud.submit(named("while it was up", fault), good)
    before = cloud.faults.met[kind]
    cloud.fail("take", fault, times=10_000)
    cloud.wait_for(named("while it was up", fault))
    cloud.wait(lambda: cloud.faults.met[kind] > before, "fault")
    time.sleep(2)
    assert cloud.faults.met[kind] - before < 40
    cloud.faults.forget()
    cloud.submit(named("it is up again", fault), good)
    cloud.wait_for(named("it is up again", fault))


@pytest.mark.parametrize("fault", [Status(500), Garbage(), Dropped(), CutShort()], ids=str)
def test_a_stop_arrives_though_its_channel_fails(cloud: Cloud, tiny: Path, fault: Fault) -> None:
    job_id = named("stopped in spite of", fault)
    cloud.submit(job_id, request_for("wan21_1b", tiny, width=256, height=256, num_frames=81, sample_steps=150))
    cloud.wait_for(job_id, stage="denoise")
    cloud.fail("stop", fault)
    cloud.stop(job_id)
    cloud.submit(f"{job_id}-next", request_for("wan21_1b", tiny))
    cloud.wait_for(f"{job_id}-next")
    assert not cloud.tries_of(job_id)


def test_a_result_is_posted_until_it_is_taken(cloud: Cloud, good: dict[str, Any]) -> None:
    """The SDK alone would drop it after three times."""
    for code in (500, 502, 503, 429):
        cloud.fail("result", Status(code))
    cloud.submit("refused", good)
    result = cloud.wait_for("refused")
    tries = cloud.wait_for_tries("refused", 5)
    assert [post.counts for post in tries] == [False, False, False, False, True]
    assert all(post.body == result for post in tries)


@pytest.mark.parametrize("fault", [Dropped(), Unanswered()], ids=str)
def test_a_result_whose_connection_breaks_is_posted_again_the_same(cloud: Cloud, good: dict[str, Any], fault: Fault) -> None:
    job_id = named("posted", fault)
    cloud.fail("result", fault)
    cloud.submit(job_id, good)
    first, second = cloud.wait_for_tries(job_id, 2)
    assert first.body == second.body
    assert second.counts


def test_a_result_that_nobody_wants_does_not_hold_up_the_next_job(cloud: Cloud, good: dict[str, Any]) -> None:
    cloud.fail("result", Status(404), times=4)
    cloud.submit("unwanted", good)
    cloud.submit("wanted", good)
    cloud.wait_for("wanted", seconds=30)
    cloud.stop("unwanted")


@pytest.mark.parametrize("fault", [Status(500), Status(404), Dropped(), Unanswered(), Slow(2)], ids=str)
def test_a_job_does_not_fail_with_its_progress(cloud: Cloud, good: dict[str, Any], fault: Fault) -> None:
    job_id = named("progress", fault)
    cloud.fail("progress", fault)
    cloud.submit(job_id, good)
    cloud.wait_for(job_id)
    assert [post for post in cloud.posts if post.job_id == job_id][-1].is_result


def pings_failed(cloud: Cloud) -> int:
    return sum(number for name, number in cloud.faults.met.items() if name.startswith("ping "))


def test_a_worker_whose_pings_fail_works_on(cloud: Cloud, good: dict[str, Any]) -> None:
    met = pings_failed(cloud)
    for fault in (Status(500), Dropped(), Slow(2)):
        cloud.fail("ping", fault)
    cloud.submit("unpinged", good)
    cloud.wait_for("unpinged")
    cloud.wait(lambda: pings_failed(cloud) == met + 3, "faults")
    now = time.monotonic()
    cloud.wait(lambda: any(ping.at > now for ping in cloud.pings), "ping")


# Jobs that come twice.


def test_a_job_that_comes_again_is_answered_from_what_exists(cloud: Cloud, tiny: Path, worker: Worker) -> None:
    cloud.submit("twice", request_for("wan21_1b", tiny, seed=-1))
    first = cloud.wait_for("twice")
    cloud.deliver_again("twice")
    second = cloud.wait_for("twice", nth=2)
    assert lasting(second) == lasting(first)
    assert bodies_of(second) == bodies_of(first)
    assert renders_of(worker, "twice") == 1


def test_a_job_that_comes_again_while_it_runs_is_made_once(cloud: Cloud, tiny: Path, worker: Worker) -> None:
    cloud.submit("echoed", request_for("wan21_1b", tiny, **SLOW))
    cloud.wait_for("echoed", stage="denoise")
    cloud.deliver_again("echoed")
    first, second = cloud.wait_for("echoed"), cloud.wait_for("echoed", nth=2)
    assert lasting(first) == lasting(second)
    assert renders_of(worker, "echoed") == 1


def test_a_job_that_came_twice_is_stopped_once_and_for_all(
    cloud: Cloud, tiny: Path, good: dict[str, Any], worker: Worker
) -> None:
    cloud.submit("echo", request_for("wan21_1b", tiny, width=256, height=256, num_frames=81, sample_steps=150))
    cloud.wait_for("echo", stage="denoise")
    cloud.deliver_again("echo")
    time.sleep(2)  # the worker may take it already
    cloud.stop("echo")
    cloud.submit("silence", good)
    cloud.wait_for("silence", seconds=20)
    assert not cloud.tries_of("echo")


def test_what_a_killed_worker_had_finished_is_not_made_again(
    endpoint: Endpoint, worker: Worker, cloud: Cloud, tiny: Path, bucket: S3Server
) -> None:
    request = request_for("wan21_1b", tiny)
    request["prompts"].append(request["prompts"][0] | {**SLOW})
    cloud.submit("killed", request)
    cloud.wait(lambda: any(update["percent"] > 20 for update in cloud.progress_of("killed")), "second prompt")
    assert endpoint.kill(worker) == ["killed"]
    made_at = bucket.client().head_object(Bucket=bucket.bucket, Key="videos/killed/0.zip")["LastModified"]

    endpoint.start()
    result = cloud.wait_for("killed")
    assert bucket.client().head_object(Bucket=bucket.bucket, Key="videos/killed/0.zip")["LastModified"] == made_at
    cloud.submit("undisturbed", request)
    assert bodies_of(result) == bodies_of(cloud.wait_for("undisturbed"))


def test_a_worker_killed_before_its_result_arrived_leaves_nothing_to_make(
    endpoint: Endpoint, worker: Worker, cloud: Cloud, tiny: Path
) -> None:
    cloud.fail("result", Status(503), times=100)
    cloud.submit("unheard", request_for("wan21_1b", tiny, seed=-1))
    unheard = cloud.wait_for_tries("unheard", 1)[0].body
    assert endpoint.kill(worker) == ["unheard"]
    cloud.faults.forget()
    heir = endpoint.start()
    assert lasting(cloud.wait_for("unheard")) == lasting(unheard)
    assert renders_of(heir, "unheard") == 0


# Leaving.


def test_a_worker_that_is_told_to_leave_finishes_its_job_and_delivers_it(
    endpoint: Endpoint, worker: Worker, cloud: Cloud, tiny: Path
) -> None:
    cloud.submit("last", request_for("wan21_1b", tiny, **SLOW))
    cloud.wait_for("last", stage="denoise")
    cloud.fail("result", Status(503), times=2)
    assert endpoint.leave(worker) == 0
    assert videos_of(cloud.wait_for("last", seconds=1))
    assert endpoint.cloud.redeliver(worker.name) == []


def test_an_idle_worker_leaves_at_once_and_leaves_nothing_behind(endpoint: Endpoint, worker: Worker) -> None:
    started = time.monotonic()
    assert endpoint.leave(worker) == 0
    assert time.monotonic() - started < 5
    assert [path.name for path in worker.temp.iterdir() if path.name != "torchinductor_root"] == []


# A bucket that fails.


@pytest.mark.parametrize("fault", [Status(500), Status(503), Dropped(), Unanswered(), Slow(1)], ids=str)
def test_an_upload_that_fails_is_tried_again(cloud: Cloud, gateway: Gateway, good: dict[str, Any], fault: Fault) -> None:
    job_id, before = named("uploaded", fault), gateway.faults.met.total()
    gateway.faults.order("PUT", fault)
    cloud.submit(job_id, good)
    assert len(bodies_of(cloud.wait_for(job_id))) == 2
    assert gateway.faults.met.total() == before + 1


def test_a_poster_whose_upload_fails_is_tried_again(cloud: Cloud, gateway: Gateway, good: dict[str, Any]) -> None:
    gateway.faults.order("PUT .jpg", Status(503), times=3)  # as often as boto3 tries
    cloud.submit("late-poster", good)
    video, poster = bodies_of(cloud.wait_for("late-poster"))
    assert (video[:2], poster[:2]) == (b"PK", b"\xff\xd8")


@pytest.mark.parametrize("fault", [Status(503), Dropped(), CutShort()], ids=str)
def test_a_job_that_comes_again_is_right_though_the_bucket_cannot_be_asked(
    cloud: Cloud, gateway: Gateway, good: dict[str, Any], fault: Fault
) -> None:
    job_id = named("asked in vain", fault)
    cloud.submit(job_id, good)
    first = cloud.wait_for(job_id)
    for method in ("GET", "HEAD"):
        gateway.faults.order(method, fault, times=2)  # as often as it asks
    cloud.deliver_again(job_id)
    second = cloud.wait_for(job_id, nth=2)
    gateway.faults.forget()
    assert bodies_of(second) == bodies_of(first)


def test_a_bucket_that_comes_back_gets_the_file(cloud: Cloud, good: dict[str, Any], bucket: S3Server) -> None:
    with bucket.away():
        cloud.submit("patient", good)
        cloud.wait_for("patient", stage="upload")
        time.sleep(2)
        assert cloud.results_of("patient") == []
    assert len(bodies_of(cloud.wait_for("patient"))) == 2


def test_a_file_that_no_bucket_takes_is_brought_there_by_the_next_worker(
    endpoint: Endpoint, good: dict[str, Any], bucket: S3Server, gateway: Gateway, recovery: Path
) -> None:
    for worker in endpoint.alive:
        endpoint.leave(worker)
    cloud, impatient = endpoint.cloud, endpoint.start(UPLOAD_TIMEOUT="3")
    endpoint.wait_until_ready(impatient)
    gateway.faults.order("PUT .jpg", Status(503), times=1000)
    cloud.submit("no-poster", good)
    result = cloud.wait_for("no-poster")
    gateway.faults.forget()
    (video,) = videos_of(result)
    assert video["poster"] is None and requests.get(video["url"], timeout=30).content[:2] == b"PK"
    (warning,) = [text for text in result["output"]["warnings"] if "poster" in text]
    assert "no poster: the bucket did not accept `videos/no-poster/0.poster.jpg` (SlowDown)" in warning

    with bucket.away():
        cloud.submit("kept", good)
        error = cloud.wait_for("kept")["error"]
        assert error.startswith("UPLOAD_FAILED: ")
        assert "`videos/kept/0.zip`" in error
        assert list(recovery.iterdir())
        assert endpoint.leave(impatient) == 0
    assert bucket.keys("videos/kept/") == []

    heir = endpoint.start()
    cloud.wait(lambda: "videos/kept/0.zip" in bucket.keys("videos/kept/"), "object")
    cloud.wait(lambda: not list(recovery.iterdir()), "empty folder")
    cloud.deliver_again("kept")
    result = cloud.wait_for("kept", nth=2)
    keys = [(video["key"], video["poster"]["key"]) for video in videos_of(result)]
    assert "videos/no-poster/0.poster.jpg" in bucket.keys("videos/no-poster/")
    assert keys == [("videos/kept/0.zip", "videos/kept/0.poster.jpg")]
    assert renders_of(heir, "kept") == 0
    cloud.submit("never-kept", good)
    assert bodies_of(result) == bodies_of(cloud.wait_for("never-kept"))
