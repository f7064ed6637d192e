"""The house rules that can be checked: imports go one way, and what checks a job does not wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_process import ROOT

VOCABULARY = {
    "pipelines.catalog",
    "pipelines.checkpoints",
    "pipelines.clock",
    "pipelines.errors",
    "pipelines.host_memory",
    "pipelines.lora.file",
    "pipelines.recipes",
    "pipelines.trained",
    "pipelines.weights",
}
"""Modules of pipelines/ that import no torch; the worker's modules may speak of what is in them."""

TOUCH_BOTH_SIDES = {"service.py", "job.py", "gpu.py", "cold_start.py", "load_model.py"}
"""These modules import the pipelines, and torch with them."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda path: path.name)
def test_the_pipelines_know_nothing_of_the_worker(path: Path) -> None:
    known = {name.partition(".")[0] for name in imports_of(path)}
    assert known.isdisjoint({"worker", "handler", "runpod", "requests", "boto3", "builder"})


@pytest.mark.parametrize("path", sorted((ROOT / "worker").rglob("*.py")), ids=lambda path: path.name)
def test_few_modules_touch_both_sides(path: Path) -> None:
    known = {name for name in imports_of(path) if name.partition(".")[0] in ("pipelines", "torch", "diffusers", "transformers")}
    assert known <= VOCABULARY or path.name in TOUCH_BOTH_SIDES


@pytest.mark.parametrize("path", sorted((ROOT / "client").rglob("*.py")), ids=lambda path: path.name)
def test_the_client_knows_the_schema_and_nothing_else_of_the_worker(path: Path) -> None:
    known = {
        name for name in imports_of(path) if name.partition(".")[0] in ("worker", "pipelines", "handler", "runpod", "boto3")
    }
    assert known <= {
        "worker.parse",
        "worker.request",
        "worker.errors",
        "worker.net.statuses",
        "worker.net.addresses",
        "worker.net.privates",
        "pipelines.catalog",
        "pipelines.trained",
    }


@pytest.mark.parametrize("folder", ["tools", "builder", "benchmarks", "docs"])
def test_every_command_says_by_its_help_how_it_is_called(folder: str) -> None:
    commands = [path for path in (ROOT / folder).rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    assert commands
    for path in commands:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f'"python -m {module}"' in path.read_text(), f"{module} has no parser of that name"


def test_nothing_of_the_worker_knows_the_client() -> None:
    paths = [ROOT / "handler.py", *(ROOT / "worker").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    assert not [path for path in paths for name in imports_of(path) if name.partition(".")[0] == "client"]


def test_what_checks_a_job_needs_no_torch() -> None:
    paths = [path for path in (ROOT / "worker").rglob("*.py") if path.name not in TOUCH_BOTH_SIDES]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
