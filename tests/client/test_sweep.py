"""`python -m client sweep`: many LoRAs, scales and seeds beside each other, also over a process that is killed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.cli import main
from tests.client.conftest import REQUEST, result
from tests.client.endpoint import KEY, Api, serve
from tests.faults import Unanswered
from tests.playground.test_browser import CHROMIUM, axe
from tests.worker.web_server import Web
from tests.worker_process import ROOT
from tools.frames import read_clip
from worker.video import VIDEO, encode

FRAMES = 4


class Films:
    """A queue whose jobs end at once, each with a film of its seed's grey that gets lighter. `<b>` and `bad` fail."""

    def __init__(self, web: Web, folder: Path) -> None:
        self.web, self.folder = web, folder
        self.jobs: dict[str, dict[str, Any]] = {}
        self.runs_on = False
        """Whether jobs stay unfinished."""

    def submit(self, job_id: str, request: dict[str, Any], **more: Any) -> None:
        self.jobs[job_id] = request

    def status(self, job_id: str) -> dict[str, Any] | None:
        request = self.jobs.get(job_id)
        if request is None or self.runs_on:
            return request and {"status": "IN_PROGRESS"}
        if "bad" in request["loras"][0]["path"]:
            return {"status": "FAILED", "error": "LORA_NOT_FOUND: <script>alert(1)</script> & more"}
        seed = request["prompts"][0]["seed"]
        film = self.folder / f"{seed}.mp4"
        if not film.exists():
            greys = [np.full((1, 32, 48, 3), seed + 20 * number, np.uint8) for number in range(FRAMES)]
            encode(greys, film, VIDEO["mp4"], 8, FRAMES)
        body = film.read_bytes()
        self.web.gives(f"/{seed}.mp4", body)
        answer = result(self.web.url(f"/{seed}.mp4"), seed=seed, width=48, height=32, num_frames=FRAMES, fps=8, bytes=len(body))
        if request.get("draft"):
            answer["output"]["timings"] |= {"generate": 9.0, "full_run_estimate": 90.0}
        return answer

    def cancel(self, job_id: str) -> None:
        raise AssertionError


@pytest.fixture
def films(web: Web, tmp_path: Path) -> Films:
    (tmp_path / "films").mkdir()
    return Films(web, tmp_path / "films")


@pytest.fixture
def api(films: Films, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    with serve(films) as api:
        monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", api.base_url)
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        yield api


@pytest.fixture
def sweep(api: Api, tmp_path: Path) -> list[str]:
    """The arguments of a sweep with two cells."""
    file = tmp_path / "request.json"
    file.write_text(json.dumps(REQUEST))
    return ["sweep", str(file), "--endpoint", "endpoint", "--output-dir", str(tmp_path / "sweep"), "--seed", "40,120"]


def requests_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["sweep", *arguments, "--dry-run"]) == 0
    return [job.get("input", job) for job in json.loads(capsys.readouterr().out)]


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["sweep", *arguments]) == 2
    return capsys.readouterr().err


# The cells.


