"""A model id of the catalog stands everywhere it must: one line names every place that lacks it."""

from __future__ import annotations

import re

import pytest

from pipelines.catalog import MODELS
from tests.worker_process import ROOT

LISTS = (
    "docker-bake.hcl",
    ".runpod/hub.json",
    ".github/workflows/images.yml",
    "mkdocs.yml",
    "builder/sizes.py",
    "benchmarks/real_size.py",
    "tools/requests_from_config.py",
    "README.md",
)
"""Files that name every id. README.md is written by `make docs`."""


def places_without(model_id: str) -> list[str]:
    lists = [path for path in LISTS if not re.search(rf"\b{model_id}\b", (ROOT / path).read_text())]
    files = [path for path in (f"examples/{model_id}.json", f"docs/models/{model_id}.md") if not (ROOT / path).is_file()]
    return [*lists, *files]


@pytest.mark.parametrize("model_id", MODELS)
def test_a_model_id_stands_everywhere(model_id: str) -> None:
    assert places_without(model_id) == []


def test_a_new_model_id_is_told_where_it_is_missing() -> None:
    assert places_without("wan21_14b_turbo") == [
        *LISTS,
        "examples/wan21_14b_turbo.json",
        "docs/models/wan21_14b_turbo.md",
    ]
