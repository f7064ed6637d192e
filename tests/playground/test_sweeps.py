"""The sweeps of the playground's server, before an imitation of RunPod's API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Client
from playground import sweeps
from tests.playground.conftest import FakeCloud, Page, serving
from tests.playground.test_server import FRAMES, completed, written
from tools.frames import read_clip

PROMPT = {"prompt": "x", "width": 64, "height": 64, "num_frames": 5, "sample_steps": 4, "guidance_scale": 4, "seed": 7}
LORA = {"path": "a.safetensors", "network_multiplier": 0.9}
REQUEST = {"model": "wan21_1b", "loras": [LORA], "prompts": [PROMPT], "hf_token": "hf_secret"}
SWEEP = {"request": REQUEST, "loras": ["boat_000001000", "boat"], "scales": "0.5, 1", "seeds": ""}
"""Four cells."""


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweeps._SECONDS_BETWEEN_LOOKS, "local", 0.01)
    monkeypatch.setattr(sweeps, "_SECONDS_UNTIL_RETRY", 0.05)


@pytest.fixture
def page(cloud: FakeCloud, tmp_path: Path) -> Iterator[Page]:
    with serving(Client.local(cloud.base, patience=0), tmp_path / "files") as page:
        yield page


def start(page: Page, **changes: Any) -> int:
    answer = page.post("/api/sweeps", SWEEP | changes)
    assert answer.ok, answer.text
    return int(answer.json()["number"])


def cells(page: Page, number: int = 1) -> list[dict[str, Any]]:
    return [cell for row in page.get(f"/api/sweeps/{number}").json()["cells"] for cell in row]


def waited(page: Page, is_there: Callable[[list[str]], bool], number: int = 1) -> list[dict[str, Any]]:
    """The cells, once their states are as wanted."""
    deadline = time.monotonic() + 10
    while not is_there([cell["status"] for cell in found]) if (found := cells(page, number)) else True:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def test_a_plan_has_the_cells_of_the_sweep_command_and_says_how_long_they_take(
    page: Page, cloud: FakeCloud, tmp_path: Path
) -> None:
    plan = page.post("/api/sweeps/plan", SWEEP).json()
    assert (plan["rows"], plan["columns"]) == (["boat, step 1000", "boat"], ["scale 0.5", "scale 1"])
    assert (plan["problems"], plan["count"], plan["known"]) == ([], 4, None)
    answer = completed(written(tmp_path / "0.mp4").as_uri())
    cloud.answer = answer | {"output": answer["output"] | {"timings": {"total": 10.0, "wait": 4.0}}}
    page.post("/api/jobs", REQUEST)
    page.get("/api/jobs/1")
    assert page.post("/api/sweeps/plan", SWEEP).json()["known"] == {"seconds": 6.0, "run": 1, "is_same": True}
    slower = REQUEST | {"prompts": [PROMPT | {"sample_steps": 8}]}
    known = page.post("/api/sweeps/plan", SWEEP | {"request": slower}).json()["known"]
    assert known == {"seconds": 12.0, "run": 1, "is_same": False}


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"scales": "0.5, half"}, "--scale", "such as 0.6"),
        ({"scales": "7"}, "--scale", "from -2 to 2"),
        ({"seeds": "1.5"}, "--seed", "whole numbers"),
        ({"seeds": "-1"}, "--seed", "random seed"),
        ({"loras": ["a@0.5"]}, "--lora", "has a scale after its @"),
        ({"seeds": " ".join(map(str, range(16)))}, "", "at most 60 videos, and this one has 64"),
        ({"request": REQUEST | {"prompts": [PROMPT | {"width": 20}]}}, "prompts[0].width", "from 64"),
    ],
)
def test_what_cannot_be_swept_is_said_at_its_axis(
    page: Page, cloud: FakeCloud, change: dict[str, Any], field: str, text: str
) -> None:
    problem = page.post("/api/sweeps/plan", SWEEP | change).json()["problems"][0]
    assert problem["field"] == field and text in problem["text"]
    assert page.post("/api/sweeps", SWEEP | change).status_code == 400
    assert page.get("/api/sweeps").json() == {"sweeps": []} and not cloud.asked


def test_a_body_that_is_no_sweep_is_refused(page: Page) -> None:
    for body in ([], {}, SWEEP | {"loras": [{"title": "x"}]}, SWEEP | {"request": {"prompts": [], "loras": []}}):
        assert page.post("/api/sweeps/plan", body).status_code == 400


def test_the_steps_of_a_training_keep_the_scale_of_the_form(page: Page, cloud: FakeCloud) -> None:
    steps = [{"title": f"step {step}", "loras": [{"path": f"boat_{step}.safetensors"}]} for step in (1, 2)]
    start(page, loras=steps, scales="", seeds="7 8")
    assert [cell["title"] for cell in cells(page)] == ["step 1, seed 7", "step 1, seed 8", "step 2, seed 7", "step 2, seed 8"]
    waited(page, lambda states: "queued" in states)
    [lora] = page.get("/api/jobs").json()["jobs"][0]["request"]["loras"]
    assert lora == {"path": "boat_1.safetensors", "network_multiplier": 0.9}


def test_a_few_jobs_are_in_the_queue_at_once_and_all_are_shown_in_one_video(
    page: Page, cloud: FakeCloud, tmp_path: Path
) -> None:
    start(page)
    states = [cell["status"] for cell in waited(page, lambda states: states.count("queued") == 3)]
    assert states == ["queued", "queued", "queued", "waiting"] and page.post("/api/sweeps/1/grid").json() == {}
    cloud.answer = completed(written(tmp_path / "0.mp4").as_uri())
    done = waited(page, lambda states: set(states) == {"done"})
    assert len([path for _, path, _ in cloud.asked if path == "/run"]) == 4
    assert [job["sweep"] for job in page.get("/api/jobs").json()["jobs"]] == [1] * 4
    grid = page.post("/api/sweeps/1/grid").json()
    (tmp_path / "grid.mp4").write_bytes(page.get(grid["url"]).content)
    frames = read_clip(tmp_path / "grid.mp4").frames
    width, height = grid["width"], grid["height"]
    shown = [frames[:, y : y + height, x : x + width] for x, y in grid["corners"].values()]
    assert (len(shown), len(frames), grid["fps"]) == (4, len(FRAMES), 16)
    for tile in shown:
        zoom = height // FRAMES.shape[1]
        assert abs(tile[:, ::zoom, ::zoom].astype(int) - FRAMES).mean() < 12, "each is the cell's own video, in step"
    found = page.post("/api/compare?a=1/0&b=2/0").json()
    assert found["titles"] == [done[0]["title"], done[1]["title"]]


def test_a_cell_that_failed_says_why_and_is_made_again_alone(page: Page, cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.answer = {"status": "FAILED", "error": "LORA_NOT_FOUND: `loras[0].path`: there is no such file"}
    start(page)
    failed = waited(page, lambda states: set(states) == {"failed"})
    assert {(cell["code"], cell["error"]) for cell in failed} == {("LORA_NOT_FOUND", "there is no such file")}
    cloud.answer = completed(written(tmp_path / "0.mp4").as_uri())
    page.post("/api/sweeps/1/again", {"place": 2})
    assert [cell["status"] for cell in waited(page, lambda states: "done" in states)] == ["failed", "failed", "done", "failed"]
    assert len(page.get("/api/jobs").json()["jobs"]) == 4, "the run that failed has gone"
    page.post("/api/sweeps/1/again", {})
    waited(page, lambda states: set(states) == {"done"})


def test_a_cancelled_sweep_sends_no_more_and_can_be_deleted_with_its_runs(page: Page, cloud: FakeCloud) -> None:
    start(page)
    waited(page, lambda states: states.count("queued") == 3)
    refused = page.post("/api/sweeps/1/delete")
    assert refused.status_code == 404 and "cancel it first" in refused.json()["error"]
    page.post("/api/sweeps/1/cancel")
    assert len([path for _, path, _ in cloud.asked if path.startswith("/cancel")]) == 3
    cloud.answer = {"status": "CANCELLED"}
    waited(page, lambda states: set(states) == {"cancelled"})
    assert len([path for _, path, _ in cloud.asked if path == "/run"]) == 3
    assert page.post("/api/sweeps/1/delete").ok
    assert (page.get("/api/sweeps").json(), page.get("/api/jobs").json()) == ({"sweeps": []}, {"jobs": []})


def test_a_sweep_waits_for_a_worker_that_does_not_answer_and_stops_at_a_key_that_is_not_valid(
    page: Page, cloud: FakeCloud
) -> None:
    cloud.status = 503
    start(page)
    while not (trouble := page.get("/api/sweeps/1").json()["trouble"]):
        time.sleep(0.01)
    assert "no worker answers" in trouble and {cell["status"] for cell in cells(page)} == {"waiting"}
    cloud.status = 401
    assert {cell["code"] for cell in waited(page, lambda states: set(states) == {"failed"})} == {"NOT_AUTHORIZED"}


def test_a_sweep_goes_on_after_a_restart_but_not_without_its_token(cloud: FakeCloud, tmp_path: Path) -> None:
    client, runs = Client.local(cloud.base, patience=0), tmp_path / "runs"
    runs.mkdir()
    without_token = {name: value for name, value in REQUEST.items() if name != "hf_token"}
    with serving(client, tmp_path / "one", runs=runs) as page:
        start(page, request=without_token)
        waited(page, lambda states: states.count("queued") == 3)
        start(page)
    assert "hf_secret" not in (runs / "sweeps.json").read_text() and (runs / "sweeps.json").stat().st_mode & 0o077 == 0
    cloud.answer = completed(written(tmp_path / "0.mp4").as_uri())
    with serving(client, tmp_path / "two", runs=runs) as page:
        waited(page, lambda states: set(states) == {"done"})
        assert len([path for _, path, _ in cloud.asked if path == "/run"]) == 4, "no job was sent twice"
        assert {cell["code"] for cell in cells(page, 2)} == {"NO_TOKEN"}
        page.post("/api/sweeps/2/again", {"hf_token": "hf_secret"})
        waited(page, lambda states: set(states) == {"done"}, 2)
