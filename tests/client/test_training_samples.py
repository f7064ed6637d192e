"""The samples are those of the trainer's own code: SampleConfig, GenerateImageConfig and the loop of `sample()`.

The three files are taken from a real checkout; only what they import for training is replaced by empty modules.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.training.samples import resolve
from tests.conftest import REAL_TOOLKIT
from tools.cli import BadInput

pytestmark = pytest.mark.toolkit

_HEAVY = (
    "torchaudio",
    "torchao",
    "torchao.quantization",
    "torchao.quantization.quant_primitives",
    "toolkit",
    "toolkit.audio",
    "toolkit.audio.album_artwork",
    "toolkit.prompt_utils",
)


@pytest.fixture(scope="module")
def trainer() -> Any:
    """(section, trigger word) → the GenerateImageConfigs that the trainer samples with."""
    assert REAL_TOOLKIT
    modules = load_config_modules(REAL_TOOLKIT)
    inject = function_of(REAL_TOOLKIT / "toolkit/prompt_utils.py", "inject_trigger_into_prompt", {})
    names = {
        "os": os,
        "flush": lambda: None,
        "print_acc": lambda text: None,
        "GenerateImageConfig": modules.GenerateImageConfig,
        "ClipVisionAdapter": type("ClipVisionAdapter", (), {}),
        "CustomAdapter": type("CustomAdapter", (), {}),
    }
    sample = function_of(REAL_TOOLKIT / "jobs/process/BaseSDTrainProcess.py", "sample", names)

    def samples(section: dict[str, Any], trigger_word: str | None) -> list[Any]:
        taken: list[Any] = []
        section_config = modules.SampleConfig(**section)
        sd = SimpleNamespace(inject_trigger_into_prompt=inject, generate_images=lambda configs, sampler: taken.extend(configs))
        process = SimpleNamespace(
            accelerator=SimpleNamespace(is_main_process=True),
            save_root="",
            sample_config=section_config,
            first_sample_config=section_config,
            adapter_config=None,
            embedding=None,
            adapter=None,
            ema=None,
            logger=None,
            trigger_word=trigger_word,
            sd=sd,
            post_process_generate_image_config_list=lambda configs: configs,
        )
        sample(process, step=0)
        return taken

    return samples


def load_config_modules(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_modules_of_the_trainer", checkout / "toolkit/config_modules.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in _HEAVY:
            patch.setitem(sys.modules, name, MagicMock())
        spec.loader.exec_module(module)
    return module


def function_of(file: Path, name: str, names: dict[str, Any]) -> Any:
    """The function or method `name` of a file, without what the file imports."""
    [node] = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef) and node.name == name]
    namespace: dict[str, Any] = {**names, "Union": Any, "List": list}
    exec(compile(ast.Module([node], []), str(file), "exec"), namespace)
    return namespace[name]


def assert_same(section: dict[str, Any], trigger_word: str | None, trainer: Any) -> None:
    try:
        theirs = trainer(section, trigger_word)
    except ValueError:  # a flag without a number
        with pytest.raises(BadInput):
            resolve(section, trigger_word)
        return
    ours = resolve(section, trigger_word)
    assert [
        (s.prompt, s.width, s.height, s.sample_steps, s.guidance_scale, s.num_frames, s.fps, s.ctrl_img, s.seed, s.neg)
        for s in ours
    ] == [
        (
            config.prompt,
            config.width,
            config.height,
            config.num_inference_steps,
            config.guidance_scale,
            config.num_frames,
            config.fps,
            config.ctrl_img,
            config.seed % 2**64,
            config.negative_prompt or "",
        )
        for config in theirs
    ]
    assert [s.network_multiplier for s in ours] == [config.network_multiplier for config in theirs]


@pytest.mark.parametrize(
    "section",
    [
        {"prompts": ["a", "b"]},
        {"samples": [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"}], "seed": 42},
        {"samples": [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"}], "seed": 42, "walk_seed": True},
        {"samples": [{"prompt": "a", "seed": 1}, {"seed": 2}, {"prompt": "c", "seed": 3}]},
        {"prompts": ["[trigger] a [name] --n  dark  --w 333 --h 5 --seed -1 --l 2 --s 3 -- lost --m 0.25 --frames 9 --fps 2"]},
        {"prompts": ["a\n--w 640\n--h 480", " x --d 7 --d 8", "well--known", "--w 64", "a --ctrl_img my picture.png"]},
        {"prompts": ["ignored"], "samples": [{"prompt": "b", "network_multiplier": "0.5", "neg": "n", "ctrl_img": "a.png"}]},
        {"samples": [{"prompt": "a", "network_multiplier": "strong"}], "network_multiplier": 0.3},
    ],
)
@pytest.mark.parametrize("trigger_word", [None, "", "sks", "sks --w 128"])
def test_samples_are_resolved_as_the_trainer_does(section, trigger_word, trainer):
    assert_same(section, trigger_word, trainer)


WORDS = st.sampled_from(
    ["a", "[trigger]", "--w 640", "--h 8", "--d 4", "--seed 9", "--cfg 2.5", "--steps 4", "--m 1.5", "--n", "--x y", "--", "-"]
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "width": st.integers(1, 2000),
    "height": st.integers(1, 2000),
    "seed": st.integers(0, 99),
    "guidance_scale": st.floats(0, 9),
    "sample_steps": st.integers(1, 50),
    "network_multiplier": st.floats(-2, 2) | st.sampled_from(["1.5", "much"]),
    "num_frames": st.integers(1, 99),
    "fps": st.integers(1, 60),
    "neg": st.sampled_from(["", "blurry", False]),
}
SAMPLES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"prompt": st.lists(WORDS).map(" ".join) | st.none(), **VALUES, "seed": st.none() | st.integers(0, 99)}
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    section=st.fixed_dictionaries({"samples": SAMPLES}, optional={**VALUES, "walk_seed": st.booleans()}),
    trigger_word=st.sampled_from([None, "", "sks"]),
)
def test_any_section_is_resolved_as_the_trainer_does(section, trigger_word, trainer):
    if all(sample.get("prompt") is None for sample in section["samples"]):
        section["samples"][0]["prompt"] = "a"
    assert_same(section, trigger_word, trainer)
