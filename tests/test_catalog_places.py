"""The model ids of pipelines/catalog.py, and every place that lists them by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from builder import sizes, tiny_checkpoints
from pipelines.catalog import MODELS, Source
from tests.worker_process import ROOT


def read(path: str) -> str:
    return (ROOT / path).read_text()


def bake_targets() -> list[str]:
    (models,) = (block['"MODELS"'] for block in hcl2.loads(read("docker-bake.hcl"))["variable"] if '"MODELS"' in block)
    return [model_id.strip('"') for model_id in models["default"]]


def workflow_matrix() -> list[str]:
    jobs = yaml.safe_load(read(".github/workflows/images.yml"))["jobs"]
    return jobs["baked"]["strategy"]["matrix"]["model"]


def hub() -> dict[str, Any]:
    return json.loads(read(".runpod/hub.json"))


def hub_options() -> list[str]:
    (options,) = (item["input"]["options"] for item in hub()["config"]["env"] if item["key"] == "MODEL_ID")
    return [option["value"] for option in options]


def menu() -> dict[str, str]:
    """Model id to the title of its page."""
    return {model_id: title for title, model_id in re.findall(r"- ([^:\n]+): models/(\w+)\.md", read("mkdocs.yml"))}


def files(folder: str, suffix: str) -> list[str]:
    """The names of the files, in the order of the catalog; those that it does not have come last."""
    names = {path.stem for path in (ROOT / folder).glob(f"*{suffix}")} - {"index", "README"}
    return [*(model_id for model_id in MODELS if model_id in names), *sorted(names - MODELS.keys())]


PLACES: dict[str, Callable[[], Collection[str]]] = {
    "MODELS of docker-bake.hcl": bake_targets,
    "the matrix of .github/workflows/images.yml": workflow_matrix,
    "the options of MODEL_ID in .runpod/hub.json": hub_options,
    "the presets of .runpod/hub.json": lambda: [preset["defaults"]["MODEL_ID"] for preset in hub()["config"]["presets"]],
    "the menu of mkdocs.yml": menu,
    "docs/models/*.md": lambda: files("docs/models", ".md"),
    "examples/*.json": lambda: files("examples", ".json"),
}
"""Where the ids are listed, in the order of the catalog, and how to read them there."""

NAMED_IN = ("examples/README.md", "client/training/requests.py", "playground/server.py")
"""Files that must name every id, in any order."""


def problems(ids: Collection[str]) -> list[str]:
    """Every place that does not have these ids, in one line each."""
    found = []
    for place, listed in ((place, list(read_ids())) for place, read_ids in PLACES.items()):
        found += [f"{place} lacks {model_id}" for model_id in ids if model_id not in listed]
        found += [f"{place} has {model_id}, which pipelines/catalog.py lacks" for model_id in listed if model_id not in ids]
        if sorted(listed) == sorted(ids) and listed != list(ids):
            found.append(f"{place} has another order than pipelines/catalog.py")
    for path in NAMED_IN:
        found += [f"{path} lacks {model_id}" for model_id in ids if not re.search(rf"\b{model_id}\b", read(path))]
    return found


def test_every_model_is_everywhere() -> None:
    assert not (found := problems(MODELS)), "\n".join(found)


def test_a_model_that_only_the_catalog_has_is_missed_in_every_place() -> None:
    found = [line for line in problems([*MODELS, "wan3_1b"]) if line not in problems(MODELS)]
    assert found == [f"{place} lacks wan3_1b" for place in (*PLACES, *NAMED_IN)]


def test_a_model_that_the_catalog_lost_is_found_in_every_place() -> None:
    one, *others = MODELS
    found = [line for line in problems(others) if line not in problems(MODELS)]
    assert found == [f"{place} has {one}, which pipelines/catalog.py lacks" for place in PLACES]


def test_the_hub_and_the_menu_show_the_titles_of_the_catalog() -> None:
    titles = {model_id: spec.title for model_id, spec in MODELS.items()}
    presets = {preset["defaults"]["MODEL_ID"]: preset["name"] for preset in hub()["config"]["presets"]}
    assert menu().items() <= titles.items() and presets.items() <= titles.items()


def test_sizes_and_tiny_checkpoints_of_a_new_model_come_from_its_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = MODELS["wan21_i2v_14b"]
    sources = {part: Source("org/new", source.subfolder) for part, source in known.sources.items()}
    models = {"new": replace(known, id="new", sources=sources)}
    monkeypatch.setattr(tiny_checkpoints, "MODELS", models)
    monkeypatch.setattr(sizes, "MODELS", models)
    tiny_checkpoints.write_checkpoints(tmp_path)
    assert {path.name for path in (tmp_path / "org/new").iterdir()} == {*sources, "model_index.json"}
    assert sizes.on_disk("new") > 40e9
