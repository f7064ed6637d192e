"""The weights are read while Python imports."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pipelines import host_memory
from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from worker.startup import prefetch


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, int]]:
    """(file, position, bytes) of each piece that was read; 0 bytes at a file's end."""
    pieces: list[tuple[Path, int, int]] = []
    send = os.sendfile

    def sendfile(target: int, source: int, position: int, count: int) -> int:
        sent = send(target, source, position, count)
        pieces.append((Path(f"/proc/self/fd/{source}").readlink(), position, sent))
        return sent

    monkeypatch.setattr(os, "sendfile", sendfile)
    return pieces


def ended(sent: list[tuple[Path, int, int]]) -> list[str]:
    """The files that were read to their end, as `folder/name`."""
    return ["/".join(file.parts[-2:]) for file, _, count in sent if count == 0]


def read_weights(checkpoints: Path, model_id: str = "wan21_1b") -> None:
    before = threading.enumerate()
    prefetch.read_weights(MODELS[model_id], checkpoints)
    for thread in set(threading.enumerate()) - set(before):
        thread.join()


def test_all_weights_of_the_model_are_read_and_nothing_else(tiny: Path, sent: list[tuple[Path, int, int]]) -> None:
    read_weights(tiny, "wan22_14b_t2v")
    name = "diffusion_pytorch_model.safetensors"
    parts = {"text_encoder/model.safetensors", f"vae/{name}", f"transformer/{name}", f"transformer_2/{name}"}
    read = ended(sent)
    assert (set(read), len(read)) == (parts, len(parts))


def test_a_file_is_read_in_pieces_each_byte_once(
    tiny: Path, sent: list[tuple[Path, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_BYTES_PER_PIECE", 10_000)
    read_weights(tiny)
    for file in prefetch._weights(Checkpoints(MODELS["wan21_1b"], tiny)):
        of_this = sorted((begin, count) for path, begin, count in sent if count and path == file.resolve())
        ends = [0, *(begin + count for begin, count in of_this)]
        assert [begin for begin, _ in of_this] == ends[:-1] and ends[-1] == file.stat().st_size
        assert len(of_this) >= file.stat().st_size / 10_000 > 0


def test_no_more_is_read_than_fits_into_half_of_the_memory(
    tiny: Path, sent: list[tuple[Path, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(prefetch._weights(Checkpoints(MODELS["wan21_1b"], tiny)))
    monkeypatch.setattr(prefetch, "available", lambda: 2 * first.stat().st_size)
    read_weights(tiny)
    assert ended(sent) == ["/".join(first.parts[-2:])]


def test_of_a_file_that_is_larger_than_that_the_first_pieces_are_read(
    tiny: Path, sent: list[tuple[Path, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_BYTES_PER_PIECE", 10_000)
    monkeypatch.setattr(prefetch, "available", lambda: 50_000)
    assert next(prefetch._weights(Checkpoints(MODELS["wan21_1b"], tiny))).stat().st_size > 25_000
    read_weights(tiny)
    assert {position for _, position, _ in sent} == {0, 10_000}


def test_checkpoints_that_are_missing_or_damaged_are_left_to_the_load(
    tmp_path: Path, sent: list[tuple[Path, int, int]]
) -> None:
    index = tmp_path / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{")
    read_weights(tmp_path)
    assert sent == []


def test_the_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, limit, no_limit = tmp_path / "meminfo", tmp_path / "limit", tmp_path / "max"
    machine.write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    limit.write_text("1000000\n")
    no_limit.write_text("max\n")
    monkeypatch.setattr(host_memory, "_MACHINE", machine)
    monkeypatch.setattr(host_memory, "_CONTAINER", [no_limit, tmp_path / "nowhere"])
    assert host_memory.available() == 4000 * 1024
    monkeypatch.setattr(host_memory, "_CONTAINER", [limit])
    assert host_memory.available() == 1000000
    monkeypatch.setattr(host_memory, "_MACHINE", tmp_path / "nowhere")
    monkeypatch.setattr(host_memory, "_CONTAINER", [])
    assert host_memory.available() == 0
