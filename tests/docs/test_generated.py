"""The documentation says what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.catalog import MODELS
from tests.worker_process import ROOT
from worker.parse import parse

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples/README.md"]


def test_every_generated_part_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("model_id", MODELS)
def test_every_model_has_a_page_with_a_request_for_it(model_id: str) -> None:
    page = (ROOT / f"docs/models/{model_id}.md").read_text()
    (request,) = (json.loads(block)["input"] for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    assert request["model"] == model_id


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []
    with_anchor = [(page.parent / link.partition("#")[0] if link[0] != "#" else page, link) for link in links if "#" in link]
    assert [link for target, link in with_anchor if link.partition("#")[2] not in anchors_of(target)] == []


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_test_input_json_is_valid() -> None:
    request = json.loads((ROOT / "test_input.json").read_text())["input"]
    assert parse(request, MODELS["wan22_14b_t2v"]).loras
