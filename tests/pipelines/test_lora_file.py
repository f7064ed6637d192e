"""What a LoRA file's header tells, and that a strange header tells nothing rather than something wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builder.tiny_checkpoints import SIZE_1B, lora_metadata, lora_tensors
from pipelines.lora_file import LoraFile
from pipelines.recipes import era_of

Write = Callable[..., LoraFile]

NESTED = "[" * 100_000


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A LoRA with this metadata beside what the trainer writes."""

    def write(name: str = "lora", tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> LoraFile:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors or lora_tensors(SIZE_1B, 4, 1), path, metadata=lora_metadata(name, "wan_2.1") | metadata)
        return LoraFile.read(path)

    return write


def software(**entries: Any) -> str:
    return json.dumps({"name": "ai-toolkit"} | entries)


@pytest.mark.parametrize(
    ("versions", "era"),
    [
        (["0.9.2"], "unipc"),
        (["0.9.3"], "flowmatch"),
        (["0.10.0"], "flowmatch"),
        (["0.7.22", "0.12.26"], "flowmatch"),
        (["0.9.2-dev"], "unipc"),
    ],
)
def test_the_era_comes_from_the_newest_trainer_version(write: Write, versions: list[str], era: str) -> None:
    files = [write(f"lora{number}", software=software(version=version)) for number, version in enumerate(versions)]
    assert era_of(files)[0] == era


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "no json",
        NESTED,
        "[]",
        software(),
        software(version=None),
        software(version=["0.7"]),
        software(version="x" * 99),
        software(version="9" * 5000),
        software(name="kohya", version="0.8.1"),
    ],
)
def test_a_version_that_is_none_of_ai_toolkits_is_no_version(write: Write, entry: str) -> None:
    era, why = era_of([write(software=entry)])
    assert era == "flowmatch"
    assert "newest era" in why or "ai-toolkit 999999" in why


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ({"1_sks": {"sks": 1}}, "sks"),
        ({"1_a b": {"a b": 1}}, "a b"),
        ({"10_dir": {"1girl": 50, "boat": 3}}, ""),
        ({"1_sks": {"sks": 40}}, ""),
        ({}, ""),
        ([], ""),
    ],
)
def test_the_trigger_word_is_what_ai_toolkit_wrote_as_one(write: Write, tags: Any, word: str) -> None:
    assert write(ss_tag_frequency=json.dumps(tags)).trigger_word == word


@pytest.mark.parametrize(("info", "step"), [({"step": 3000}, 3000), ({"step": True}, None), ({"step": "3"}, None), ([], None)])
def test_the_step_is_a_number_or_not_there(write: Write, info: Any, step: int | None) -> None:
    assert write(training_info=json.dumps(info)).training_step == step


def test_metadata_nested_without_end_is_no_metadata(write: Write) -> None:
    file = write(software=NESTED, ss_tag_frequency=NESTED, training_info=NESTED)
    assert (file.trainer_version, file.trigger_word, file.training_step) == ("", "", None)
