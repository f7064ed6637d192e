"""`match`, `settings` and the warnings that teach, through the local API."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.torch import save_file

from builder.tiny_checkpoints import SIZE_14B, lora_metadata, lora_tensors
from pipelines import Adapter, load_pipeline
from pipelines.lora.file import LoraFile
from pipelines.recipes import Era, preview
from tests.conftest import STAND_IN
from tests.integration.test_local_api import as_base64, file_of, frames_of, output_of, request_for
from tests.pipelines.test_models import PICTURE
from tests.worker_process import ROOT, LocalApi, environment, local_api

MODEL = "wan22_14b_t2v"

Request = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of an old trainer, one of a new one with a trigger word, and one without metadata."""
    folder = tmp_path_factory.mktemp("loras")
    for name, metadata in (
        ("old", lora_metadata("old", "wan_2.2_14b", version="0.9.2")),
        ("new", lora_metadata("new", "wan_2.2_14b", version="0.12.26", trigger_word="Sks")),
        ("bare", {"format": "pt"}),
    ):
        for seed, side in enumerate(("high", "low")):
            save_file(lora_tensors(SIZE_14B, 8, seed), folder / f"{name}_{side}_noise.safetensors", metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def api(tiny: Path, lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    folder = tmp_path_factory.mktemp("match")
    with local_api(environment(tiny, MODEL, LORA_DIR=lora_dir, OUTPUT_DIR=folder / "out"), folder) as api:
        yield api


@pytest.fixture
def request_(tiny: Path) -> Request:
    """A request with the LoRA pair of this name; the rest goes into the prompt."""

    def request(lora: str, match: str | None = "preview", **prompt: Any) -> dict[str, Any]:
        loras = [{"path": f"{lora}_{side}_noise.safetensors", "transformer": side} for side in ("high", "low")]
        return request_for(MODEL, tiny, width=112, **prompt) | {"loras": loras, "match": match}

    return request


@pytest.mark.parametrize(
    ("lora", "era", "shift"), [("old", "unipc", 3.0), ("new", "flowmatch", 5.0), ("bare", "flowmatch", 5.0)]
)
def test_preview_takes_the_era_of_the_loras_trainer(
    api: LocalApi, request_: Request, tiny: Path, lora_dir: Path, lora: str, era: Era, shift: float
) -> None:
    output = output_of(api, request_(lora))
    (settings,) = output["settings"]["prompts"]
    assert (settings["era"], settings["shift"], settings["boundary_ratio"]) == (era, shift, 0.875)
    assert {lora["applied_by"] for lora in output["settings"]["loras"]} == {"merge"}

    model = load_pipeline(MODEL, tiny, "cpu")
    pair = [Adapter(LoraFile.read(lora_dir / f"{lora}_{side}_noise.safetensors"), 1.0, side) for side in ("high", "low")]  # type: ignore[arg-type]
    model.apply_loras(pair, "merge")
    recipe = preview(model.spec, era, "")
    ours = np.concatenate(list(model.generate(make_sampling(output["settings"]["prompts"][0]), recipe)))
    assert np.abs(frames_of(output["outputs"]["videos"][0]).astype(int) - ours).max() <= 1


def make_sampling(settings: dict[str, Any]) -> Any:
    """The settings of a result are enough to make it again."""
    from pipelines import Sampling

    return Sampling(
        prompt=settings["prompt"],
        negative_prompt=settings["neg"],
        width=settings["width"],
        height=settings["height"],
        num_frames=settings["num_frames"],
        num_inference_steps=settings["sample_steps"],
        guidance_scale=settings["guidance_scale"],
        seed=settings["seed"],
    )


def test_preview_floors_14b_t2v_to_16_where_documented_floors_to_32(api: LocalApi, request_: Request) -> None:
    widths = [output_of(api, request_("new", match))["outputs"]["videos"][0]["width"] for match in ("preview", "documented")]
    assert widths == [112, 96]


def test_preview_and_documented_take_turns_without_a_trace(api: LocalApi, request_: Request) -> None:
    first = [frames_of(output_of(api, request_("new", match))["outputs"]["videos"][0]) for match in ("documented", "preview")]
    again = [frames_of(output_of(api, request_("new", match))["outputs"]["videos"][0]) for match in ("documented", "preview")]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


def test_an_explicit_sampler_wins_over_the_era(api: LocalApi, request_: Request) -> None:
    (settings,) = output_of(api, request_("new", sampler="unipc"))["settings"]["prompts"]
    assert (settings["scheduler"], settings["shift"]) == ("UniPCMultistepScheduler", 3.0)
    assert settings["scheduler_because"] == "sampler is unipc"


def test_a_lora_without_metadata_takes_the_newest_era_with_a_warning(api: LocalApi, request_: Request) -> None:
    assert any("no ai-toolkit version" in warning for warning in output_of(api, request_("bare"))["warnings"])
    assert not any("no ai-toolkit version" in warning for warning in output_of(api, request_("new"))["warnings"])


def test_documented_says_when_the_trainer_sampled_differently_and_names_the_field(api: LocalApi, request_: Request) -> None:
    (warning,) = [w for w in output_of(api, request_("new", None))["warnings"] if "ai-toolkit" in w]
    assert "0.12.26" in warning
    assert "shift 5.0 instead of 3.0" in warning
    assert "set `match` to preview" in warning
    assert not any("set `match`" in w for w in output_of(api, request_("new", "preview"))["warnings"])


def test_a_forgotten_trigger_word_is_told(api: LocalApi, request_: Request) -> None:
    forgotten = request_("new") | {"trigger_word": "boat"}
    assert any("trigger word `Sks` is not in the prompt" in warning for warning in output_of(api, forgotten)["warnings"])
    assert not any("trigger word" in warning for warning in output_of(api, request_("new"))["warnings"])


def test_settings_say_all_that_decides_the_frames_and_nothing_of_the_machine(
    api: LocalApi, request_: Request, lora_dir: Path
) -> None:
    import hashlib

    settings = output_of(api, request_("new"))["settings"]
    assert {"model", "match", "loras", "checkpoints", "dtype", "device", "attention", "versions", "prompts"} <= settings.keys()
    sums = [hashlib.sha256((lora_dir / f"new_{side}_noise.safetensors").read_bytes()).hexdigest() for side in ("high", "low")]
    assert [lora["sha256"] for lora in settings["loras"]] == sums
    assert str(lora_dir) not in json.dumps(settings)
    assert "/tmp" not in json.dumps(settings)


def test_settings_tell_two_control_images_apart(tiny: Path, tmp_path: Path) -> None:
    env = environment(tiny, "wan22_5b", AI_TOOLKIT_PATH=STAND_IN, OUTPUT_DIR=tmp_path)
    with local_api(env, tmp_path) as api:
        request = request_for("wan22_5b", tiny)
        sums = []
        for image in (None, PICTURE, PICTURE.rotate(180)):
            request["prompts"][0]["ctrl_img"] = image and as_base64(image)
            sums.append(output_of(api, request)["settings"]["prompts"][0]["control_image_sha256"])
    assert sums[0] is None
    assert len(set(sums)) == 3


def test_an_explicit_sampler_leaves_the_era_of_the_lora_in_the_settings(api: LocalApi, request_: Request) -> None:
    (settings,) = output_of(api, request_("new", sampler="unipc"))["settings"]["prompts"]
    assert (settings["era"], settings["scheduler"]) == ("flowmatch", "UniPCMultistepScheduler")


def test_the_warning_compares_with_what_was_really_made(api: LocalApi, request_: Request) -> None:
    """With flowmatch in documented, shift and scheduler are the trainer's; only the size floor differs."""
    warnings = output_of(api, request_("new", "documented", sampler="flowmatch"))["warnings"]
    (warning,) = [w for w in warnings if "showed its samples with" in w]
    assert "size 112x64 instead of 96x64" in warning
    assert "shift" not in warning


def test_the_documented_result_has_the_fields_of_a_real_one(api: LocalApi, request_: Request) -> None:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    (documented,) = [block for block in map(json.loads, blocks) if "outputs" in block]
    real = output_of(api, request_("new", None) | {"output_format": "mp4"})
    assert list(documented) == list(real)
    assert documented["outputs"]["videos"][0].keys() == real["outputs"]["videos"][0].keys()
    assert documented["settings"].keys() == real["settings"].keys()
    assert documented["settings"]["loras"][0].keys() == real["settings"]["loras"][0].keys()
    assert list(documented["settings"]["prompts"][0]) == list(real["settings"]["prompts"][0])
    assert documented["timings"].keys() == real["timings"].keys()


def test_an_mp4_carries_its_settings(api: LocalApi, request_: Request) -> None:
    output = output_of(api, request_("new") | {"output_format": "mp4"})
    with av.open(str(file_of(output["outputs"]["videos"][0]))) as video:
        tag = json.loads(video.metadata["comment"])
    common = {name: value for name, value in output["settings"].items() if name != "prompts"}
    assert tag == common | output["settings"]["prompts"][0]


def test_default_match_changes_the_default(tiny: Path, lora_dir: Path, tmp_path: Path, request_: Request) -> None:
    env = environment(tiny, MODEL, LORA_DIR=lora_dir, OUTPUT_DIR=tmp_path, DEFAULT_MATCH="preview", LORA_MODE="merge")
    with local_api(env, tmp_path) as api:
        assert output_of(api, request_("new", None))["settings"]["match"] == "preview"
        documented = output_of(api, request_("new", "documented"))["settings"]
    assert (documented["match"], documented["loras"][0]["applied_by"]) == ("documented", "merge")


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("bf16", ["as bf16 differs from float32; use a worker with DTYPE=bfloat16"]),
        ("fp16", ["by 0.2 to 1.0 of 255 on average"]),
        ("fp32", []),
        (None, []),
    ],
)
def test_a_preview_in_another_dtype_than_the_training_is_told(
    dtype: str | None, says: list[str], api: LocalApi, request_: Request
) -> None:
    request = request_("new") | {"trained_with": {"low_vram": False, "dtype": dtype}}
    told = [warning for warning in output_of(api, request)["warnings"] if "this worker computes in" in warning]
    assert [warning.partition("the samples ")[2] for warning in told] == says


def test_low_vram_of_wan21_image_to_video_is_told(tiny: Path, tmp_path: Path) -> None:
    env = environment(tiny, "wan21_i2v_14b", OUTPUT_DIR=tmp_path / "out")
    request = request_for("wan21_i2v_14b", tiny, num_frames=1, sample_steps=1) | {"match": "preview"}
    with local_api(env, tmp_path) as api:
        for low_vram in (False, True):
            warnings = output_of(api, request | {"trained_with": {"low_vram": low_vram}})["warnings"]
            assert any("draws the noise of this model in bf16" in warning for warning in warnings) is low_vram