def test_every_lora_is_made_with_every_seed_and_scale(sweep: list[str], api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lora", "a_000001000", "--lora", "b.safetensors", "--scale", "0.6,1", "--width", "320"]
    requests = requests_of(*sweep[1:], *options, capsys=capsys)
    made = [(lora["path"], lora["network_multiplier"], prompt["seed"]) for lora, prompt in map(only, requests)]
    paths = ("a_000001000.safetensors", "b.safetensors")
    assert made == [(path, scale, seed) for path in paths for seed in (40, 120) for scale in (0.6, 1)]
    assert {request["prompts"][0]["width"] for request in requests} == {320}
    assert api.asked == []


def only(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    [lora], [prompt] = request["loras"], request["prompts"]
    return lora, prompt


def test_the_two_files_of_a_moe_lora_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--model", "wan22_14b_t2v", "--prompt", "a boat", "--prompt", "a kite"]
    loras = ["boat/boat_000001000", "x_low_noise.safetensors", "x_high_noise", "high=H.safetensors@0.5,low=L.safetensors@1"]
    loras += ["https://example.com/z_low_noise.safetensors?download=true"]
    requests = requests_of(*prompts, *(f"--lora={path}" for path in loras), capsys=capsys)
    assert [request["prompts"][0]["prompt"] for request in requests] == ["a boat"] * 4 + ["a kite"] * 4
    sides = [{lora["transformer"]: lora["path"] for lora in request["loras"]} for request in requests[:4]]
    assert sides == [
        {side: f"boat/boat_000001000_{side}_noise.safetensors" for side in ("high", "low")},
        {side: f"x_{side}_noise.safetensors" for side in ("high", "low")},
        {"high": "H.safetensors", "low": "L.safetensors"},
        {"low": loras[-1]},
    ]
    assert [lora["network_multiplier"] for lora in requests[2]["loras"]] == [0.5, 1]


def test_a_trainings_folder_gives_every_lora_that_it_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(ROOT / "tests/trainer_runs/wan21_1b_q8save32", folder)
    requests = requests_of("--training", str(folder), "--scale", "0.5,1", capsys=capsys)
    name = "wan21_1b_q8save32/wan21_1b_q8save32"
    made = [(lora["path"], lora["network_multiplier"], prompt["seed"]) for lora, prompt in map(only, requests)]
    files = (f"{name}_000000004.safetensors", f"{name}.safetensors")
    assert made == [(path, scale, 42) for path in files for scale in (0.5, 1)]
    assert {(request["match"], request["trained_with"]["quantize"]) for request in requests} == {("preview", True)}
    some = ["--sample", "1,2", "--step", "8", "--seed", "5", "--prompt", "[trigger] at night"]
    requests = requests_of("--training", str(folder), *some, capsys=capsys)
    assert [(request["trigger_word"], request["prompts"][0]["prompt"]) for request in requests] == [
        ("sks", "[trigger] at night")
    ] * 2


def test_what_cannot_be_swept_is_said_before_anything_is_sent(
    sweep: list[str], api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = sweep[1:]
    assert "`--lora`: a@0.5 has a scale after its @" in refusal(*given, "--lora", "a@0.5", "--scale", "1", capsys=capsys)
    assert "`--scale`: must be a number from -2 to 2" in refusal(*given, "--scale", "1,3", capsys=capsys)
    assert "`--seed`: must be 0 or more" in refusal(*given, "--seed=-1", capsys=capsys)
    assert "`--concurrency`: must be 1 or more" in refusal(*given, "--concurrency", "0", capsys=capsys)
    assert "REQUEST.json`: cannot be used with --training" in refusal(*given, "--training", str(tmp_path), capsys=capsys)
    (tmp_path / "request.json").write_text(json.dumps(REQUEST | {"prompts": [{"prompt": "x", "num_videos": 2}]}))
    assert "`prompts[0].num_videos`: has no place in a sweep" in refusal(*given, capsys=capsys)
    assert api.asked == []


# The jobs.


def test_a_sweep_that_is_killed_goes_on_and_sends_no_job_twice(
    sweep: list[str], films: Films, api: Api, tmp_path: Path
) -> None:
    films.runs_on = True
    killed = subprocess.Popen([sys.executable, "-m", "client", *sweep, "--scale", "0.5,1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while api.times("status") < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    assert main([*sweep, "--scale", "2"]) == 2, "two do not share a folder"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert api.times("run") == 3, "the concurrency"
    with (tmp_path / "sweep/sweep.jsonl").open("a") as record:
        record.write('{"cell": "cut sho')
    films.runs_on = False
    assert main([*sweep, "--scale", "0.5,1"]) == 0
    assert api.times("run") == 4
    assert len(list((tmp_path / "sweep/videos").iterdir())) == 4
    assert main([*sweep, "--scale", "0.5,1,2"]) == 0
    assert api.times("run") == 6, "only the new ones are made"
    next((tmp_path / "sweep/videos").glob("*-0.5-40-*")).unlink()
    assert main([*sweep, "--scale", "0.5,1"]) == 0
    assert api.times("run") == 7, "a video that was deleted is made again"


def test_a_job_that_is_gone_or_was_sent_elsewhere_is_made_again(sweep: list[str], films: Films, api: Api) -> None:
    films.runs_on = True
    api.faults.order("status", Unanswered(), times=100)
    assert main([*sweep, "--patience", "0.1"]) == 3
    assert api.times("run") == 2
    api.faults.forget()
    films.jobs.clear()
    films.runs_on = False
    assert main(sweep) == 0
    assert api.times("run") == 4
    changed = [*sweep, "--width", "96"]
    films.runs_on = True
    api.faults.order("status", Unanswered(), times=100)
    assert main([*changed, "--patience", "0.1"]) == 3
    api.faults.forget()
    films.runs_on = False
    here = [{"--endpoint": "--url", "endpoint": api.here}.get(word, word) for word in changed]
    assert main(here) == 0
    assert api.times("run") == 8


def test_a_cell_that_fails_is_shown_and_does_not_stop_the_others(
    sweep: list[str], api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*sweep, "--lora", "bad", "--lora", "good", "--scale", "0.8"]
    assert main([*command, "--json"]) == 1
    out, err = capsys.readouterr()
    cells = json.loads(out)["cells"]
    assert [("path" in cell, cell.get("error", {}).get("code")) for cell in cells] == [(False, "LORA_NOT_FOUND")] * 2 + [
        (True, None)
    ] * 2
    assert "failed: bad, seed 40: LORA_NOT_FOUND: " in err and "2 of 4 failed; the same command tries them again" in err
    page = (tmp_path / "sweep/index.html").read_text()
    assert page.count(">LORA_NOT_FOUND</td>") == 2
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import""", page)
    assert main(command) == 1
    assert api.times("run") == 4 + 2, "what failed is tried again"


def test_a_submission_whose_answer_was_lost_does_not_stop_the_others(sweep: list[str], api: Api, tmp_path: Path) -> None:
    api.faults.order("run", Unanswered())
    assert main(sweep) == 6
    assert len(list((tmp_path / "sweep/videos").iterdir())) == 1


# The files.


def test_the_grid_plays_all_videos_in_step(sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*sweep, "--lora", "good", "--lora", "bad", "--scale", "0.5,1"]) == 1
    folder = tmp_path / "sweep"
    assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in ("grid.mp4", "sheet.jpg", "index.html")]
    grid = read_clip(folder / "grid.mp4")
    assert (len(grid.frames), grid.fps) == (FRAMES, 8)
    page = (folder / "index.html").read_text()
    corners = [(int(x), int(y)) for x, y in re.findall(r'data-x="(\d+)" data-y="(\d+)"', page)]
    width, height = (int(re.search(rf'data-{name}="(\d+)"', page)[1]) for name in ("width", "height"))  # type: ignore[index]
    assert (width, height) == (240, 160), "small films are enlarged"
    for number, frame in enumerate(grid.frames):
        greys = [frame[y + 4 : y + height - 4, x + 4 : x + width - 4].mean() for x, y in corners]
        assert greys == pytest.approx([seed + 20 * number for seed in (40, 40, 120, 120)], abs=3)
    with Image.open(folder / "sheet.jpg") as sheet:
        pixels = np.asarray(sheet.convert("L"), np.int16)
    shown = {grey for grey in (40, 60, 80, 100, 120, 140, 160, 180) if (abs(pixels - grey) <= 2).mean() > 0.02}
    assert shown == {40, 60, 100, 120, 140, 180}, "the first, the middle and the last frame of each"


def test_drafts_are_named_so_with_the_time_of_the_full_run(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sweep, "--model", "wan21_14b", "--draft"]) == 0
    assert "drafts: the full run of those made now would take about 180 s of the GPU" in capsys.readouterr().err
    assert "<title>Sweep: wan21_14b · draft · " in (tmp_path / "sweep/index.html").read_text()
    assert main([*sweep, "--model", "wan21_14b"]) == 0
    assert "draft" not in capsys.readouterr().err + (tmp_path / "sweep/index.html").read_text()


def test_images_have_a_page_and_no_grid_video(sweep: list[str], films: Films, web: Web, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (200, 0, 0)).save(tmp_path / "image.png")
    body = (tmp_path / "image.png").read_bytes()
    web.gives("/image.png", body)
    answer = result(web.url("/image.png"), format="png", num_frames=1, width=48, height=32, bytes=len(body))
    answer["output"]["outputs"] = {"images": answer["output"]["outputs"]["videos"], "videos": []}
    films.status = lambda job_id: answer  # type: ignore[method-assign]
    assert main([*sweep, "--num-frames", "1"]) == 0
    assert not (tmp_path / "sweep/grid.mp4").exists()
    assert (tmp_path / "sweep/index.html").read_text().count('.png" alt="">') == 2


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
def test_the_page_shows_all_cells_at_one_frame_and_one_at_full_size(sweep: list[str], tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    assert main([*sweep, "--scale", "0.5,1"]) == 0
    complaints: list[str] = []
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        page = browser.new_page(reduced_motion="reduce")
        page.on("console", lambda line: complaints.append(line.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((tmp_path / "sweep/index.html").as_uri())

        def greys() -> list[float]:
            shots = [Image.open(io.BytesIO(cell.screenshot())).convert("L") for cell in page.locator("canvas").all()]
            return [float(np.asarray(shot)[8:-8, 8:-8].mean()) for shot in shots]

        page.get_by_text("frame 1 of 4").wait_for()
        assert greys() == pytest.approx([40, 40, 120, 120], abs=4)
        page.get_by_role("slider", name="Frame").press("End")
        page.get_by_text("frame 4 of 4").wait_for()
        assert greys() == pytest.approx([100, 100, 180, 180], abs=4)
        page.get_by_role("button", name="seed 40, scale 1").click()
        assert page.inner_text("#name") == "seed 40, scale 1"
        page.keyboard.press("ArrowDown")
        assert page.inner_text("#name") == "seed 120, scale 1"
        page.keyboard.press("ArrowDown")
        assert page.inner_text("#name") == "seed 120, scale 1", "there is none below"
        assert axe(page) == []
        page.keyboard.press("Escape")
        assert axe(page) == []
        browser.close()
    assert complaints == []
