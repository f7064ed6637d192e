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
from worker.request import parse

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples/README.md"]


def test_every_generated_part_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_request_in_the_documentation_is_valid(page: Path) -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)]
    requests = [block["input"] for block in blocks if "input" in block]
    for request in requests:
        assert parse(request, MODELS[request["model"]]).prompts
    assert requests or page.parent.name != "models"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    assert all((page.parent / link).exists() for link in links if not link.startswith("http"))


def test_every_command_of_the_documentation_exists() -> None:
    commands = {name for page in PAGES for name in re.findall(r"python -m ((?:tools|benchmarks)\.\w+)", page.read_text())}
    assert {"tools.inspect_lora", "tools.requests_from_config", "tools.compare"} <= commands
    for command in commands:
        done = subprocess.run([sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "usage: " in done.stdout


def test_test_input_json_is_valid() -> None:
    request = json.loads((ROOT / "test_input.json").read_text())["input"]
    assert parse(request, MODELS["wan22_14b_t2v"]).loras
