"""Take the pictures of docs/playground.md from the real page, before a worker with tiny checkpoints.

    python -m docs.screenshots .demo

Needs Chromium. The fonts are those of this machine.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from client import Client
from playground.__main__ import tiny_example, tiny_worker
from playground.jobs import temporary_folder
from playground.server import Playground, server

IMAGES = Path(__file__).parent / "images"
SIZE: Any = {"width": 1440, "height": 900}
_QUALITY = 80
_WITHIN = 120_000
"""Milliseconds."""


def main(tiny: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    with tiny_worker(tiny) as url, temporary_folder() as folder:
        playground = Playground(Client.local(url, patience=0), Path(folder), tiny_example(), tiny / "loras")
        with server(playground, 0) as web, sync_playwright() as playwright:
            threading.Thread(target=web.serve_forever, daemon=True).start()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            # Less motion: the video stands at its first frame, so that the pictures are the same every time.
            page = browser.new_page(viewport=SIZE, reduced_motion="reduce", color_scheme="light")
            page.set_default_timeout(_WITHIN)
            page.goto(f"http://127.0.0.1:{web.server_address[1]}/")
            page.wait_for_selector("body[data-ready]")
            for number, steps in enumerate(("8", "20", "24"), 1):
                _run(page, number, sample_steps=steps, width="136" if number == 3 else "128")
            _save(page, "light")
            page.emulate_media(color_scheme="dark")
            for box in page.locator(".pick input").all()[1:]:
                box.check()
            page.locator(".curve .dot").wait_for()
            page.get_by_role("slider", name="Frame").focus()
            page.keyboard.press("End")
            page.keyboard.press("ArrowLeft")
            page.evaluate("document.activeElement.blur()")
            _save(page, "dark")
            page.emulate_media(color_scheme="light")
            _sweep(page)
            _save(page, "sweep")
            browser.close()
            web.shutdown()


def _run(page: Page, number: int, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"[name={name}]").first.fill(value)
    page.keyboard.press("Control+Enter")
    page.locator("#stage", has=page.locator("#facts h2", has_text=f"Run {number}")).locator(".made").wait_for()


def _sweep(page: Page) -> None:
    """The two steps of the demo's LoRA at three scales, at a frame in the middle."""
    for name, value in {"sample_steps": "20", "width": "128"}.items():
        page.locator(f"[name={name}]").first.fill(value)
    page.get_by_role("button", name="Sweep", exact=True).click()
    page.get_by_label("Scales", exact=True).fill("0, 0.5, 1")
    page.get_by_role("button", name="Make 6 videos").click()
    page.get_by_text("6 of 6 videos.", exact=True).wait_for()
    page.wait_for_function("() => document.querySelectorAll('.open-cell canvas:not([hidden])').length === 6")
    page.get_by_role("slider", name="Frame").fill("8")
    page.locator(".frame", has_text="Frame 9 of 17").wait_for()


def _save(page: Page, name: str) -> None:
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # the player's controls, and the posters
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.save(IMAGES / f"playground-{name}.webp", quality=_QUALITY, method=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs.screenshots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="what `python -m builder.demo.install` wrote")
    main(parser.parse_args().checkpoints)
