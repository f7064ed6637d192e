"""The house rules that can be checked: imports go one way, and what checks a job does not wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker_process import ROOT

VOCABULARY = {"pipelines.catalog", "pipelines.checkpoints", "pipelines.errors", "pipelines.lora_file", "pipelines.recipes"}
"""Modules of pipelines/ that import no torch; the worker's modules may speak of what is in them."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.name)
def test_the_pipelines_know_nothing_of_the_worker(path: Path) -> None:
    known = {name.partition(".")[0] for name in imports_of(path)}
    assert known.isdisjoint({"worker", "handler", "runpod", "requests", "boto3", "builder"})


@pytest.mark.parametrize("path", sorted((ROOT / "worker").glob("*.py")), ids=lambda path: path.name)
def test_only_the_job_touches_both_sides(path: Path) -> None:
    known = {name for name in imports_of(path) if name.partition(".")[0] in ("pipelines", "torch", "diffusers", "transformers")}
    assert known <= VOCABULARY or path.name == "job.py"


def test_what_checks_a_job_needs_no_torch() -> None:
    modules = [path.stem for path in (ROOT / "worker").glob("*.py") if path.stem not in ("job", "__init__")]
    code = f"import sys, {', '.join(f'worker.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
