"""The playground's server: which requests it accepts, which files it serves, and that it never shows the key."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from client import Client, Unreachable
from playground.__main__ import main
from playground.jobs import Job, Jobs, NoFile
from playground.server import STATIC
from playground.store import Store
from tests.playground.conftest import FakeCloud, Page, serving
from tests.worker_process import ROOT, free_port
from tools.frames import read_clip
from worker.errors import Code, Problem, WorkerError
from worker.video import VIDEO, encode

VIDEO_IN_BUCKET = b"video"
KEY = "rpa_ABCDEFGHIJKLMNOP0123456789"
REQUEST = {"model": "wan21_1b", "loras": [{"path": "a.safetensors"}], "prompts": [{"prompt": "x"}], "hf_token": "hf_secret"}
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 3, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
"""Flat squares, which H.264 keeps."""


@pytest.fixture
def local(cloud: FakeCloud, tmp_path: Path) -> Iterator[Page]:
    """A playground for a worker on this computer."""
    with serving(Client.local(cloud.base, patience=0), tmp_path / "files") as page:
        yield page


@pytest.fixture
def remote(cloud: FakeCloud, tmp_path: Path) -> Iterator[Page]:
    """A playground for an endpoint, which needs the key."""
    with serving(Client.endpoint("ep", KEY, base_url=f"{cloud.base}/v2", patience=0), tmp_path / "files") as page:
        yield page


def completed(*urls: str, **more: Any) -> dict[str, Any]:
    item = {"format": "mp4", "num_frames": 5, "fps": 16, "seed": 1, **more}
    videos = [{"prompt_index": index, **file_at(url), "key": f"job-1/{index}", **item} for index, url in enumerate(urls)]
    settings = {"match": "documented", "prompts": [{"prompt_index": index, "prompt": "x"} for index in range(len(urls))]}
    output = {"model": "wan21_1b", "outputs": {"images": [], "videos": videos}, "settings": settings}
    return {"status": "COMPLETED", "output": output}


def file_at(url: str) -> dict[str, Any]:
    """A file of a result; its size is that of a local file, or of `VIDEO_IN_BUCKET`."""
    local = Path(urlsplit(url).path)
    size = local.stat().st_size if url.startswith("file:") and local.is_file() else len(VIDEO_IN_BUCKET)
    return {"url": url, "expires_at": None, "key": "job-1/0", "width": 64, "height": 48, "bytes": size}


def finished(page: Page, cloud: FakeCloud, answer: dict[str, Any]) -> dict[str, Any]:
    """A job that has come to `answer`."""
    number = page.post("/api/jobs", REQUEST).json()["number"]
    cloud.answer = answer
    return page.get(f"/api/jobs/{number}").json()


def written(target: Path, output_format: str = "mp4", frames: np.ndarray = FRAMES) -> Path:
    encode([frames], target, VIDEO[output_format], 16, len(frames))
    return target


# Accepted requests


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example"])
def test_a_host_name_of_another_computer_is_refused(local: Page, host: str) -> None:
    assert local.get("/", Host=host).status_code == 403
    assert local.post("/api/jobs", REQUEST, Host=host, Origin=f"http://{host}").status_code == 403


def test_another_page_in_the_same_browser_can_neither_read_nor_start_jobs(local: Page, cloud: FakeCloud) -> None:
    assert local.post("/api/jobs", REQUEST, Origin="http://evil.example").status_code == 403
    assert local.post("/api/jobs", REQUEST, Origin="null").status_code == 403
    assert local.get("/api/jobs", Origin="http://evil.example").status_code == 403
    assert local.get("/api/config", **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert local.get("/files/1/0", **{"Sec-Fetch-Site": "same-site"}).status_code == 403
    assert local.get("/", **{"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link to it may be followed"
    assert not cloud.asked


def test_a_form_of_another_page_cannot_start_a_job(local: Page, cloud: FakeCloud) -> None:
    body = json.dumps(REQUEST).encode()
    assert local.post("/api/jobs", data=body, **{"Content-Type": "text/plain"}).status_code == 415
    assert not cloud.asked


def test_a_post_without_an_origin_is_refused(local: Page) -> None:
    with socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2]))) as line:
        host = local.url.removeprefix("http://")
        line.sendall(f"POST /api/jobs/1/cancel HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
        assert b" 403 " in line.recv(1000)


def test_a_browser_that_is_closed_leaves_no_traceback(local: Page, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        line = socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2])))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        line.close()
        assert local.get("/api/config").ok
    assert capsys.readouterr().err == ""


def test_it_listens_on_loopback_only(local: Page) -> None:
    others = [address for *_, (address, *_) in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for address in {address for address in others if not address.startswith("127.")}:
        with pytest.raises(OSError), socket.create_connection((address, int(local.url.rpartition(":")[2])), 2):
            pass


def test_every_answer_forbids_foreign_scripts_and_frames(local: Page) -> None:
    for path in ("/", "/static/app.js", "/api/config", "/nothing"):
        headers = local.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_makes_no_markup_from_data_and_loads_nothing_from_other_hosts() -> None:
    for path in STATIC.iterdir():
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), path
        addresses = set(re.findall(r"https?://[\w.]*", text))
        assert addresses <= {"http://www.w3.org", "https://", "https://example.com"}, path


def test_the_schema_has_the_parts_that_the_page_reads(local: Page) -> None:
    parts = {name for path in STATIC.glob("*.js") for name in re.findall(r"\$defs\.(\w+)", path.read_text())}
    assert "Prompt" in parts and parts <= set(local.get("/api/config").json()["schema"]["$defs"])


# The key


def test_the_key_is_sent_to_the_endpoint_and_is_in_no_answer(remote: Page, cloud: FakeCloud) -> None:
    cloud.files["/bucket/0.mp4"] = VIDEO_IN_BUCKET
    cloud.answer = {"status": "FAILED", "error": f"INTERNAL: who sends Bearer {KEY}?"}
    answers = [remote.post("/api/jobs", REQUEST), remote.get("/api/jobs/1"), remote.post("/api/jobs/1/cancel")]
    cloud.answer = {"status": "IN_QUEUE"}
    finished(remote, cloud, completed(f"{cloud.base}/bucket/0.mp4?signed=1"))
    cloud.files["/bucket/0.mp4?signed=1"] = VIDEO_IN_BUCKET
    answers += [remote.get(path) for path in ("/", "/api/config", "/api/jobs", "/api/jobs/2", "/files/2/0", "/api/jobs/9")]
    cloud.status = 401
    answers += [remote.post("/api/jobs", REQUEST), remote.post("/api/check", REQUEST)]
    for answer in answers:
        assert KEY not in answer.text + str(answer.headers)
    signed = {path for _, path, headers in cloud.asked if KEY in headers.get("Authorization", "")}
    assert signed == {"/v2/ep/run", "/v2/ep/status/job-1"}
    assert any(path.startswith("/bucket") for _, path, _ in cloud.asked), "the bucket was asked, without the key"


def test_a_token_of_the_request_is_sent_and_not_kept(local: Page) -> None:
    local.post("/api/jobs", REQUEST)
    assert "hf_secret" not in local.get("/api/jobs").text


# The files


def test_a_file_that_a_job_named_is_served_whole_and_in_ranges(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    video = written(tmp_path / "0.mp4")
    job = finished(local, cloud, completed(video.as_uri()))
    path = job["result"]["outputs"]["videos"][0]["file"]
    whole = local.get(path)
    assert (whole.content, whole.headers["Content-Type"]) == (video.read_bytes(), "video/mp4")
    part = local.get(path, Range="bytes=10-19")
    assert (part.status_code, part.content) == (206, video.read_bytes()[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(whole.content)}"


@pytest.mark.parametrize("kind", ["poster", "contact_sheet"])
def test_the_pictures_of_a_result_are_served_too(local: Page, cloud: FakeCloud, tmp_path: Path, kind: str) -> None:
    (tmp_path / "0.jpg").write_bytes(b"jpeg")
    picture = file_at((tmp_path / "0.jpg").as_uri())
    job = finished(local, cloud, completed(written(tmp_path / "0.mp4").as_uri(), **{kind: picture}))
    answer = local.get(job["result"]["outputs"]["videos"][0][kind]["file"])
    assert (answer.content, answer.headers["Content-Type"]) == (b"jpeg", "image/jpeg")


@pytest.mark.parametrize(
    "path",
    [
        "/files/1/1",
        "/files/2/0",
        "/files/1/-1",
        "/files/1/0/../../etc/passwd",
        "/files//etc/passwd",
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/server.py",
        "/compare/../0.mp4",
        "/compare/sample-0000000000000000.mp4",
        "//etc/passwd",
    ],
)
def test_no_other_path_serves_a_file(local: Page, cloud: FakeCloud, tmp_path: Path, path: str) -> None:
    finished(local, cloud, completed(written(tmp_path / "0.mp4").as_uri()))
    with socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2]))) as line:  # a library would tidy the path
        host = local.url.removeprefix("http://")
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in line.makefile("rb").readline()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "file:///proc/self/environ", "ftp://example.com/0.mp4", "/etc/0.mp4"])
def test_only_output_files_of_a_result_are_served(local: Page, cloud: FakeCloud, url: str) -> None:
    finished(local, cloud, completed(url))
    assert local.get("/files/1/0").status_code == 404


def test_an_endpoint_cannot_name_a_file_of_this_computer(remote: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    finished(remote, cloud, completed(written(tmp_path / "0.mp4").as_uri()))
    answer = remote.get("/files/1/0")
    assert (answer.status_code, "the worker's own disk" in answer.json()["error"]) == (404, True)


def test_a_worker_on_another_host_cannot_name_a_file_of_this_computer(tmp_path: Path) -> None:
    jobs = Jobs(Client.local("http://worker.example:8000", patience=0), tmp_path)
    jobs._jobs[1] = job = Job(1, "job-1", REQUEST)
    job.update({"id": "job-1"} | completed(written(tmp_path / "0.mp4").as_uri()))
    with pytest.raises(NoFile, match="the worker's own disk"):
        jobs.file(1, 0)


def test_a_request_cannot_name_a_file_of_this_computer(remote: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(bytes(10_000))
    prompt = {"prompt": "x", "ctrl_img": str(tmp_path / "private.png")}
    assert remote.post("/api/jobs", REQUEST | {"model": "wan21_i2v_14b", "prompts": [prompt]}).ok
    (_, _, headers) = cloud.asked[0]
    assert int(headers["Content-Length"]) < 1000


def test_a_zip_of_frames_plays_as_a_video(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    job = finished(local, cloud, completed(written(tmp_path / "0.zip", "png").as_uri(), format="png"))
    (tmp_path / "played.mp4").write_bytes(local.get(job["result"]["outputs"]["videos"][0]["play"]).content)
    assert read_clip(tmp_path / "played.mp4").frames.shape == FRAMES.shape


# The API's answers


def test_a_job_goes_from_the_queue_over_its_steps_to_its_problems(local: Page, cloud: FakeCloud) -> None:
    assert local.post("/api/jobs", REQUEST).json()["status"] == "queued"
    update = {"stage": "denoise", "step": 7, "steps": 25, "percent": 28, "seconds_left": 84.2, "prompts": 1, "prompt_index": 0}
    cloud.answer = {"status": "IN_PROGRESS", "output": update}
    assert local.get("/api/jobs/1").json()["progress"] == update
    cloud.answer = {"status": "FAILED", "error": "LORA_NOT_FOUND: `loras[0].path`: no such file"}
    job = local.get("/api/jobs/1").json()
    assert job["status"] == "failed"
    assert job["code"] == "LORA_NOT_FOUND"
    assert job["problems"] == [{"code": "LORA_NOT_FOUND", "field": "loras[0].path", "text": "no such file"}]
    cloud.asked.clear()
    assert local.get("/api/jobs/1").json() == job
    assert not cloud.asked, "what has ended is not asked for again"


def test_a_job_that_the_worker_reports_as_cancelled_is_cancelled(local: Page, cloud: FakeCloud) -> None:
    job = finished(local, cloud, {"status": "FAILED", "error": "CANCELLED: the job was stopped"})
    assert (job["status"], job["code"]) == ("cancelled", "CANCELLED")


def test_a_worker_of_another_model_is_named(local: Page, cloud: FakeCloud) -> None:
    error = WorkerError.of([Problem(Code.MODEL_NOT_SERVED, "model", "this worker serves wan21_14b, not wan21_1b")])
    job = finished(local, cloud, {"status": "FAILED", "error": str(error)})
    assert (job["code"], job["served_model"]) == ("MODEL_NOT_SERVED", "wan21_14b")


def test_the_result_of_another_worker_is_a_failure(local: Page, cloud: FakeCloud) -> None:
    job = finished(local, cloud, {"status": "COMPLETED", "output": {"images": ["aGk="]}})
    assert (job["status"], job["code"], job["problems"]) == ("failed", "JOB_FAILED", [])
    assert "does another worker run at this address?" in job["error"]


@pytest.mark.parametrize(
    ("status", "text", "again"),
    [
        (401, "RUNPOD_API_KEY", False),
        (404, "no such endpoint", False),
        (429, "wait", True),
        (502, "the job may run, or it may not", False),
    ],
)
def test_a_failed_submission_says_what_to_do(remote: Page, cloud: FakeCloud, status: int, text: str, again: bool) -> None:
    cloud.status = status
    answer = remote.post("/api/jobs", REQUEST)
    assert answer.status_code == 502
    assert text in answer.json()["error"]
    assert answer.json()["again"] is again


def test_a_request_that_is_too_large_for_runpod_is_not_sent(remote: Page, local: Page, cloud: FakeCloud) -> None:
    request = REQUEST | {"model": "wan21_i2v_14b", "prompts": [{"prompt": "x", "ctrl_img": "A" * 10_000_000}]}
    (problem, at_image) = remote.post("/api/check", request).json()["problems"]
    assert "10.0 MB, and RunPod accepts 10 MB" in problem["text"] and at_image["field"] == "prompts[0].ctrl_img"
    answer = remote.post("/api/jobs", request)
    assert (answer.status_code, problem["text"] in answer.json()["error"], cloud.asked) == (400, True, [])
    assert local.post("/api/jobs", request).ok, "a worker on this machine takes it"


def test_without_a_worker_it_says_how_to_start_one(tmp_path: Path) -> None:
    with serving(Client.local(f"http://127.0.0.1:{free_port()}", patience=0), tmp_path) as page:
        answer = page.post("/api/jobs", REQUEST).json()
    assert answer["again"] and "no worker answers" in answer["error"] and "make serve" in answer["error"]


def test_an_address_without_a_worker_is_an_error_that_is_not_retried(local: Page, cloud: FakeCloud) -> None:
    cloud.files["/run"] = b"<html>"
    answer = local.post("/api/jobs", REQUEST)
    assert (answer.status_code, answer.json()["again"]) == (502, False)
    assert "not one of RunPod's API" in answer.json()["error"]


def test_a_seed_that_javascript_would_round_is_text(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    job = finished(local, cloud, completed(written(tmp_path / "0.mp4").as_uri(), seed=2**64 - 1))
    assert job["result"]["outputs"]["videos"][0]["seed"] == "18446744073709551615"


# Comparison


def test_a_sample_is_compared_with_a_result(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    finished(local, cloud, completed(written(tmp_path / "0.mp4").as_uri()))
    other = FRAMES.copy()
    other[3] = 255 - other[3]
    sample = written(tmp_path / "preview.webp", "webp", other)
    found = local.post("/api/compare?name=preview.webp&b=1/0", data=sample.read_bytes()).json()
    assert found["titles"] == ["preview.webp", "Run 1, seed 1"]
    assert [frame["frame"] for frame in found["frames"]] == [0, 1, 2, 3, 4]
    assert min(found["frames"], key=lambda frame: frame["psnr"])["frame"] == 3
    (tmp_path / "compared.mp4").write_bytes(local.get(found["url"]).content)
    together = read_clip(tmp_path / "compared.mp4").frames
    assert together.shape == (5, 48, 3 * 64, 3)
    mine, difference = together[3, :, 64:128].astype(float), together[3, :, 128:].astype(float)
    assert np.abs(mine - FRAMES[3]).mean() < 30 < np.abs(mine - other[3]).mean()
    assert difference.mean() > 2 * together[0, :, 128:].mean()


def test_the_error_for_a_bad_sample_has_the_users_file_name(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    finished(local, cloud, completed(written(tmp_path / "0.mp4").as_uri()))
    answer = local.post("/api/compare?name=notes.txt&b=1/0", data=b"no video")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("notes.txt: neither a video nor an image")
    assert str(tmp_path) not in answer.text


def test_two_runs_are_compared_with_the_settings_that_differ(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    for name in ("one", "two"):
        cloud.answer = {"status": "IN_QUEUE"}
        answer = completed(written(tmp_path / f"{name}.mp4").as_uri())
        answer["output"]["settings"]["prompts"][0]["sample_steps"] = len(name) if name == "one" else 9
        finished(local, cloud, answer)
    found = local.post("/api/compare?a=1/0&b=2/0").json()
    assert found["verdict"]["code"] == "identical"
    assert found["frames"][0]["psnr"] is None
    assert found["settings"] == {"sample_steps": {"a": 3, "b": 9}}


# The command


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--endpoint", "ep"], "set RUNPOD_API_KEY"),
        (["--url", "localhost:8000"], "is not an http(s) URL"),
        (["--tiny", "/nowhere"], "has no tiny checkpoints"),
    ],
)
def test_the_command_reports_in_one_line_what_is_missing(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    assert main([*arguments, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_a_failure_that_nobody_foresaw_is_an_answer_and_no_traceback(
    local: Page, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Jobs, "all", lambda _: 1 / 0)
    answer = local.get("/api/jobs")
    assert (answer.status_code, answer.json()["error"]) == (500, "this failed (ZeroDivisionError); the terminal has the line")
    assert "Traceback" not in (err := capfd.readouterr().err) and "GET /api/jobs: ZeroDivisionError" in err


def test_a_request_that_nests_too_deep_is_an_answer(local: Page) -> None:
    assert local.post("/api/check", data=b"[" * 100_000, **{"Content-Type": "application/json"}).status_code in (400, 500)


def test_a_job_whose_worker_was_started_again_has_failed(local: Page, cloud: FakeCloud) -> None:
    local.post("/api/jobs", REQUEST)
    cloud.status = 404
    job = local.get("/api/jobs/1").json()
    assert (job["status"], job["code"]) == ("failed", "NOT_FOUND")
    assert "was started again while this ran" in job["error"]


def test_a_job_without_an_answer_says_so_and_fails_after_a_while(
    local: Page, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.post("/api/jobs", REQUEST)
    cloud.status = 503
    job = local.get("/api/jobs/1").json()
    assert job["status"] == "queued" and "no worker answers" in job["trouble"]
    cloud.status = 200
    assert local.get("/api/jobs/1").json()["trouble"] == ""
    cloud.status = 503
    monkeypatch.setattr("playground.jobs.LOCAL_PATIENCE", -1)
    job = local.get("/api/jobs/1").json()
    assert (job["status"], job["code"], job["trouble"]) == ("failed", "UNREACHABLE", "")


def test_a_job_of_a_key_that_is_no_longer_valid_has_failed_and_may_run_on(remote: Page, cloud: FakeCloud) -> None:
    remote.post("/api/jobs", REQUEST)
    cloud.status = 401
    job = remote.get("/api/jobs/1").json()
    assert (job["status"], job["code"]) == ("failed", "NOT_AUTHORIZED")
    assert "The job may still run" in job["error"]


@pytest.mark.parametrize(
    ("workers", "jobs", "state", "text"),
    [
        ({"idle": 1, "running": 2}, {}, "ready", "at once"),
        ({"running": 1}, {"inQueue": 3}, "busy", "1 running, 3 waiting"),
        ({"initializing": 1}, {"inQueue": 1}, "cold", "is starting"),
        ({}, {}, "cold", "no worker is up"),
        ({"throttled": 2}, {}, "gone", "holds"),
        ({"idle": "many"}, None, "cold", "no worker is up"),
    ],
)
def test_the_state_of_the_worker_is_what_runpod_tells(
    remote: Page, cloud: FakeCloud, workers: dict[str, Any], jobs: Any, state: str, text: str
) -> None:
    cloud.answer = {"workers": workers, "jobs": jobs}
    answer = remote.get("/api/worker").json()
    assert (answer["state"], answer["model"]) == (state, None)
    assert text in answer["text"]


def test_the_model_of_an_endpoint_is_known_from_its_answers(remote: Page, cloud: FakeCloud) -> None:
    finished(remote, cloud, completed("https://example.com/0.mp4"))
    cloud.answer = {"workers": {"idle": 1}}
    assert remote.get("/api/worker").json()["model"] == "wan21_1b"
    cloud.status = 401
    answer = remote.get("/api/worker").json()
    assert (answer["state"], answer["model"]) == ("gone", "wan21_1b") and "RUNPOD_API_KEY" in answer["text"]


def test_a_job_with_a_status_that_runpod_does_not_have_fails_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(1, "job-1", REQUEST)
    job.update({"status": "PAUSED"})
    assert job.status == "running"
    monkeypatch.setattr("playground.jobs._SECONDS_UNKNOWN", -1)
    job.update({"status": "PAUSED"})
    assert (job.status, job.error) == ("failed", "the status 'PAUSED' is not one of RunPod's")


def test_the_log_has_stages_some_steps_lost_answers_and_warnings() -> None:
    job = Job(1, "job-1", REQUEST)
    update = {"prompt_index": 0, "prompts": 1, "steps": 40, "percent": 0, "seconds_left": None}
    job.update({"status": "IN_QUEUE"})
    job.update({"status": "IN_PROGRESS", "output": update | {"stage": "fetch", "step": 0}})
    for step in range(1, 11):
        job.update({"status": "IN_PROGRESS", "output": update | {"stage": "denoise", "step": step}})
    for _ in range(2):
        job.unanswered(Unreachable("no worker answers"), 60)
    answer = completed("file:///0.mp4")
    answer["output"]["warnings"] = ["a size was changed"]
    job.update(answer)
    told = [entry.get("text") or (entry["progress"]["stage"], entry["progress"]["step"]) for entry in job.log]
    waiting = ["waiting for a worker", "a worker has the job", ("fetch", 0)]
    steps = [("denoise", 1), ("denoise", 5), ("denoise", 9)]
    assert told == [*waiting, *steps, "no worker answers", "the worker answers again", "a size was changed", "done"]


# Runs that outlive the process


def test_runs_and_their_files_are_there_after_a_restart(cloud: FakeCloud, tmp_path: Path) -> None:
    video = written(tmp_path / "0.mp4")
    client, runs = Client.local(cloud.base, patience=0), tmp_path / "runs"
    runs.mkdir()
    with serving(client, tmp_path / "one", runs=runs) as page:
        before = finished(page, cloud, completed(video.as_uri()))
        assert page.get("/files/1/0").content == video.read_bytes()
        cloud.answer = {"status": "IN_PROGRESS"}
        page.post("/api/jobs", REQUEST)
    expected = video.read_bytes()
    video.unlink()
    assert "hf_secret" not in (runs / "runs.json").read_text() and (runs / "runs.json").stat().st_mode & 0o077 == 0
    with serving(client, tmp_path / "two", runs=runs) as page:
        done, running = page.get("/api/jobs").json()["jobs"]
        assert (done, running["status"]) == (before, "queued")
        assert page.get("/files/1/0").content == expected
        cloud.answer = {"status": "FAILED", "error": "OUT_OF_MEMORY: too large"}
        assert page.get("/api/jobs/2").json()["code"] == "OUT_OF_MEMORY"


def test_an_image_of_many_runs_is_stored_once_and_goes_with_the_last(cloud: FakeCloud, tmp_path: Path) -> None:
    client, runs = Client.local(cloud.base, patience=0), tmp_path / "runs"
    runs.mkdir()
    image = "data:image/png;base64," + 10_000 * "A"
    request = REQUEST | {"model": "wan22_5b", "prompts": [{"prompt": "x", "ctrl_img": image}]}
    cloud.answer = {"status": "FAILED", "error": "OUT_OF_MEMORY: too large"}
    with serving(client, tmp_path / "one", runs=runs) as page:
        for number in (1, 2):
            page.post("/api/jobs", request)
            assert "request" not in page.get(f"/api/jobs/{number}/progress").json()
    (stored,) = runs.glob("text-*")
    assert stored.read_text() == image and stored.stat().st_mode & 0o077 == 0
    assert (runs / "runs.json").stat().st_size < 5_000
    with serving(client, tmp_path / "two", runs=runs) as page:
        jobs = page.get("/api/jobs").json()["jobs"]
        assert [job["request"]["prompts"][0]["ctrl_img"] for job in jobs] == [image, image]
        page.post("/api/jobs/1/delete")
        assert stored.exists()
        page.post("/api/jobs/2/delete")
        assert not stored.exists()


def test_a_list_of_runs_that_cannot_be_read_is_no_obstacle(cloud: FakeCloud, tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text('[{"number": 1}]')
    assert Jobs(Client.local(cloud.base, patience=0), tmp_path, Store(tmp_path)).all() == []


def test_a_deleted_run_is_gone_with_its_files(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    local.post("/api/jobs", REQUEST)
    refused = local.post("/api/jobs/1/delete")
    assert refused.status_code == 404 and "cancel it first" in refused.json()["error"]
    cloud.answer = completed(written(tmp_path / "0.mp4").as_uri())
    local.get("/api/jobs/1")
    assert local.get("/files/1/0").ok and list((tmp_path / "files").glob("1-*"))
    assert local.post("/api/jobs/1/delete").ok
    assert local.get("/api/jobs").json()["jobs"] == [] and not list((tmp_path / "files").glob("1-*"))
    assert local.get("/files/1/0").status_code == 404


def test_all_files_come_in_one_zip(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    finished(local, cloud, completed(written(tmp_path / "0.mp4").as_uri(), (tmp_path / "lost.mp4").as_uri()))
    with zipfile.ZipFile(io.BytesIO(local.get("/runs.zip").content)) as archive:
        assert archive.namelist() == ["run-1-prompt-1-seed-1.mp4"], "what is lost is left out"
        assert archive.read(archive.namelist()[0]) == (tmp_path / "0.mp4").read_bytes()


def test_videos_of_other_sizes_are_compared_at_the_smaller_size(local: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    small = written(tmp_path / "small.mp4")
    large = written(tmp_path / "large.mp4", frames=FRAMES.repeat(2, 1).repeat(2, 2))
    finished(local, cloud, completed(small.as_uri(), large.as_uri()))
    found = local.post("/api/compare?a=1/0&b=1/1").json()
    assert found["uncommon"] == ["A is 64x48 and B is 128x96 pixels; B was scaled down to the size of A"]
    assert (found["width"], found["psnr"] > 20) == (64, True), "and it is the same picture"


# A training's folder


def dropped(name: str, *more: str) -> dict[str, Any]:
    """What the page sends for a folder of a real training."""
    folder = ROOT / "tests/trainer_runs" / name
    names = [path.name for path in folder.iterdir()]
    images = {path.name: base64.b64encode(path.read_bytes()).decode() for path in (folder.parent / "ctrl").iterdir()}
    text = (folder / "config.yaml").read_text()
    return {"config": {"name": "config.yaml", "text": text}, "names": [*names, *more], "images": images}


def test_a_dropped_training_becomes_requests_and_loras_by_step(local: Page) -> None:
    samples = ("samples/1764000000__000000004_0.webp", "samples/1764000000__000000008_2.webp")
    found = local.post("/api/training", dropped("wan21_1b_q8save32", *samples)).json()
    assert (found["name"], found["model"], found["trigger_word"]) == ("wan21_1b_q8save32", "wan21_1b", "sks")
    assert [(one["step"], one["is_final"]) for one in found["checkpoints"]] == [(4, False), (8, True)]
    assert found["checkpoints"][0]["loras"][0]["path"] == "wan21_1b_q8save32/wan21_1b_q8save32_000000004.safetensors"
    assert [(one["step"], one["number"]) for one in found["samples"]] == [(4, 0), (8, 2)]
    assert len(found["requests"]) == 4
    for request in found["requests"]:
        assert local.post("/api/check", request).json()["problems"] == []


def test_a_dropped_trainings_control_images_are_in_its_requests(local: Page) -> None:
    found = local.post("/api/training", dropped("wan21_i2v_14b_v_bf16")).json()
    assert all(request["prompts"][0]["ctrl_img"] for request in found["requests"])


def test_a_lora_that_the_worker_has_is_named_by_its_place(cloud: FakeCloud, tmp_path: Path) -> None:
    (tmp_path / "loras/mine").mkdir(parents=True)
    (tmp_path / "loras/mine/wan21_1b_q8save32.safetensors").touch()
    with serving(Client.local(cloud.base, patience=0), tmp_path / "files", loras=tmp_path / "loras") as page:
        found = page.post("/api/training", dropped("wan21_1b_q8save32")).json()
    assert found["checkpoints"][-1]["loras"][0]["path"] == "mine/wan21_1b_q8save32.safetensors"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"names": ["notes.txt"]}, "no LoRA that belongs to its config"),
        ({"config": {"name": "config.yaml", "text": "job: ["}}, "config.yaml: cannot be read as YAML"),
        ({"config": {"name": "config.yaml", "text": "a: 1"}}, "config.yaml: its process has no `sample` section"),
        ({"config": None}, "a dropped folder is"),
        ({"images": {"../../evil.png": "AAAA"}}, ""),
    ],
)
def test_a_folder_that_is_no_training_is_said(local: Page, change: dict[str, Any], text: str) -> None:
    answer = local.post("/api/training", dropped("wan21_1b_q8save32") | change)
    assert answer.status_code == (400 if text else 200)
    assert text in answer.json().get("error", "")
