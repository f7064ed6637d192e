"""What a LoRA file's header tells, and that a strange header tells nothing rather than something wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from builder.tiny_checkpoints import SIZE_1B, lora_metadata, lora_tensors
from pipelines.errors import LoraInvalid
from pipelines.lora.file import LoraFile, why_unreadable
from pipelines.lora.origin import looks_trained_for
from pipelines.recipes import era_of
from pipelines.safetensors_header import MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS

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
        software(version="0.7.1\ud800"),
        software(version="0.7.1", log="x" * 10_000),
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
        ({"1_\ud800": {"\ud800": 1}}, ""),
        ({"1_a\nb": {"a\nb": 1}}, ""),
        ({f"1_{'a' * 101}": {"a" * 101: 1}}, ""),
    ],
)
def test_the_trigger_word_is_what_ai_toolkit_wrote_as_one(write: Write, tags: Any, word: str) -> None:
    assert write(ss_tag_frequency=json.dumps(tags)).trigger_word == word


STEPS = [
    *[({"step": 3000}, 3000), ({"step": 0}, 0), ({"step": -1}, None), ({"step": 2**53}, None)],
    *[({"step": True}, None), ({"step": "3"}, None), ([], None)],
]


@pytest.mark.parametrize(("info", "step"), STEPS)
def test_the_step_is_a_number_or_not_there(write: Write, info: Any, step: int | None) -> None:
    assert write(training_info=json.dumps(info)).training_step == step


def test_metadata_nested_without_end_is_no_metadata(write: Write) -> None:
    file = write(software=NESTED, ss_tag_frequency=NESTED, training_info=NESTED)
    assert (file.trainer_version, file.trigger_word, file.training_step) == ("", "", None)


def test_a_base_version_that_cannot_be_shown_is_none(write: Write) -> None:
    assert write(ss_base_model_version="wan\u202e").base_version == ""
    assert "does not know" in looks_trained_for(write(ss_base_model_version="x" * 1_000_000))


# What is no LoRA, by its first bytes


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\r\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x80\x04\x95", "pickle"),
        (b"PK\x03\x04", "pickle"),
    ],
)
def test_the_first_bytes_tell_what_is_no_lora(head: bytes, says: str) -> None:
    assert says in (why_unreadable(head) or "")


@pytest.mark.parametrize("first", [b"<", b"PK", b"\x80", b" ", b"v"])
def test_a_length_that_looks_like_something_else_is_a_length(first: bytes) -> None:
    assert why_unreadable(first.ljust(8, b"\0") + b'{"a": {"dtype"') is None


def test_bytes_that_tell_nothing_are_left_to_the_reader() -> None:
    assert why_unreadable(b"Repository not found") is None


# The header

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}


def a_file(header: Any, data: bytes = bytes(24), length: int | None = None) -> bytes:
    """`header`: what becomes JSON, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def failure(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(LoraInvalid) as caught:
        LoraFile.read(path)
    return str(caught.value)


def test_a_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(a_file(json.dumps({"b": B, "__metadata__": {"name": "ä"}, "a": A}).encode() + b"   "))
    file = LoraFile.read(path)
    assert dict(file.shapes) == {"a": (2, 2), "b": (4,)}
    assert dict(file.dtypes) == {"a": "F32", "b": "BF16"}
    assert dict(file.metadata) == {"name": "ä"}


def test_tensors_of_no_size_and_of_no_axes_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": torch.ones(()), "b": torch.ones(0, 7), "c": torch.ones(2)}))
    assert dict(LoraFile.read(path).shapes) == {"a": (), "b": (0, 7), "c": (2,)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (a_file([A]), "not in safetensors format"),
        (a_file(b"{'a': 1}"), "no JSON"),
        (a_file(b'{"a": ' + b"[" * 100_000), "no JSON"),
        (a_file(b'{"\\ud800": 1}'), "no JSON"),
        (a_file(b'{"a": NaN}'), "no JSON"),
        (a_file(b'{"a": 1' + b"0" * 5000 + b"}"), "no JSON"),
        (a_file('{"ä": 1}'.encode("latin-1")), "no JSON"),
        (a_file('{"a": 1}'.encode("utf-16")), "not in safetensors format"),
        (a_file(b'{"a": %b, "a": %b}' % (json.dumps(A).encode(), json.dumps(B).encode())), "occurs twice"),
        (a_file({"__metadata__": {"a": 1}, "a": A, "b": B}), "__metadata__"),
        (a_file({"__metadata__": ["a"], "a": A, "b": B}), "__metadata__"),
        (a_file({"a" * (MAX_NAME + 1): A, "b": B}), "name has 301 characters"),
        (a_file({"a\u202e": A, "b": B}), "cannot be shown"),
        (a_file({"a": A, "b": 5}), "`b` is not described"),
        (a_file({"a": A, "b": {"dtype": "BF16", "shape": [4]}}), "`b` is not described"),
        (a_file({"a": A, "b": B | {"offset": 0}}), "`b` is not described"),
        (a_file({"a": A, "b": B | {"dtype": "F31"}}), "`b` has a dtype"),
        (a_file({"a": A, "b": B | {"dtype": ["BF16"]}}), "`b` has a dtype"),
        (a_file({"a": A, "b": B | {"shape": 4}}), "`b` has a shape"),
        (a_file({"a": A, "b": B | {"shape": [4.0]}}), "`b` has a shape"),
        (a_file({"a": A, "b": B | {"shape": [True, 4]}}), "`b` has a shape"),
        (a_file({"a": A, "b": B | {"shape": [-4]}}), "`b` has a shape"),
        (a_file({"a": A, "b": B | {"shape": [1] * 9}}), "`b` has a shape"),
        (a_file({"a": A, "b": B | {"shape": [0, 2**63]}}), "`b` has a shape"),
        (a_file({"a": A, "b": B | {"data_offsets": [16]}}), "data_offsets"),
        (a_file({"a": A, "b": B | {"data_offsets": [16.0, 24.0]}}), "data_offsets"),
        (a_file({"a": A, "b": B | {"data_offsets": [-8, 0]}}), "data_offsets"),
        (a_file({"a": A, "b": B | {"data_offsets": [24, 16]}}), "more or fewer bytes"),
        (a_file({"a": A, "b": B | {"shape": [5]}}), "more or fewer bytes"),
        (a_file({"a": A, "b": B | {"dtype": "F4", "shape": [17]}}), "more or fewer bytes"),
        (a_file({"a": A, "b": B | {"data_offsets": [8, 16]}}), "overlap or leave gaps"),
        (a_file({"a": A, "b": B | {"data_offsets": [20, 28]}}), "overlap or leave gaps"),
        (a_file({"b": B}), "overlap or leave gaps"),
        (a_file({"a": A, "b": B}, bytes(25)), "1 bytes follow"),
        (a_file({"a": A, "b": B}, bytes(23)), "cut short"),
        (a_file({"a": A, "b": B}, b"", length=1000), "cut short"),
        (a_file({"a": A}, length=MAX_HEADER_BYTES + 1), f"{MAX_HEADER_BYTES} at most"),
        (a_file({str(number): {} for number in range(MAX_TENSORS + 1)}), f"{MAX_TENSORS} at most"),
        (a_file({"a": [[]] * 1_000_000}), "nests far more"),
    ],
)
def test_a_header_that_breaks_the_format_says_where(tmp_path: Path, content: bytes, says: str) -> None:
    text = failure(tmp_path / "a.safetensors", content)
    assert says in text
    assert text.endswith(("export the LoRA as safetensors", "upload or download it again"))


def test_a_header_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(a_file(b"{", length=99_000_000))
    os.truncate(path, 100_000_000_000)  # a hole, which takes no place on the disk
    with pytest.raises(LoraInvalid, match="its header would have 99000000 bytes"):
        LoraFile.read(path)


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        with pytest.raises(LoraInvalid, match="not a file"):
            LoraFile.read(tmp_path / f"{name}.safetensors")


def test_a_file_that_is_gone_says_so_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(LoraInvalid) as caught:
        LoraFile.read(tmp_path / "a.safetensors")
    assert str(caught.value) == "the file could not be read; send the job again"
