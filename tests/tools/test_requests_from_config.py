"""A training config becomes requests with the trainer's own values."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.request import MAX_PAYLOAD, body_of
from client.training.requests import model_named_by
from client.training.samples import resolve
from pipelines.catalog import MODELS
from pipelines.trained import NOT_SAID, other_base_model
from tools.cli import BadInput
from tools.requests_from_config import main
from worker.image_decode import decode
from worker.parse import parse

WAN21_1B = {"arch": "wan21", "name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
T2V_14B = {"arch": "wan22_14b:t2v", "name_or_path": "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16"}


def config(folder: Path, sample: dict[str, Any], model: dict[str, Any] = WAN21_1B, **process: Any) -> Path:
    """A training config with this `sample` section, as the trainer's UI lays it out."""
    inner = {"type": "diffusion_trainer", "model": model, "sample": sample} | process
    document = {"job": "extension", "config": {"name": "my_lora", "process": [inner]}, "meta": {"name": "[name]"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return folder / "config.yaml"


def converted(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(inputs of the requests, warnings)."""
    status = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return [request["input"] for request in json.loads(out)], [line.removeprefix("warning: ") for line in err.splitlines()]


def prompts_of(inputs: list[dict[str, Any]], *names: str) -> list[Any]:
    values = [tuple(entry["prompts"][0][name] for name in names) for entry in inputs]
    return [value[0] for value in values] if len(names) == 1 else values


def picture(path: Path, mode: str = "RGB", **options: Any) -> Path:
    image = Image.new("RGBA", (48, 32), (200, 40, 90, 128))
    image.paste((10, 220, 30, 255), (0, 0, 20, 10))
    image.convert(mode).save(path, **options)
    return path


# what the trainer takes


def test_every_number_is_written_with_the_trainers_defaults(tmp_path, capsys):
    [request], warnings = converted(capsys, config(tmp_path, {"prompts": ["a boat"]}))
    assert request == {
        "model": "wan21_1b",
        "match": "preview",
        "trained_with": {
            "quantize": False,
            "quantize_te": False,
            "low_vram": False,
            "vae_tiling": False,
            "multipliers": "equal",
        },
        "loras": [{"path": "my_lora/my_lora.safetensors", "network_multiplier": 1.0}],
        "prompts": [
            {
                "prompt": "a boat",
                "neg": "",
                "width": 512,
                "height": 512,
                "num_frames": 1,
                "fps": 16,
                "sample_steps": 20,
                "guidance_scale": 7.0,
                "seed": 0,
            }
        ],
    }
    assert warnings == []


def test_a_sample_overrides_the_section(tmp_path, capsys):
    own = {"width": 640, "height": 384, "neg": "blurry", "guidance_scale": 3, "sample_steps": 9, "fps": 8, "num_frames": 17}
    section = {"width": 832, "height": 480, "seed": 7, "samples": [{"prompt": "a"}, {"prompt": "b", **own}]}
    requests, _ = converted(capsys, config(tmp_path, section))
    assert prompts_of(requests, "width", "height") == [(832, 480), (640, 384)]
    assert requests[1]["prompts"][0] == {"prompt": "b", "seed": 7, **own}


def test_walk_seed_counts_up_and_a_samples_own_seed_is_for_that_sample(tmp_path, capsys):
    samples = [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"}]
    requests, _ = converted(capsys, config(tmp_path, {"seed": 42, "walk_seed": True, "samples": samples}))
    assert prompts_of(requests, "seed") == [42, 5, 44]


def test_without_walk_seed_a_samples_own_seed_is_for_the_next_samples_too(tmp_path, capsys):
    samples = [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"}, {"prompt": "d", "seed": None}]
    requests, _ = converted(capsys, config(tmp_path, {"seed": 42, "samples": samples}))
    assert prompts_of(requests, "seed") == [42, 5, 5, 5]


def test_flags_in_the_prompt_win_over_everything(tmp_path, capsys):
    flags = "--w 640 --h 360 --d 1 --seed 3 --cfg 2.5 --steps 8 --frames 21 --fps 12 --m 0.5 --n ugly, red"
    section = {"samples": [{"prompt": f"a boat {flags}", "width": 64, "seed": 9, "network_multiplier": 2}]}
    [request], _ = converted(capsys, config(tmp_path, section))
    assert request["prompts"][0] == {
        "prompt": "a boat",
        "neg": "ugly, red",
        "width": 640,
        "height": 360,
        "num_frames": 21,
        "fps": 12,
        "sample_steps": 8,
        "guidance_scale": 2.5,
        "seed": 3,
    }
    assert request["loras"][0]["network_multiplier"] == 0.5


def test_sizes_are_floored_to_8_and_at_least_64(tmp_path, capsys):
    section = {"samples": [{"prompt": "a", "width": 839, "height": 30}]}
    assert prompts_of(converted(capsys, config(tmp_path, section))[0], "width", "height") == [(832, 64)]


@pytest.mark.parametrize(("word", "prompt"), [("sks", "sks in my_lora"), ("", " in my_lora"), (None, "[trigger] in my_lora")])
def test_the_jobs_name_is_filled_in_before_the_trigger_word(word, prompt, tmp_path, capsys):
    file = config(tmp_path, {"prompts": ["[trigger] in [name]"]}, trigger_word=word)
    assert prompts_of(converted(capsys, file)[0], "prompt") == [prompt.strip()]


def test_a_sample_without_prompt_shifts_the_prompts_as_in_the_trainer():
    samples = [{"prompt": "a", "seed": 1}, {"seed": 2}, {"prompt": "c", "seed": 3}]
    assert [(sample.prompt, sample.seed) for sample in resolve({"samples": samples}, None)] == [("a", 1), ("c", 2)]


@pytest.mark.parametrize("seed", [-2, -(2**63)])
def test_negative_seeds_are_those_of_torch(seed):
    [sample] = resolve({"prompts": ["a"], "seed": seed}, None)
    assert sample.seed == torch.Generator().manual_seed(seed).initial_seed()


def test_the_multiplier_of_a_sample_is_that_of_its_loras(tmp_path, capsys):
    section = {"network_multiplier": 0.5, "samples": [{"prompt": "a"}, {"prompt": "b", "network_multiplier": "0.75"}]}
    requests, warnings = converted(capsys, config(tmp_path, section, T2V_14B))
    assert [[lora["network_multiplier"] for lora in request["loras"]] for request in requests] == [[0.5, 0.5], [0.75, 0.75]]
    assert {request["trained_with"]["multipliers"] for request in requests} == {"mixed"}
    assert warnings == []


# which model, which LoRA


@pytest.mark.parametrize(
    ("arch", "name", "model"),
    [
        ("wan21", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan21_1b"),
        ("wan21", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan21_14b"),
        ("wan21:14b", "/models/mine", "wan21_14b"),
        ("wan21:1b", "/models/mine", "wan21_1b"),
        ("wan21:1b", "/models/wan21_14b_bf16", "wan21_14b"),
        ("wan21_i2v", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan21_i2v_14b480p"),
        ("wan21_i2v", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "wan21_i2v_14b"),
        ("wan21_i2v:14b480p", "/models/mine", "wan21_i2v_14b480p"),
        ("wan21_i2v:14b", "/models/mine", "wan21_i2v_14b"),
        ("wan22_14b", "anything", "wan22_14b_t2v"),
        ("wan22_14b:t2v", "anything", "wan22_14b_t2v"),
        ("wan22_14b_i2v", "anything", "wan22_14b_i2v"),
        ("wan22_5b", "anything", "wan22_5b"),
        ("wan21", "/models/mine", None),
        ("wan21_i2v", "/models/wan-14b", None),
        ("flux", "black-forest-labs/FLUX.1-dev", None),
    ],
)
def test_arch_and_name_determine_the_model(arch, name, model):
    assert model_named_by({"arch": arch, "name_or_path": name}) == model


def test_the_error_for_an_unknown_model_names_the_option(tmp_path, capsys):
    file = config(tmp_path, {"prompts": ["a"]}, {"arch": "wan21", "name_or_path": "/models/mine"})
    assert main([str(file)]) == 2
    assert "--model" in capsys.readouterr().err
    [request], _ = converted(capsys, file, "--model", "wan21_14b")
    assert request["model"] == "wan21_14b"


@pytest.mark.parametrize(
    ("kwargs", "sides"),
    [({}, ["high", "low"]), ({"train_low_noise": False}, ["high"]), ({"train_high_noise": False}, ["low"])],
)
def test_a_14b_lora_has_the_sides_that_were_trained(kwargs, sides, tmp_path, capsys):
    [request], _ = converted(capsys, config(tmp_path, {"prompts": ["a"]}, T2V_14B | {"model_kwargs": kwargs}))
    expected = [{"path": f"my_lora/my_lora_{side}_noise.safetensors", "transformer": side} for side in sides]
    assert request["loras"] == [lora | {"network_multiplier": 1.0} for lora in expected]


def test_a_given_lora_has_its_side_in_its_name_or_before_it(tmp_path, capsys):
    file = config(tmp_path, {"prompts": ["a"]}, T2V_14B)
    url = "https://example.com/a_low_noise.safetensors?download=true"
    [request], _ = converted(capsys, file, "--lora", "high=x/a.safetensors", url)
    assert [(lora["path"], lora["transformer"]) for lora in request["loras"]] == [("x/a.safetensors", "high"), (url, "low")]
    assert main([str(file), "--lora", "x/a.safetensors"]) == 2
    assert "high=x/a.safetensors" in capsys.readouterr().err


def test_a_lora_path_that_the_worker_refuses_is_bad_input(tmp_path, capsys):
    assert main([str(config(tmp_path, {"prompts": ["a"]})), "--lora", "/abs/a.safetensors"]) == 2
    assert "must be relative to the LoRA folder" in capsys.readouterr().err


def test_a_bare_process_and_json_are_read_too(tmp_path, capsys):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"model": WAN21_1B, "sample": {"prompts": ["a"]}}))
    assert main([str(tmp_path / "p.yaml")]) == 2
    assert "--lora" in capsys.readouterr().err
    [request], _ = converted(capsys, tmp_path / "p.yaml", "--lora", "a.safetensors")
    as_yaml = config(tmp_path, {"prompts": ["a"]})
    (tmp_path / ".job_config.json").write_text(json.dumps(yaml.safe_load(as_yaml.read_text())))
    assert converted(capsys, tmp_path / ".job_config.json") == converted(capsys, as_yaml)
    assert request["prompts"] == converted(capsys, as_yaml)[0][0]["prompts"]


def test_environment_variables_are_filled_in_as_in_the_trainer(tmp_path, capsys, monkeypatch):
    file = config(tmp_path, {"prompts": ["a ${VEHICLE}"]})
    assert main([str(file)]) == 2
    monkeypatch.setenv("VEHICLE", "boat")
    assert prompts_of(converted(capsys, file)[0], "prompt") == ["a boat"]


# control images


def test_a_control_image_is_sent_as_the_unchanged_file(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    image = picture(tmp_path / "images/first.jpg")
    section = {"samples": [{"prompt": "a", "ctrl_img": "images/first.jpg"}]}
    [request], _ = converted(capsys, config(tmp_path, section, {"arch": "wan22_14b_i2v"}))
    assert base64.b64decode(request["prompts"][0]["ctrl_img"]) == image.read_bytes()


def test_control_images_are_relative_to_the_current_folder_or_else_to_the_configs(tmp_path, capsys, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    picture(tmp_path / "a.png")
    file = config(tmp_path, {"samples": [{"prompt": "a", "ctrl_img": "a.png"}]}, {"arch": "wan22_5b"})
    monkeypatch.chdir(here)
    [beside], _ = converted(capsys, file)
    Image.new("RGB", (16, 16)).save(here / "a.png")
    [first], _ = converted(capsys, file)
    assert base64.b64decode(first["prompts"][0]["ctrl_img"]) == (here / "a.png").read_bytes()
    assert beside != first


@pytest.mark.parametrize("kind", ["transparent", "turned"])
def test_the_worker_gets_the_pixels_that_the_trainer_sees(kind, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which the trainer does not look at
    path = picture(tmp_path / "a.png", "RGBA") if kind == "transparent" else picture(tmp_path / "a.jpg", exif=exif)
    section = {"samples": [{"prompt": "a", "ctrl_img": path.name}]}
    [request], _ = converted(capsys, config(tmp_path, section, {"arch": "wan22_5b"}))
    sent = base64.b64decode(request["prompts"][0]["ctrl_img"])
    assert sent == path.read_bytes()
    with Image.open(path) as image:
        assert decode(sent, request["match"]).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(("size", "is_told"), [(7_490_000, False), (7_510_000, True)])
def test_a_request_above_the_10_mb_of_run_is_a_warning(size, is_told, tmp_path, capsys):
    image = picture(tmp_path / "a.png")
    image.write_bytes(image.read_bytes().ljust(size, b"\0"))  # decoders ignore the bytes after a PNG's end
    section = {"samples": [{"prompt": "a", "ctrl_img": "a.png"}]}
    [request], warnings = converted(capsys, config(tmp_path, section, {"arch": "wan22_5b"}))
    assert is_told == (len(body_of({"input": request})) > MAX_PAYLOAD)
    assert ["RunPod accepts 10 MB at /run" in warning for warning in warnings] == [True] * is_told


def test_an_image_model_without_an_image_is_bad_input_and_a_text_model_leaves_it_out(tmp_path, capsys):
    assert main([str(config(tmp_path, {"prompts": ["a"]}, {"arch": "wan22_14b_i2v"}))]) == 2
    assert "sample 0 has no `ctrl_img`" in capsys.readouterr().err
    [request], warnings = converted(capsys, config(tmp_path, {"samples": [{"prompt": "a", "ctrl_img": "none.png"}]}))
    assert "ctrl_img" not in request["prompts"][0]
    assert "has no effect" in warnings[0]


# what cannot be had


def test_values_outside_the_schema_are_a_warning_and_the_nearest_is_sent(tmp_path, capsys):
    section = {"samples": [{"prompt": "a", "network_multiplier": 3, "sample_steps": 200, "width": 5000, "guidance_scale": -1}]}
    [request], warnings = converted(capsys, config(tmp_path, section))
    prompt = request["prompts"][0]
    assert (request["loras"][0]["network_multiplier"], prompt["sample_steps"], prompt["width"]) == (2.0, 150, 4096)
    assert "sample 0: network_multiplier 3 is outside the worker's limits; 2 is sent" in warnings
    assert len(warnings) == 4


def test_what_the_trainer_ignores_is_a_warning(tmp_path, capsys):
    section = {"samples": [{"prompt": "a --gr 0.7 --fast well--known", "ctrl_idx": 1, "ctrl_img_2": "b.png"}], "seed": -1}
    requests, warnings = converted(capsys, config(tmp_path, section))
    assert prompts_of(requests, "prompt", "seed") == [("a", -1)]
    for words in ("--gr has no effect", "`--fast well`", "`--known`", "`ctrl_idx`", "`ctrl_img_2`", "its seed is -1"):
        assert any(words in warning for warning in warnings), words


@pytest.mark.parametrize("lora", [[], ["--lora", "job/my_lora_000000004.safetensors"]])
def test_a_training_that_saves_both_sides_in_one_file_gives_that_file(tmp_path, capsys, lora):
    network = {"type": "lora", "split_multistage_loras": False}
    [request], _ = converted(capsys, config(tmp_path, {"prompts": ["a"]}, T2V_14B, network=network), *lora)
    path = lora[1] if lora else "my_lora/my_lora.safetensors"
    assert request["loras"] == [{"path": path, "transformer": "high", "network_multiplier": 1.0}]


def test_how_the_training_ran_is_in_the_request(tmp_path, capsys):
    model = WAN21_1B | {"quantize": True, "low_vram": True, "model_kwargs": {"vae_tiling": True}}
    kinds = {"train": {"dtype": "bf16"}, "save": {"dtype": "float32"}}
    [request], warnings = converted(capsys, config(tmp_path, {"prompts": ["a"]}, model, **kinds))
    assert request["trained_with"] == {
        "quantize": True,
        "quantize_te": True,
        "qtype": "qfloat8",
        "low_vram": True,
        "vae_tiling": True,
        "dtype": "bf16",
        "save_dtype": "float32",
        "multipliers": "equal",
    }
    assert warnings == []


@pytest.mark.parametrize(
    ("model", "others", "warned"),
    [
        ({"quantize": True, "qtype": "nf4"}, {}, "model.qtype: nf4 cannot be rebuilt"),
        ({}, {"save": {"dtype": "bf16"}}, "save.dtype: bf16 rounds the LoRA"),
        ({}, {"train": {"dtype": "bf16"}}, "train.dtype: bf16 without quantization"),
        (
            {},
            {"train": {"dtype": "fp16"}},
            "train.dtype: fp16 is a dtype that no worker computes in, so the previews differ by 1.5 to 2.2 of 255",
        ),
        ({"name_or_path": "me/Wan2.1-1.3B-anime"}, {}, "model.name_or_path: the worker loads Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    ],
)
def test_what_cannot_be_met_exactly_is_a_warning(tmp_path, capsys, model, others, warned):
    [request], [warning] = converted(capsys, config(tmp_path, {"prompts": ["a"]}, WAN21_1B | model, **others))
    assert warning.startswith(warned)
    assert request["trained_with"].get("qtype") is None


def test_low_vram_of_wan21_image_to_video_is_a_warning(tmp_path, capsys):
    model = {"arch": "wan21_i2v:14b480p", "name_or_path": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "quantize": True}
    section = {"samples": [{"prompt": "a", "ctrl_img": str(picture(tmp_path / "a.png"))}]}
    _, warnings = converted(capsys, config(tmp_path, section, model | {"low_vram": True}))
    assert [warning.partition(":")[0] for warning in warnings] == ["model.low_vram"]
    assert converted(capsys, config(tmp_path, section, model))[1] == []


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan21_1b"),
        ("D:\\models\\wan2.1-t2v-1.3b-diffusers\\", "wan21_1b"),
        ("/home/me/.cache/huggingface/hub/models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/snapshots/0fad780", "wan21_1b"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan22_14b_t2v"),
        ("/models/Wan2.2-I2V-A14B-Diffusers", "wan22_14b_i2v"),
        ("ai-toolkit/Wan2.2-I2V-A14B-Diffusers-bf16", "wan22_14b_i2v"),
        (None, "wan22_5b"),
    ],
)
def test_the_base_model_has_its_name_anywhere_in_the_path(path, model):
    assert other_base_model({"name_or_path": path}, MODELS[model]) is None


def test_a_format_that_cannot_be_rebuilt_still_keeps_the_lora_beside_the_weights(tmp_path, capsys):
    section, model = {"prompts": ["a"]}, WAN21_1B | {"quantize": True, "qtype": "orbit4"}
    [request], [warning] = converted(capsys, config(tmp_path, section, model, train={"dtype": "bf16"}))
    assert request["trained_with"]["multipliers"] == "mixed" and "quantize" not in request["trained_with"]
    assert warning.startswith("model.qtype: orbit4 cannot be rebuilt")


@pytest.mark.parametrize(
    ("model", "qtype"),
    [
        ({"qtype": "uint4|ostris/adapters/a.safetensors"}, "uint4|ostris/adapters/a.safetensors"),
        ({"qtype": "uint3", "accuracy_recovery_adapter": "a.safetensors"}, "uint3|a.safetensors"),
        ({"qtype": "uint3|b.safetensors", "accuracy_recovery_adapter": "a.safetensors"}, "uint3|b.safetensors"),
        ({"layer_offloading": True}, "float8"),
        ({"layer_offloading": True, "accuracy_recovery_adapter": "a.safetensors"}, "float8|a.safetensors"),
        ({"layer_offloading": True, "qtype": "qfloat8|a.safetensors"}, "qfloat8|a.safetensors"),
        ({"qtype": None}, "qfloat8"),
    ],
)
def test_the_format_is_what_the_trainer_makes_of_the_config(tmp_path, capsys, model, qtype):
    [request], _ = converted(capsys, config(tmp_path, {"prompts": ["a"]}, WAN21_1B | {"quantize": True} | model))
    assert request["trained_with"]["qtype"] == qtype
    assert request["trained_with"]["multipliers"] == ("mixed" if "layer_offloading" in model else "equal")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"quantize": True, "low_vram": True}, "trained with quantize, quantize_te, low_vram as qfloat8; the worker computes"),
        ({}, "trained in bf16, not quantized"),
    ],
)
def test_how_the_training_ran_is_printed(tmp_path, capsys, model, line):
    train = {"train": {"dtype": "bf16"}, "save": {"dtype": "float32"}}
    assert main([str(config(tmp_path, {"prompts": ["a"]}, WAN21_1B | model, **train)), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"prompts": ["a --w wide"]}, "--w in the prompt of sample 0"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a"], "width": None}, "`width` is empty"),
        ({"prompts": ["a"], "fps": "fast"}, "fps of sample 0 is 'fast'"),
        ({"prompts": ["a"], "seed": 2**64}, "torch accepts at most 64 bits"),
        ({"prompts": [42]}, "not a text"),
        ({"samples": ["a"]}, "list of objects"),
        ({"prompts": ["a"], "guidance_scale": float("nan")}, "guidance_scale"),
    ],
)
def test_a_config_on_which_the_trainer_fails_is_one_line_on_stderr(sample, words, tmp_path, capsys):
    assert main([str(config(tmp_path, sample))]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("text", ["a: [", "42", "a: b", "config: {process: []}"])
def test_a_file_that_is_not_a_config_is_one_line_on_stderr(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert main([str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# what is written


def test_each_sample_becomes_a_file_of_its_own(tmp_path, capsys):
    out = tmp_path / "out"
    section = {"prompts": [f"boat {number}" for number in range(11)]}
    assert main([str(config(tmp_path, section)), "--out", str(out), "--output-format", "webp"]) == 0
    names = sorted(file.name for file in out.iterdir())
    assert names == [f"sample_{number:02}.json" for number in range(11)]
    request = json.loads((out / "sample_07.json").read_text())
    assert (request["input"]["prompts"][0]["prompt"], request["input"]["output_format"]) == ("boat 7", "webp")
    assert "sample_10.json  512x512, 1 frame at 16 fps, 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
def test_the_worker_takes_the_requests_of_every_model(model, tmp_path, capsys):
    picture(tmp_path / "a.png")
    section = {"samples": [{"prompt": "[trigger] a", "ctrl_img": "a.png"}, {"prompt": "b --frames 41", "ctrl_img": "a.png"}]}
    requests, _ = converted(capsys, config(tmp_path, section, {"arch": "x"}, trigger_word="sks"), "--model", model)
    for request in requests:
        assert parse(request, MODELS[model]).match == "preview"


numbers = st.integers(-3, 5000) | st.floats(-3, 300).map(lambda number: round(number, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "prompts": st.lists(
                st.text(max_size=12) | st.sampled_from(["a --cfg 3 --m 9", "b --s 0", "c --frames 0"]), min_size=1
            )
        },
        optional=dict.fromkeys(("width", "height", "sample_steps", "guidance_scale", "fps", "num_frames", "seed"), numbers),
    )
)
def test_the_worker_accepts_every_request_that_is_written(section):
    """`requests_of` checks with `parse`; what it does not raise as bad input has passed."""
    from client.training.requests import requests_of
    from client.training.samples import TrainingConfig

    try:
        samples = tuple(resolve(section, "sks"))
    except BadInput:
        return
    requests, _ = requests_of(TrainingConfig("n", {}, samples, NOT_SAID), MODELS["wan21_1b"], None, Path())
    assert len(requests) == len(samples)
