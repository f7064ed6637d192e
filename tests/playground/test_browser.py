"""The page in a real Chromium, with a real worker and tiny checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from client import Client
from tests.playground.conftest import FakeCloud, serving
from tests.playground.conftest import Page as Server
from tests.worker_process import LocalApi, free_port
from tools.compare import as_json, compare
from tools.frames import read_clip
from worker.request import Lora, Prompt, Request, TrainingSettings
from worker.video import VIDEO, encode

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium"),
]

LORA = "wan22_14b_t2v/wan22_14b_t2v_{}_noise.safetensors"
EXAMPLE = {
    "model": "wan22_14b_t2v",
    "trigger_word": "sks",
    "loras": [{"path": LORA.format(side), "transformer": side} for side in ("high", "low")],
    "prompts": [{"prompt": "[trigger] a boat", "width": 96, "height": 64, "num_frames": 5, "sample_steps": 2, "fps": 5}],
}
WITHIN = 60_000
"""Milliseconds. The longest wait below takes three seconds."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, and containers run these tests as root.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def playground(worker: LocalApi, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("playground")
    with serving(Client.local(worker.url, patience=0), folder, example=EXAMPLE, loras=tiny / "loras") as server:
        yield server


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser, playground: Server) -> Iterator[Open]:
    """Opens the page. Errors in its console fail the test, for example of the content security policy."""
    contexts, complaints = [], []

    def open(server: Server = playground, width: int = 1440, height: int = 900, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(WITHIN)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.goto(server.url)
        page.wait_for_selector("body[data-ready]")
        return page

    yield open
    for context in contexts:
        context.close()
    # The console also lists the failed requests that tests provoke.
    assert [text for text in complaints if not re.search("status of (400|502)", text)] == []


@pytest.fixture
def page(open_page: Open) -> Page:
    return open_page()


@pytest.fixture
def free(open_page: Open, tmp_path: Path) -> Iterator[Page]:
    """A page without a worker: its model is not known, and every one can be chosen."""
    with serving(Client.local(f"http://127.0.0.1:{free_port()}", patience=0), tmp_path / "free", example=EXAMPLE) as server:
        yield open_page(server)


def field(page: Page, name: str) -> Locator:
    return page.locator(f"#fields [name={name}]").first


def run(page: Page, tap: bool = False, **values: str) -> None:
    """Fill in the form, run it with the keyboard or a tap, and wait for the video."""
    for name, value in values.items():
        field(page, name).fill(value)
    with page.expect_response(lambda answer: answer.url.endswith("/api/jobs") and answer.request.method == "POST") as started:
        if tap:
            page.locator("#run").tap()
        else:
            page.keyboard.press("Control+Enter")
    title = page.locator("#facts h2", has_text=re.compile(rf"^Run {started.value.json()['number']}\b"))
    page.locator("#stage", has=title).locator(".made").wait_for()


def axe(page: Page, *rules: str) -> list[str]:
    """The violations that axe finds of WCAG 2.2 A and AA and of its best practices, or only of `rules`."""
    import axe_playwright_python

    if not page.evaluate("'axe' in window"):
        page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
    options: dict[str, Any] = {"resultTypes": ["violations"]}  # other results take as long and are not used
    options |= {"runOnly": list(rules)} if rules else {}
    found = page.evaluate("options => axe.run(document, options)", options)
    return [f"{item['id']}: {node['html'][:160]}" for item in found["violations"] for node in item["nodes"]]


def test_a_run_shows_its_progress_and_then_plays(page: Page) -> None:
    field(page, "sample_steps").fill("150")
    field(page, "width").fill("100")
    field(page, "num_frames").fill("25")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(".percent span")
    assert "of 150" in page.locator(".doing").inner_text()
    assert page.get_by_role("progressbar").is_visible()
    page.wait_for_function("() => document.querySelector('video.made')?.currentTime > 0.1")
    video = page.locator("video.made")
    assert video.evaluate("video => [video.videoWidth, video.videoHeight, video.loop, video.muted]") == [96, 64, True, True]
    facts = page.locator("#facts").inner_text()
    assert "sks a boat" in facts and "UniPCMultistep" in facts and "generate" in facts
    assert "100x64 became 96x64" in page.get_by_label("Warnings").inner_text()
    assert "is ready" in page.get_by_role("status").inner_text()


def test_the_log_grows_with_the_run_and_stays_beside_its_json(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    update = {"stage": "denoise", "prompt_index": 0, "prompts": 1, "step": 2, "steps": 4, "percent": 50, "seconds_left": 3.0}
    cloud.answer = {"status": "IN_QUEUE", "workers": {"running": 1}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        page.keyboard.press("Control+Enter")
        lines = page.locator(".log li")
        lines.filter(has_text="Waiting for a worker.").wait_for()
        tile, tab = page.get_by_label("Show Run 1"), page.get_by_role("tab", name="Log")
        tile.focus()
        cloud.answer = {"status": "IN_PROGRESS", "output": update}
        lines.filter(has_text="Denoising, step 2 of 4, about 3 s left.").wait_for()
        assert tile.evaluate("tile => tile === document.activeElement && tile.classList.contains('running')")
        tab.focus()
        cloud.answer = {"status": "FAILED", "error": "OUT_OF_MEMORY: the GPU's memory is full"}
        lines.last.filter(has_text="the GPU's memory is full").wait_for()
        assert page.locator(".log .error").count() == 1
        assert tab.evaluate("tab => tab === document.activeElement"), "the focus stays while the run goes on and ends"
        tab.press("ArrowLeft")
        assert not lines.first.is_visible()
        assert json.loads(page.get_by_label("Request", exact=True).nth(1).inner_text())["input"]["model"] == "wan22_14b_t2v"


def test_a_notification_tells_of_the_end_to_those_who_asked_for_it(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    update = {"stage": "denoise", "prompt_index": 0, "prompts": 1, "step": 2, "steps": 4, "percent": 50, "seconds_left": 3.0}
    cloud.answer = {"status": "IN_PROGRESS", "output": update, "workers": {"running": 1}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        page.context.clear_permissions()  # as in a browser that was never asked
        page.reload()
        page.wait_for_selector("body[data-ready]")
        page.evaluate("""() => {
            window.told = [];
            window.Notification = new Proxy(Notification, {construct: (target, [text]) => (told.push(text), new target(text))});
        }""")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("() => document.title === '50% · Playground'")
        assert page.evaluate("Notification.permission") == "default", "nothing is asked for before the button"
        page.context.grant_permissions(["notifications"], origin=server.url)  # the user's answer to the browser's question
        page.get_by_role("button", name="Notify me").click()
        page.get_by_role("status").filter(has_text="You get a notification").wait_for()
        assert page.evaluate("document.activeElement.innerText") == "Cancel", "the focus stays where the button was"
        page.evaluate("Object.defineProperty(document, 'hidden', {configurable: true, get: () => true})")
        cloud.answer = {"status": "FAILED", "error": "OUT_OF_MEMORY: the GPU's memory is full"}
        page.wait_for_function("() => told.length")
        assert page.evaluate("[document.title, told]") == ["● Run 1 failed · Playground", ["Run 1 failed"]]
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        assert page.title() == "Playground"


def test_a_run_can_be_cancelled(page: Page, worker: LocalApi) -> None:
    field(page, "sample_steps").fill("150")
    field(page, "num_frames").fill("81")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Cancel").click()
    page.locator("#screen").get_by_text("was cancelled").wait_for()
    assert "Stopped" in worker.log.read_text()[-3000:] or "CancelledError" in worker.log.read_text()[-3000:]


def test_runs_are_still_there_when_the_page_is_loaded_again(page: Page) -> None:
    run(page)
    count = page.locator("#tiles li").count()
    page.reload()
    page.wait_for_selector("body[data-ready] video.made")
    assert page.locator("#tiles li").count() == count
    page.wait_for_function("() => document.querySelector('#tiles li:last-child .poster img').naturalWidth === 96")


def test_two_runs_play_in_step_with_the_numbers_of_the_compare_command(page: Page, playground: Server, tmp_path: Path) -> None:
    run(page, seed="1")
    run(page, seed="2")
    numbers = [int(button.get_attribute("data-run") or 0) for button in page.locator("#tiles .open:has(+ .pick)").all()[-2:]]
    for number in numbers:
        page.get_by_label(f"Compare Run {number}", exact=True).check()
    page.wait_for_selector(".curve .dot")
    for number in numbers:
        (tmp_path / f"{number}.mp4").write_bytes(playground.get(f"/files/{number}/0").content)
    expected = as_json(compare(*(read_clip(tmp_path / f"{number}.mp4") for number in numbers)))["frames"]
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    for key, frame in (("Home", 0), ("ArrowRight", 1), ("End", 4)):
        page.keyboard.press(key)
        text = f"Frame {frame + 1} of 5, {expected[frame]['psnr']:.1f} dB"
        assert (slider.get_attribute("aria-valuetext"), page.locator(".frame").inner_text()) == (text, text)
    box = slider.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    assert page.locator(".frame").inner_text().startswith("Frame 3 of 5")
    pictures = "() => [...document.querySelectorAll('.panes canvas')].map(canvas => canvas.toDataURL())"
    assert len(set(page.evaluate(pictures))) == 3
    assert page.locator("#facts .differing").inner_text().split() == ["Seed", "A", "1", "B", "2"]
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => !document.querySelector('.frame').textContent.startsWith('Frame 3')")
    page.get_by_role("button", name="Back to the video").click()
    page.wait_for_selector("video.made")
    assert page.locator(".pick input:checked").count() == 0


def test_a_sample_of_the_trainer_is_dropped_on_a_video(page: Page, playground: Server, tmp_path: Path) -> None:
    run(page)
    name = page.locator("video.made").get_attribute("src")
    (tmp_path / "mine.mp4").write_bytes(playground.get(str(name)).content)
    sample = tmp_path / "1718000000__000001000_0.webp"
    frames = read_clip(tmp_path / "mine.mp4").frames
    encode([frames], sample, VIDEO["webp"], 5, len(frames))
    drop(page, "#screen", sample, "image/webp")
    page.wait_for_selector(".curve .dot")
    assert page.locator("figcaption").first.inner_text() == sample.name
    assert page.locator("#facts h2").inner_text() == "Equal within encoding noise"
    page.get_by_role("button", name="Back to the video").click()
    bad = tmp_path / "notes.txt"
    bad.write_text("no picture")
    with page.expect_response("**/api/compare*"):
        page.wait_for_selector("video.made")
        page.locator("#screen input[type=file]").set_input_files(bad)
    page.get_by_text("notes.txt: neither a video nor an image").wait_for()


def focused(page: Page) -> str:
    """The name, text or id of the element with the focus; empty where it was lost."""
    found = page.evaluate("""() => {
        const element = document.activeElement;
        if (element === document.body) return "";
        return element.name || element.id || element.getAttribute("aria-label") || element.innerText;
    }""")
    return str(found)


def drop(page: Page, selector: str, file: Path, kind: str) -> None:
    """Drop a file, as from the file manager."""
    code = """([bytes, name, type]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, {type}));
        return data;
    }"""
    data = page.evaluate_handle(code, [list(file.read_bytes()), file.name, kind])
    for event in ("dragover", "drop"):
        page.dispatch_event(selector, event, {"dataTransfer": data})


def test_every_problem_is_shown_at_its_field_and_the_first_has_the_focus(page: Page) -> None:
    runs = page.locator("#tiles li").count()
    field(page, "width").fill("20")
    field(page, "seed").fill("often")
    page.keyboard.press("Control+Enter")
    page.get_by_role("heading", name="2 problems to correct").wait_for()
    for name, text in (("width", "from 64 to 4096"), ("seed", "must be an integer")):
        control = field(page, name)
        assert control.get_attribute("aria-invalid") == "true"
        described = str(control.get_attribute("aria-describedby")).split()
        assert any(text in page.locator(f"#{name}").inner_text() for name in described)
    assert page.evaluate("document.activeElement.name") == "width"
    assert page.locator("#tiles li").count() == runs, "nothing was sent"
    field(page, "width").fill("96")
    assert field(page, "width").get_attribute("aria-invalid") is None
    problem = page.get_by_role("button", name="prompts[0].seed")
    problem.click()
    assert focused(page) == "seed"
    problem.focus()
    field(page, "seed").evaluate("field => (field.value = 1)")
    page.keyboard.press("Control+Enter")
    problem.wait_for(state="detached")
    assert focused(page) == "prompt", "the summary is gone"


def test_problems_that_only_the_worker_finds_are_shown_at_the_fields_too(page: Page) -> None:
    for path, name in zip(page.locator("[name=path]").all(), ("one", "two"), strict=True):
        path.fill(f"{name}.safetensors")
    page.keyboard.press("Control+Enter")
    page.locator(".failed .big", has_text="failed").wait_for()
    assert page.locator(".code").inner_text() == "LORA_NOT_FOUND"
    assert page.locator("[name=path][aria-invalid]").count() == 2
    assert page.evaluate("document.activeElement === document.querySelector('[name=path]')")


def test_a_problem_in_a_fold_opens_it(page: Page) -> None:
    more = page.locator("#fields > .fold")
    more.locator("summary").click()
    more.locator("[name=trigger_word]").fill("x" * 501)
    more.locator("summary").filter(has_text="1 set").click()
    page.keyboard.press("Control+Enter")
    more.locator("[name=trigger_word][aria-invalid]:focus").wait_for()


def test_the_form_takes_the_model_of_an_endpoint_when_an_answer_tells_it(
    open_page: Open, cloud: FakeCloud, tmp_path: Path
) -> None:
    cloud.answer = {"workers": {"idle": 1}, "status": "IN_QUEUE"}
    with serving(Client.endpoint("ep", "key", base_url=cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        field(page, "model").select_option("wan21_1b")
        page.locator("[name=path]").fill("a.safetensors")
        error = "MODEL_NOT_SERVED: `model`: this worker serves wan22_14b_t2v, not wan21_1b"
        cloud.answer = {"workers": {"idle": 1}, "status": "FAILED", "error": error}
        page.keyboard.press("Control+Enter")
        page.locator("[name=path]").nth(1).wait_for()
        assert (field(page, "model").input_value(), field(page, "model").is_disabled()) == ("wan22_14b_t2v", True)
        page.get_by_role("button", name="Correct the request").click()
        assert field(page, "model").input_value() == "wan21_1b"
        page.get_by_role("button", name="Use wan22_14b_t2v").press("Enter")
        assert field(page, "model").input_value() == "wan22_14b_t2v"
        assert focused(page) == "match", "the button is gone, and the model cannot be changed now"


def test_the_model_is_that_of_the_worker_and_cannot_be_changed(page: Page, playground: Server) -> None:
    assert (field(page, "model").input_value(), field(page, "model").is_disabled()) == ("wan22_14b_t2v", True)
    line = page.locator("#target")
    assert line.get_attribute("data-state") == "ready" and "Wan 2.2 T2V A14B at 127.0.0.1" in line.inner_text()


def test_a_run_whose_worker_is_gone_says_so_and_ends(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.answer = {"status": "IN_PROGRESS", "workers": {"running": 1}, "model": "wan22_14b_t2v"}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        page.keyboard.press("Control+Enter")
        page.locator(".making .percent").wait_for()
        cloud.status = 503
        page.locator(".percent", has_text="No answer").wait_for()
        assert page.locator("#tiles .poster").inner_text() == "No answer"
        page.keyboard.press("Control+Enter")
        page.locator("#not-sent", has_text="Not sent. No job was started").wait_for()
        page.locator("#target[data-state=gone]").wait_for()
        cloud.status = 404  # the worker was started again
        page.locator("#screen").get_by_text("was started again while this ran").wait_for()
        cloud.status = 200
        page.locator("#not-sent:empty").wait_for(state="attached")


def test_a_draft_is_called_one_and_says_how_long_the_full_run_takes(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    file = {"url": f"{cloud.base}/0.mp4", "expires_at": None, "key": "a/0.mp4", "width": 64, "height": 64, "bytes": 4}
    video = {"prompt_index": 0, **file, "format": "mp4", "num_frames": 5, "fps": 16, "seed": 1}
    timings = {"generate": 9.4, "total": 12.0, "full_run_estimate": 92.3}
    output = {"model": "wan22_14b_t2v", "outputs": {"images": [], "videos": [video]}, "warnings": [], "timings": timings}
    cloud.files["/0.mp4"] = b"film"
    cloud.answer = {"status": "COMPLETED", "output": output | {"settings": {"prompts": [], "draft": {}}}, "workers": {}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE | {"draft": True}) as server:
        page = open_page(server)
        assert field(page, "draft").is_checked()
        page.keyboard.press("Control+Enter")
        page.locator("#facts", has_text="The full run would take about 1 min 32 s instead of 9.4 s.").wait_for()
        assert page.locator("#facts h2 .draft").inner_text() == "draft"
        assert "full_run" not in page.locator("#facts .timings").inner_text()
        assert page.locator("#tiles .draft").inner_text() == "draft"


def test_a_long_prompt_leaves_the_progress_and_cancel_in_view(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.answer = {"status": "IN_PROGRESS", "workers": {"running": 1}, "model": "wan22_14b_t2v"}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server, height=700)
        field(page, "prompt").fill("a boat that sails over a very wide sea " * 100)
        page.keyboard.press("Control+Enter")
        cancel = page.get_by_role("button", name="Cancel")
        cancel.wait_for()
        for part in (page.locator(".percent"), cancel, page.locator("#run")):
            while (box := part.bounding_box()) is None:  # between two drawings
                part.wait_for()
            assert box["y"] >= 0 and box["y"] + box["height"] <= 700


def test_the_percentage_ends_when_the_file_is_there(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    update = {"stage": "encode", "prompt_index": 0, "prompts": 1, "step": 2, "steps": 2, "percent": 100, "seconds_left": 0.0}
    cloud.answer = {"status": "IN_PROGRESS", "output": update, "workers": {"running": 1}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        page.keyboard.press("Control+Enter")
        page.locator("#tiles .poster", has_text="Encoding").wait_for()
        assert "100" not in page.locator("#stage").inner_text() + page.locator("#strip").inner_text()


def test_the_problems_of_a_model_go_when_another_is_chosen(free: Page) -> None:
    field(free, "model").select_option("wan21_i2v_14b")
    free.locator("[name=path]").fill("a.safetensors")
    free.keyboard.press("Control+Enter")
    free.locator(".summary", has_text="needs a control image").wait_for()
    field(free, "model").select_option("wan21_14b")
    assert not free.locator(".summary").is_visible() and free.locator("[aria-invalid]").count() == 0


def test_the_form_takes_the_shape_of_the_model(free: Page, tmp_path: Path) -> None:
    page = free
    zone = page.locator(".field.image").first
    assert not zone.is_visible()
    field(page, "model").select_option("wan21_i2v_14b")
    assert zone.is_visible() and page.locator("[name=path]").count() == 1
    assert "image required" in page.locator(".readout").first.inner_text()
    page.locator("[name=path]").fill("a.safetensors")
    page.keyboard.press("Control+Enter")
    page.get_by_text("needs a control image").first.wait_for()
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 48), "teal").save(picture)
    drop(page, ".field.image .zone", picture, "image/png")
    page.wait_for_selector(".zone img[src^='data:image/png']")
    assert json.loads(copied(page, "JSON"))["input"]["prompts"][0]["ctrl_img"].startswith("data:image/png;base64,")
    page.get_by_role("button", name="Remove the first image").press("Enter")
    assert (field(page, "ctrl_img").input_value(), focused(page)) == ("", "Choose an image")
    page.evaluate(
        """bytes => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
        }""",
        list(picture.read_bytes()),
    )
    page.wait_for_selector(".zone img[src^='data:image/png']")
    field(page, "draft").check()
    field(page, "model").select_option("wan22_5b")
    assert "optional" in zone.locator("label").inner_text()
    assert not field(page, "draft").is_visible() and '"draft": true' not in copied(page, "JSON")
    field(page, "model").select_option("wan22_14b_t2v")
    assert "ctrl_img" not in copied(page, "JSON") and not field(page, "draft").is_checked()


def test_every_field_of_the_schema_is_there_with_its_description(page: Page) -> None:
    without_field = {"prompts", "loras", "transformer", "ctrl_img_1"}  # made of parts, by position, another name
    fields = [
        (name, info.description)
        for model in (Request, Lora, Prompt, TrainingSettings)
        for name, info in model.model_fields.items()
        if name not in without_field
    ]
    shown = page.evaluate("""() => [...document.querySelectorAll("#fields [data-field]")].map((field) => {
        const control = field.querySelector("[name]");
        return [control.name, document.getElementById(control.getAttribute("aria-describedby")).textContent];
    })""")
    assert {tuple(pair) for pair in shown} == set(fields)
    field(page, "width").focus()
    assert page.locator("#notes").inner_text() == Prompt.model_fields["width"].description


def test_the_effective_size_and_frames_are_shown_while_typing(free: Page) -> None:
    page = free
    for model, width, frames, shown in (
        ("wan22_14b_t2v", "1000", "40", ["992 × 64", "41 frames"]),
        ("wan22_14b_i2v", "1000", "40", ["992 × 64", "37 frames"]),
        ("wan21_1b", "1007", "1", ["992 × 64", "one image"]),
    ):
        field(page, "model").select_option(model)
        field(page, "width").fill(width)
        field(page, "num_frames").fill(frames)
        readout = page.locator(".prompt .readout", has_text=shown[0])
        readout.filter(has_text=shown[1]).wait_for()
    field(page, "width").fill("")
    page.locator(".prompt .readout", has_text="size is shown here").wait_for()


def test_several_prompts_give_several_posters(page: Page) -> None:
    page.get_by_role("button", name="Add a prompt").click()
    page.keyboard.type("another boat")
    second = page.locator(".prompt").nth(1)
    assert second.locator("[name=width]").input_value() == "96", "it has the values of the prompt before"
    before = page.locator("#tiles .pick").count()
    run(page)
    assert page.locator("#tiles .pick").count() == before + 2
    captions = page.locator("#tiles .caption").all_inner_texts()[-2:]
    assert [caption[-8:] for caption in captions] == ["prompt 1", "prompt 2"], "their seeds may be the same"
    page.locator("#tiles .open").last.click()
    assert "another boat" in page.locator("#facts .said").inner_text()
    second.get_by_role("button", name="Remove prompt 2").click()
    assert page.locator(".prompt").count() == 1


def copied(page: Page, kind: str) -> str:
    page.evaluate("navigator.clipboard.writeText('')")
    page.locator(f"[data-copy={kind}]").click()
    text = page.wait_for_function("() => navigator.clipboard.readText()").json_value()
    assert page.get_by_role("status").inner_text() == f"Copied as {kind}"
    return str(text)


AWKWARD = """it's "quoted", `ticked` $HOME \\ \\" '''three''' \"\"\"six\"\"\" \\u0022 é 🛶"""


def test_what_is_copied_runs_and_means_the_same(page: Page) -> None:
    field(page, "prompt").fill(AWKWARD)
    field(page, "seed").fill(str(2**64 - 1))
    request = json.loads(copied(page, "JSON"))["input"]
    assert (request["prompts"][0]["prompt"], request["prompts"][0]["seed"]) == (AWKWARD, 2**64 - 1)
    assert request["loras"] == [lora | {"network_multiplier": 1} for lora in EXAMPLE["loras"]]
    curl = subprocess.run(["bash", "-c", copied(page, "curl")], capture_output=True, text=True, check=True).stdout
    script = [sys.executable, "-c", copied(page, "Python").replace("print(response.json())", "print(response.text)")]
    python = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    for answer in (curl, python):
        result = json.loads(answer)["output"]
        assert (result["settings"]["prompts"][0]["prompt"], result["settings"]["prompts"][0]["seed"]) == (AWKWARD, 2**64 - 1)


def test_for_an_endpoint_the_copied_code_names_the_key_and_never_contains_it(open_page: Open, tmp_path: Path) -> None:
    client = Client.endpoint("ep", "rpa_SECRET0123456789", base_url="https://api.runpod.ai/v2", patience=0)
    with serving(client, tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        texts = [copied(page, kind) for kind in ("curl", "Python", "JSON")]
        assert "RunPod" in page.locator("#target").inner_text() and "endpoint ep" in page.locator("#target").inner_text()
        assert "rpa_SECRET" not in page.content() + "".join(texts)
    assert '-H "Authorization: Bearer $RUNPOD_API_KEY"' in texts[0] and "https://api.runpod.ai/v2/ep/run" in texts[0]
    assert "os.environ['RUNPOD_API_KEY']" in texts[1]
    compile(texts[1], "copied", "exec")


def test_what_was_typed_is_there_when_the_page_is_loaded_again_but_no_token(page: Page) -> None:
    field(page, "prompt").fill("a kept prompt")
    field(page, "seed").fill(str(2**64 - 1))
    page.locator("#fields > .fold > summary").click()
    field(page, "hf_token").fill("hf_secret")
    page.wait_for_function("() => JSON.stringify(localStorage).includes('a kept prompt')")
    assert "hf_secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert (field(page, "prompt").input_value(), field(page, "seed").input_value()) == ("a kept prompt", str(2**64 - 1))


def test_another_model_and_back_keeps_the_loras(free: Page) -> None:
    field(free, "model").select_option("wan21_1b")
    free.locator("[name=path]").fill("mine.safetensors")
    field(free, "model").select_option("wan22_14b_t2v")
    assert free.locator("[name=path]").first.input_value() == LORA.format("high")
    field(free, "model").select_option("wan21_1b")
    assert free.locator("[name=path]").input_value() == "mine.safetensors"


def test_a_size_is_a_chip_and_an_image_gives_one_of_its_own(free: Page, tmp_path: Path) -> None:
    free.get_by_role("button", name="480 × 832").click()
    assert (field(free, "width").input_value(), field(free, "height").input_value()) == ("480", "832")
    assert free.get_by_role("button", name="480 × 832").get_attribute("aria-pressed") == "true"
    field(free, "model").select_option("wan21_i2v_14b480p")
    assert not free.get_by_role("button", name="Match image").is_visible()
    picture = tmp_path / "wide.png"
    Image.new("RGB", (400, 100), "teal").save(picture)
    drop(free, ".field.image .zone", picture, "image/png")
    free.get_by_role("button", name="Match image").click()
    assert (field(free, "width").input_value(), field(free, "height").input_value()) == ("1264", "320")


def test_a_request_can_be_pasted_and_dropped(free: Page, tmp_path: Path) -> None:
    job = {"input": EXAMPLE | {"prompts": [EXAMPLE["prompts"][0] | {"prompt": "pasted", "seed": 2**60 + 1}]}}
    free.evaluate(
        """text => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text/plain", text);
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
        }""",
        json.dumps(job),
    )
    assert (field(free, "prompt").input_value(), field(free, "seed").input_value()) == ("pasted", str(2**60 + 1))
    (tmp_path / "request.json").write_text(json.dumps(EXAMPLE))
    drop(free, "#fields", tmp_path / "request.json", "application/json")
    free.wait_for_function("() => document.querySelector('[name=prompt]').value === '[trigger] a boat'")


def test_more_loras_are_rows_with_a_side_and_a_scale(page: Page) -> None:
    page.get_by_role("button", name="Add a LoRA").click()
    page.keyboard.type("style.safetensors")
    row = page.locator(".lora.extra")
    row.locator("[name=transformer]").select_option("low")
    row.locator("[type=range]").fill("0.5")
    assert row.locator("[name=network_multiplier]").input_value() == "0.5"
    row.locator("[name=network_multiplier]").press("ArrowUp")
    assert row.locator("[type=range]").input_value() == "0.6"
    extra = {"path": "style.safetensors", "transformer": "low", "network_multiplier": 0.6}
    assert json.loads(copied(page, "JSON"))["input"]["extra_loras"] == [extra]
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert json.loads(copied(page, "JSON"))["input"]["extra_loras"] == [extra], "they are kept as what was typed"
    page.keyboard.press("Control+Enter")
    page.locator(".code", has_text="LORA_NOT_FOUND").wait_for()
    row.locator("[name=path][aria-invalid]:focus").wait_for()
    row.get_by_role("button", name="Remove this LoRA").press("Enter")
    assert page.evaluate("document.activeElement.name") == "extra_loras"
    assert "extra_loras" not in copied(page, "JSON")


def test_how_the_training_ran_can_be_said_for_a_preview(page: Page) -> None:
    training = page.get_by_role("group", name="How the training ran")
    page.locator("#fields > .fold > summary").click()
    assert not training.is_visible()
    field(page, "match").select_option("preview")
    training.wait_for()
    assert page.evaluate("document.documentElement.scrollHeight") == 900, "the form scrolls, not the page"
    training.get_by_label("Low VRAM").select_option("no")
    training.get_by_label("Format, qtype").fill("fp4")
    assert json.loads(copied(page, "JSON"))["input"]["trained_with"] == {"qtype": "fp4", "low_vram": False}
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[name=qtype][aria-invalid]:focus")
    training.get_by_label("Format, qtype").fill("")
    training.get_by_label("Low VRAM").select_option("not known")
    assert "trained_with" not in copied(page, "JSON")


def test_a_model_with_one_transformer_has_no_sides_to_choose(free: Page) -> None:
    free.get_by_role("button", name="Add a LoRA").click()
    free.keyboard.type("style.safetensors")
    field(free, "model").select_option("wan21_1b")
    assert free.get_by_label("Extra LoRA", exact=True).get_by_role("textbox", name="Extra LoRA").first.is_visible()
    assert json.loads(copied(free, "JSON"))["input"]["extra_loras"] == [{"path": "style.safetensors", "network_multiplier": 1}]
    free.locator("#fields > .fold > summary").click()
    assert not field(free, "guidance_scale_2").is_visible()


def test_a_last_image_and_the_fit_are_there_for_the_model_that_takes_them(free: Page, tmp_path: Path) -> None:
    last, fit = free.locator("[data-field=last_img]"), free.get_by_role("group", name="Fit of the image")
    field(free, "model").select_option("wan21_i2v_14b")
    assert not last.is_visible() and not fit.is_visible()
    field(free, "model").select_option("wan22_14b_i2v")
    picture = tmp_path / "last.png"
    Image.new("RGB", (64, 48), "navy").save(picture)
    drop(free, "[data-field=last_img] .zone", picture, "image/png")
    last.locator("img[src^='data:image/png']").wait_for()
    fit.get_by_role("button", name="Crop").click()
    assert fit.get_by_role("button", name="Crop").get_attribute("aria-pressed") == "true"
    prompt = json.loads(copied(free, "JSON"))["input"]["prompts"][0]
    assert (prompt["last_img"][:15], prompt["image_fit"]) == ("data:image/png;", "crop")
    field(free, "model").select_option("wan22_14b_t2v")
    assert {"last_img", "image_fit"}.isdisjoint(json.loads(copied(free, "JSON"))["input"]["prompts"][0])


def test_several_videos_of_a_prompt_have_a_tile_each(page: Page) -> None:
    before = page.locator("#tiles .pick").count()
    run(page, seed="7", num_videos="2")
    names = [box.get_attribute("aria-label") or "" for box in page.locator("#tiles .pick input").all()[before:]]
    assert [name.split(", ")[1] for name in names] == ["seed 7", "seed 8"]
    page.locator("#tiles .open").last.click()
    page.get_by_role("button", name="Use its settings").click()
    assert (field(page, "seed").input_value(), field(page, "num_videos").input_value()) == ("8", "1")


def test_four_variations_have_the_seeds_after_the_first(page: Page) -> None:
    before = page.locator("#tiles .pick").count()
    field(page, "seed").fill("7")
    page.get_by_role("button", name="Vary × 4").click()
    page.wait_for_function("count => document.querySelectorAll('#tiles .pick').length === count", arg=before + 4)
    captions = page.locator("#tiles .caption").all()[-4:]
    assert all(caption.inner_text().endswith(f"seed {seed}") for caption, seed in zip(captions, (7, 8, 9, 10), strict=True))


def test_a_seed_that_is_not_kept_is_drawn_for_every_run(page: Page) -> None:
    field(page, "seed").fill("7")
    page.get_by_role("button", name="Keep").click()
    run(page)
    assert field(page, "seed").input_value() != "7"


def test_a_tile_says_what_changed_and_a_run_can_be_deleted(page: Page) -> None:
    run(page)
    run(page, sample_steps="3")
    assert "steps 3" in page.locator("#tiles .caption").last.inner_text()
    count = page.locator("#tiles li").count()
    page.get_by_role("button", name="Delete").press("Enter")
    assert page.get_by_role("status").inner_text() == "Really delete? Press again, or Escape"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete", exact=True).press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_function("count => document.querySelectorAll('#tiles li').length === count", arg=count - 1)
    page.wait_for_selector("#facts h2")


def test_words_that_differ_are_marked_whole(page: Page) -> None:
    marked = page.evaluate("""async () => {
        const { twoValues } = await import("/static/words.js");
        const lines = twoValues("a red boat sails", "a redder boat sails left");
        return lines.map((line) => [...line.querySelectorAll("mark")].map((mark) => mark.textContent));
    }""")
    assert marked == [["red"], ["redder", "left"]]


def test_the_price_of_an_hour_gives_that_of_the_run(page: Page) -> None:
    run(page)
    page.get_by_label("$ per hour").fill("3600")
    total = float(page.locator(".timings dd").last.inner_text())
    assert abs(float(page.locator(".cost .sum").inner_text().removeprefix("$")) - total) < 0.06


def test_a_trainings_folder_fills_the_form_and_its_sample_is_compared(
    open_page: Open, playground: Server, tiny: Path, tmp_path: Path
) -> None:
    page = open_page()
    run(page, seed="3")
    folder = tmp_path / "wan22_14b_t2v"
    (folder / "samples").mkdir(parents=True)
    for side in ("high", "low"):
        shutil.copy(tiny / "loras" / LORA.format(side), folder)
    sample = {"prompt": "[trigger] a boat", "width": 96, "height": 64, "num_frames": 5, "sample_steps": 2, "fps": 5, "seed": 3}
    process = {
        "type": "diffusion_trainer",
        "trigger_word": "sks",
        "train": {"steps": 20, "dtype": "float32"},
        "save": {"dtype": "float32"},
        "model": {"arch": "wan22_14b:t2v", "name_or_path": "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16"},
        "sample": {"samples": [sample]},
    }
    (folder / "config.yaml").write_text(json.dumps({"config": {"name": "wan22_14b_t2v", "process": [process]}}))
    frames = read_clip(media(page, playground, tmp_path)).frames
    encode([frames], folder / "samples/1764000000__000000020_0.webp", VIDEO["webp"], 5, len(frames))
    page.get_by_role("button", name="Open a training folder").focus()
    page.locator(".training input[type=file]").set_input_files(folder / "samples")
    page.locator(".training .error", has_text="has no config.yaml").wait_for()
    assert focused(page) == "Open a training folder"
    page.locator(".training input[type=file]").set_input_files(folder)
    page.locator(".training.found", has_text="Trigger word sks").wait_for()
    assert focused(page) == "training-step"
    assert (field(page, "match").input_value(), field(page, "prompt").input_value()) == ("preview", "sks a boat")
    page.get_by_role("tab", name="JSON").focus()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".comparison .curve .dot")
    assert focused(page) == "stage", "the tabs are gone"
    assert page.locator("figcaption").first.inner_text() == "1764000000__000000020_0.webp"
    divider = page.get_by_label("Divider")
    divider.focus()
    page.keyboard.press("Home")
    assert page.locator(".panes").evaluate("panes => panes.style.getPropertyValue('--divide')") == "0%"
    page.get_by_role("button", name="Side by side").click()
    assert not divider.is_visible() and page.locator(".panes canvas:visible").count() == 3


def test_a_sweep_plays_in_step_and_its_best_cell_fills_the_form(page: Page, playground: Server) -> None:
    page.get_by_role("button", name="Sweep", exact=True).press("Enter")
    assert page.evaluate("document.activeElement.innerText") == "Plan a sweep"
    page.get_by_label("Scales", exact=True).fill("0, half")
    page.locator("#sweep-scales-error").get_by_text("must be numbers").wait_for()
    page.get_by_label("Scales", exact=True).fill("0, 1")
    page.get_by_label("Seeds").fill("7 8")
    page.get_by_role("button", name="Make 4 videos").wait_for()
    assert axe(page) == []
    page.get_by_role("button", name="Make 4 videos").press("Enter")
    page.get_by_text("4 of 4 videos.", exact=True).wait_for()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    pictures = "() => [...document.querySelectorAll('.open-cell canvas:not([hidden])')].map(canvas => canvas.toDataURL())"
    page.wait_for_function(f"() => ({pictures})().length === 4")
    position = page.get_by_role("slider", name="Frame")
    position.press("End")
    page.locator(".frame", has_text="Frame 5 of 5").wait_for()
    last = page.evaluate(pictures)
    assert len(set(last)) == 4, "without the LoRA, with it, and with each seed"
    position.press("Home")
    page.locator(".frame", has_text="Frame 1 of 5").wait_for()
    page.wait_for_function(f"last => !({pictures})().some(picture => last.includes(picture))", arg=last)  # all, together
    for colours, rules in (("light", []), ("dark", ["color-contrast"])):
        page.emulate_media(color_scheme=colours)
        assert axe(page, *rules) == []
    cell = page.get_by_role("button", name="Open seed 7, scale 0", exact=True)
    cell.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#facts", has_text="seed 8, scale 1").wait_for()
    page.get_by_role("button", name="Use its settings").click()
    assert (field(page, "seed").input_value(), field(page, "network_multiplier").input_value()) == ("8", "1")
    page.get_by_role("button", name="Back to sweep 1").press("Enter")
    assert focused(page) == "Open seed 8, scale 1", "the cell that was opened"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Back to sweep 1").focus()
    page.keyboard.press("Escape")
    assert focused(page) == "Open seed 8, scale 1"
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_label("Compare seed 8, scale 0").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for name in ("seed 7, scale 0", "seed 8, scale 1"):
        page.get_by_label(f"Compare {name}").press("Space")
    page.get_by_role("button", name="Back to the sweep").focus()
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Sweep 1").wait_for()
    drawing: list[Route] = []
    page.route("**/grid", lambda route: drawing.append(route))
    with page.expect_request("**/grid"):
        page.reload()
    page.get_by_role("button", name="Delete").click()
    drawing[0].continue_()
    page.get_by_role("link", name="Download the grid").wait_for()
    page.get_by_role("button", name="Really delete").click()
    page.locator("[data-sweep]").wait_for(state="detached")


def test_a_cell_keeps_its_button_while_its_run_goes_on_and_trouble_is_announced_once(
    open_page: Open, cloud: FakeCloud, tmp_path: Path
) -> None:
    update = {"stage": "denoise", "prompt_index": 0, "prompts": 1, "step": 1, "steps": 4, "percent": 25, "seconds_left": 3.0}
    cloud.answer = {"status": "IN_PROGRESS", "output": update, "workers": {"running": 1}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        page.get_by_role("button", name="Sweep", exact=True).press("Enter")
        page.get_by_label("Scales", exact=True).fill("0, 0.4, 0.8, 1.2")
        page.get_by_label("Seeds").fill("7 8")
        page.get_by_role("button", name="Make 8 videos").press("Enter")
        cell = page.locator("button.state", has_text="25%").first
        cell.focus()
        page.evaluate("""() => {
            Object.assign(window, {cell: document.activeElement, announced: 0, moved: 0});
            document.addEventListener("focusin", () => moved++);
            new MutationObserver(() => announced++).observe(document.querySelector("#screen .trouble"), {childList: true});
        }""")
        cloud.answer["output"] = update | {"step": 2, "percent": 50}
        page.locator("button.state", has_text="50%").first.wait_for()
        assert page.evaluate("document.activeElement === cell && !moved")
        cloud.status = 503
        page.locator("#screen .trouble", has_text="The sweep goes on when a worker answers.").wait_for()
        for _ in range(2):
            with page.expect_response("**/api/sweeps/1"):
                pass
        assert page.evaluate("[document.activeElement === cell, moved, announced]") == [True, 0, 1]
        page.set_viewport_size({"width": 820, "height": 900})
        cloud.status, cloud.answer = 200, {"status": "FAILED", "error": "OUT_OF_MEMORY: the GPU's memory is full " * 3}
        again = page.get_by_role("button", name="Make again").first
        again.wait_for()
        inside = "button => button.getBoundingClientRect().bottom <= button.closest('.cell').getBoundingClientRect().bottom"
        assert again.evaluate(inside), "also of a small cell, the buttons are seen"


def test_a_run_that_fails_does_not_take_the_focus_from_who_types_on(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.answer = {"status": "IN_PROGRESS", "workers": {"running": 1}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        field(page, "prompt").focus()
        page.keyboard.press("Control+Enter")
        page.locator(".making").wait_for()
        page.get_by_role("status").filter(has_text="Run 1 is waiting").wait_for()
        page.get_by_role("button", name="Keep").press("Enter")
        for _ in range(2):
            with page.expect_response("**/progress"):
                pass
        assert page.get_by_role("status").inner_text() == "Every run draws another seed", "until the progress is another"
        field(page, "prompt").focus()
        page.keyboard.type("the next one")
        cloud.answer["status"], cloud.answer["error"] = "FAILED", "LORA_NOT_FOUND: `loras[0].path`: there is no such file"
        page.locator(".failed .big").wait_for()
        page.locator("[name=path][aria-invalid]").wait_for()
        assert focused(page) == "prompt"
        page.get_by_role("button", name="Correct the request").press("Enter")
        assert focused(page) == "path"


def test_escape_closes_the_plan_of_a_sweep(free: Page) -> None:
    free.get_by_role("button", name="Sweep", exact=True).press("Enter")
    free.get_by_label("Seeds").focus()
    free.keyboard.press("Escape")
    free.get_by_text("Your video plays here").wait_for()
    assert focused(free) == "sweep"


def test_without_its_process_the_page_says_so_once_and_goes_on_later(open_page: Open, cloud: FakeCloud, tmp_path: Path) -> None:
    gone = {"error": "the playground's process does not answer", "again": True}
    cloud.answer = {"status": "IN_PROGRESS", "workers": {"running": 1}}
    with serving(Client.local(cloud.base, patience=0), tmp_path, example=EXAMPLE) as server:
        page = open_page(server)
        page.keyboard.press("Control+Enter")
        page.locator(".making").wait_for()
        page.route("**/api/jobs/1/progress", lambda route: route.fulfill(status=502, json=gone))
        page.locator("#screen .trouble").evaluate("banner => (window.banner = banner)")
        with page.expect_response("**/api/jobs/1/progress"):
            pass
        with page.expect_request("**/api/worker"):  # after the answer was taken
            pass
        assert page.locator("#screen .trouble").evaluate("banner => banner === window.banner")
        page.route("**/api/config", lambda route: route.fulfill(status=502, json=gone))
        page.reload()
        retry = page.get_by_role("button", name="Try again")
        retry.evaluate("button => (button.id = 'first')")
        retry.press("Enter")
        page.locator("#first").wait_for(state="detached")  # it has failed again
        page.unroute("**/api/config")
        page.unroute("**/api/jobs/1/progress")
        retry.press("Enter")
        page.wait_for_selector("body[data-ready]")
        assert focused(page) == "stage"
        page.get_by_role("button", name="Colours: auto").press("Enter")
        assert page.get_by_role("button", name="Colours: light").count() == 1, "one step at a press, also after a second start"


def test_a_start_that_is_under_way_is_not_made_twice(open_page: Open, playground: Server) -> None:
    page = open_page(playground)
    page.route("**/api/config", lambda route: route.fulfill(status=502, json={"error": "it is gone", "again": True}))
    page.reload()
    retry = page.get_by_role("button", name="Try again")
    retry.wait_for()
    page.unroute("**/api/config")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    retry.evaluate("button => (button.click(), button.click())")
    page.wait_for_selector("body[data-ready]")
    assert sum(url.endswith("/api/config") for url in asked) == 1


def media(page: Page, playground: Server, folder: Path) -> Path:
    """The video that the page shows, as a file."""
    (folder / "shown.mp4").write_bytes(playground.get(str(page.locator("video.made").get_attribute("src"))).content)
    return folder / "shown.mp4"


def test_markup_in_what_comes_back_stays_text(page: Page) -> None:
    field(page, "prompt").fill("<img src=x onerror=alert(1)><b>bold</b>")
    run(page)
    assert "<img src=x onerror=alert(1)>" in page.locator("#facts .said").inner_text()
    assert page.locator("#facts b, #facts img").count() == 0


def test_without_a_worker_the_page_says_so_beside_run(free: Page) -> None:
    assert "No answer" in free.locator("#target").inner_text()
    free.keyboard.press("Control+Enter")
    free.locator("#not-sent").get_by_text("No job was started: no worker answers at").wait_for()
    with free.expect_response("**/api/jobs") as again:
        free.get_by_role("button", name="Run", exact=True).click()
    assert again.value.status == 502


def test_every_kind_of_result_is_shown(page: Page) -> None:
    page.locator("#fields > .fold > summary").click()
    page.get_by_label("Contact sheet").check()
    for kind, frames, shown in (("png", "5", "video"), ("webp", "5", "img"), ("mp4", "1", "img")):
        field(page, "output_format").select_option(kind)
        run(page, num_frames=frames)
        page.wait_for_function(
            "() => { const made = document.querySelector('.made'); return made.videoWidth || made.naturalWidth }"
        )
        assert page.locator(".made").evaluate("made => made.localName") == shown
        sheet = page.get_by_role("link", name="Contact sheet").locator("img")
        assert sheet.count() == (0 if frames == "1" else 1), "an image needs no picture of itself"
        if frames != "1":
            page.wait_for_function("() => document.querySelector('.sheet img').naturalWidth > 96")


def test_the_settings_of_a_run_can_be_used_in_the_form(page: Page) -> None:
    run(page, seed="-1", prompt="a drawn seed")
    drawn = page.locator("#facts dl div", has_text="Seed").locator("dd").inner_text()
    field(page, "prompt").fill("something else")
    page.get_by_role("button", name="Use its settings").click()
    assert (field(page, "prompt").input_value(), field(page, "seed").input_value()) == ("a drawn seed", drawn)


def test_with_reduced_motion_the_video_does_not_start_by_itself(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    run(page)
    page.wait_for_function("() => document.querySelector('video.made').readyState >= 2")
    assert page.locator("video.made").evaluate("video => [video.paused, video.currentTime]") == [True, 0]


def test_a_phone_shows_all_of_it_in_one_column(open_page: Open) -> None:
    page = open_page(width=375, height=812, is_mobile=True, has_touch=True)
    run(page, tap=True, sample_steps="3")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert in_view(page, "video.made"), "the video is what one sees then"
    page.locator("#tiles .open:has(+ .pick)").first.tap()
    assert in_view(page, "video.made"), "and after a run was opened from the strip"
    form, stage, strip = (page.locator(part).bounding_box() or {} for part in ("form", "#stage", "#strip"))
    assert form["y"] < stage["y"] < strip["y"] and form["width"] == stage["width"] == 375
    buttons = page.locator("button:visible:not(.open):not(.link), input:visible:not([type=checkbox], [type=file])").all()
    assert all((button.bounding_box() or {})["height"] >= 44 for button in buttons)
    assert axe(page) == []


def in_view(page: Page, selector: str) -> bool:
    box = page.locator(selector).bounding_box() or {}
    return box["y"] >= 0 and box["y"] + box["height"] <= 812


@pytest.mark.parametrize(("colours", "rules"), [("light", []), ("dark", ["color-contrast"])], ids=["light", "dark"])
def test_axe_finds_nothing(open_page: Open, colours: str, rules: list[str]) -> None:
    page = open_page(color_scheme=colours)
    page.get_by_role("button", name="Add a LoRA").click()
    field(page, "width").fill("20")
    for fold in page.locator("#fields details > summary").all():
        fold.click()
    page.keyboard.press("Control+Enter")
    page.get_by_role("heading", name="One problem to correct").wait_for()
    assert axe(page, *rules) == []
    run(page, width="96")
    page.wait_for_function("() => document.querySelector('video.made').readyState >= 2")
    assert axe(page, *rules) == []
    for box in page.locator(".pick input").all()[-2:]:
        box.check()
    page.wait_for_selector(".curve .dot")
    assert axe(page, *rules) == []


def test_everything_can_be_reached_with_the_keyboard(page: Page) -> None:
    run(page)
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.name || document.activeElement.innerText || document.activeElement.tagName")
        )
    wanted = {
        "path",
        "prompt",
        "seed",
        "Add a prompt",
        "curl",
        "Compare with a sample",
        "Use its settings",
        "Download",
    }
    assert wanted <= reached
    assert page.locator("#run").evaluate("run => { run.focus(); return getComputedStyle(run).outlineStyle }") == "solid"


@pytest.mark.parametrize("width", [820, 1440])
def test_no_edge_cuts_the_outline_of_the_focus_off(page: Page, width: int) -> None:
    run(page)
    page.set_viewport_size({"width": width, "height": 900})
    page.get_by_role("tab", name="JSON").click()
    cut = """() => [...document.querySelectorAll("#stage :is(button, a, pre)")].filter((element) => {
        if (element.tabIndex < 0 || !element.checkVisibility()) return false;
        element.focus({focusVisible: true});
        const style = getComputedStyle(element);
        const out = parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset);
        const [{left, right}, around] = [element, element.closest("#screen, #facts")].map((one) => one.getBoundingClientRect());
        return left - out < around.left || right + out > around.right;
    }).map((element) => element.innerText)"""
    assert page.evaluate(cut) == []
    page.get_by_role("button", name="Sweep", exact=True).press("Enter")
    page.get_by_role("button", name="Close").wait_for()
    assert page.evaluate(cut) == []
