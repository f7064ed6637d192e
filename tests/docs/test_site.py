"""The documentation as a site: every link in it leads somewhere, and it loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from docs import hooks
from tests.worker_process import ROOT


def build(target: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_the_documentation_is_on_the_site(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs").with_suffix("") for page in (ROOT / "docs").glob("**/*.md")]
    wanted = [page.parent / "index.html" if page.name == "index" else page / "index.html" for page in pages]
    assert [str(page) for page in wanted if not (site / page).is_file()] == []
    assert (site / "request.schema.json").read_text() == (ROOT / "docs/request.schema.json").read_text()


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"' >]+)"
        r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*\bhref=[\"']?((?:https?:)?//[^\"' >]+)"
        r"|url\([\"']?((?:https?:)?//[^\"')]+)|@import"
    )
    found = {
        f"{page.relative_to(site)}: {match[0]}"
        for pattern in ("**/*.html", "**/*.css", "**/*.svg")
        for page in site.glob(pattern)
        for match in loaded.finditer(page.read_text())
    }
    assert found == set()


def test_no_code_of_the_project_is_on_the_site(site: Path) -> None:
    assert [path.name for path in site.glob("**/*") if path.suffix in (".py", ".pyc")] == []


@pytest.mark.parametrize(
    ("page", "link", "repository", "shown"),
    [
        ("deploy.md", "[first](../README.md)", "", "[first](index.md)"),
        ("models/wan21_1b.md", "[first](../../README.md)", "", "[first](../index.md)"),
        ("deploy.md", "[the job](../worker/job.py)", "", "the job"),
        (
            "deploy.md",
            "[the job](../worker/job.py)",
            "https://host/me/it",
            "[the job](https://host/me/it/blob/main/worker/job.py)",
        ),
        ("deploy.md", "[the job](../worker/jobs.py)", "", "[the job](../worker/jobs.py)"),  # the strict build refuses it
        ("models/wan21_1b.md", "[api](../api.md#errors)", "", "[api](../api.md#errors)"),
    ],
)
def test_a_link_out_of_the_documentation_leads_to_the_page_that_says_the_same(
    page: str, link: str, repository: str, shown: str
) -> None:
    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(link, file, {"extra": {"repository": repository}}) == shown


def test_a_page_in_no_menu_a_menu_without_its_page_and_a_link_to_nowhere_end_the_build(tmp_path: Path) -> None:
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().replace("\nnav:\n", "\nnav:\n  - Gone: gone.md\n"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs/lost.md").write_text("# Lost\n\n[nowhere](api.md#no-such-heading)\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode == 1
    assert all(name in done.stderr for name in ("lost.md", "gone.md", "no-such-heading"))


def test_the_workflow_installs_what_builds_the_site() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["build"]["steps"] if "run" in step]
    assert commands == [
        "python -m pip install -r builder/requirements-docs.txt",
        "python -m mkdocs build --strict",
    ]
    assert "mkdocs-material==" in (ROOT / "builder/requirements-docs.txt").read_text()
