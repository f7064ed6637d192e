"""The description for RunPod's Hub fits the worker: it knows every variable, and starts with every preset."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pipelines.catalog import MODELS
from tests.worker_process import ROOT
from worker.parse import parse
from worker.settings import Settings

HUB: dict[str, Any] = json.loads((ROOT / ".runpod/hub.json").read_text())
TESTS: dict[str, Any] = json.loads((ROOT / ".runpod/tests.json").read_text())
ENVIRONMENT: dict[str, Any] = {variable["key"]: variable["input"] for variable in HUB["config"]["env"]}
KNOWN = {name.upper(): field for name, field in Settings.model_fields.items()}

BUCKET = {"BUCKET_NAME": "bucket", "BUCKET_ACCESS_KEY_ID": "id", "BUCKET_SECRET_ACCESS_KEY": "secret"}


READ_BY_RUNPOD = {"RUNPOD_INIT_TIMEOUT"}
"""Seconds after which it gives up a worker that is not ready; 7 minutes are few for a start that fetches weights."""


def as_text(value: object, key: str) -> str:
    """What RunPod sets in the worker's environment."""
    if isinstance(value, bool):
        return ENVIRONMENT[key]["trueValue" if value else "falseValue"]
    return str(value)


def settings_with(defaults: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for key, value in {**{key: item["default"] for key, item in ENVIRONMENT.items()}, **BUCKET, **defaults}.items():
        monkeypatch.setenv(key, as_text(value, key))
    return Settings()  # type: ignore[call-arg]


def test_the_description_has_what_the_hub_asks_for() -> None:
    assert {"title", "description", "type", "category", "config"} <= set(HUB)
    assert (HUB["type"], HUB["category"], HUB["config"]["runsOn"]) == ("serverless", "video", "GPU")
    assert isinstance(HUB["config"]["containerDiskInGb"], int)
    assert all(re.fullmatch(r"\d+\.\d+", version) for version in HUB["config"]["allowedCudaVersions"])


def test_every_variable_is_one_of_the_worker() -> None:
    assert set(ENVIRONMENT) <= set(KNOWN) | READ_BY_RUNPOD
    assert {variable["key"] for variable in TESTS["config"]["env"]} <= set(KNOWN)


@pytest.mark.parametrize("key", ENVIRONMENT)
def test_every_input_is_of_a_known_kind_and_its_default_an_option(key: str) -> None:
    item = ENVIRONMENT[key]
    assert {"name", "type", "description", "default"} <= set(item) and item["type"] in ("string", "number", "boolean")
    assert ("trueValue" in item and "falseValue" in item) or item["type"] != "boolean"
    values = [option["value"] for option in item.get("options", [])]
    assert item["default"] in values or not values


def test_the_options_of_a_variable_are_what_the_worker_takes() -> None:
    choices = {key: [option["value"] for option in item["options"]] for key, item in ENVIRONMENT.items() if "options" in item}
    del choices["MODEL_ID"]  # tests/test_catalog_places.py
    for key, values in choices.items():
        assert tuple(values) == KNOWN[key].annotation.__args__  # type: ignore[union-attr]


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["defaults"]["MODEL_ID"])
def test_the_worker_starts_with_a_preset_and_the_defaults(preset: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_with(preset["defaults"], monkeypatch)
    assert settings.model_id == preset["defaults"]["MODEL_ID"]
    assert str(settings.lora_dir).startswith("/runpod-volume/")


def test_the_hubs_tests_are_requests_that_the_worker_takes() -> None:
    environment = {variable["key"]: variable["value"] for variable in TESTS["config"]["env"]}
    for test in TESTS["tests"]:
        assert parse(test["input"], MODELS[environment["MODEL_ID"]]).prompts
        assert isinstance(test["timeout"], int)
