"""What the threads that fetch LoRAs share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pipelines import Adapter, load_pipeline
from pipelines.lora.file import LoraFile


def test_more_files_than_are_kept_can_be_checked_by_several_threads_at_once(tiny: Path, tmp_path: Path) -> None:
    model = load_pipeline("wan21_1b", tiny, "cpu")
    file = LoraFile.read(tiny / "loras/wan21_1b/rank16.safetensors")
    for number in range(200):
        os.link(file.path, tmp_path / f"{number}.safetensors")
    others = [replace(file, path=path) for path in tmp_path.iterdir()]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda each: model.loras.check(Adapter(each), "adapter"), others * 2))
    assert found == [found[0]] * len(found)


def test_a_file_is_known_by_its_place_and_identity(tiny: Path, tmp_path: Path) -> None:
    source = tiny / "loras/wan21_1b/rank16.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(source.read_bytes())
    first = LoraFile.read(copy)
    assert first == LoraFile.read(copy) != LoraFile.read(source)
    os.utime(copy, (1, 1))
    assert first != LoraFile.read(copy)
