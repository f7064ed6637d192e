"""The request that is sent: made from options and a file, checked as the worker does, with local images inside."""

from __future__ import annotations

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from client import InvalidRequest
from client.options import add_request_options, lora_of, request_of
from client.request import MAX_PAYLOAD, body_of, job_of
from pipelines.catalog import MODELS
from tests.client.conftest import REQUEST
from worker.parse import parse
from worker.request import Prompt, Request

I2V: dict[str, Any] = {**REQUEST, "model": "wan21_i2v_14b"}


def given(*words: str, stdin: str = "") -> dict[str, Any]:
    """The request that a command line makes."""
    parser = argparse.ArgumentParser()
    add_request_options(parser)
    return request_of(parser.parse_args(words), io.StringIO(stdin))[0]


def problems(request: Any, is_local: bool = False, folder: Path = Path()) -> str:
    with pytest.raises(InvalidRequest) as caught:
        job_of(request, folder, is_local)
    return "\n".join(map(str, caught.value.problems))


def with_image(image: str) -> dict[str, Any]:
    return {**I2V, "prompts": [{"prompt": "a boat", "ctrl_img": image}]}


# Options.


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("job/name.safetensors", {"path": "job/name.safetensors"}),
        ("high=job/name.safetensors", {"path": "job/name.safetensors", "transformer": "high"}),
        ("low=j/n.safetensors@-0.5", {"path": "j/n.safetensors", "transformer": "low", "network_multiplier": -0.5}),
        ("https://h/n.safetensors?a=b@c", {"path": "https://h/n.safetensors?a=b@c"}),
        ("https://h/n.safetensors@1", {"path": "https://h/n.safetensors", "network_multiplier": 1.0}),
        ("middle=x", {"path": "middle=x"}),
        ("a@b.safetensors", {"path": "a@b.safetensors"}),
    ],
)
def test_a_lora_is_a_path_with_a_side_and_a_scale(text: str, lora: dict[str, Any]) -> None:
    assert lora_of(text) == lora


def test_options_make_a_whole_request() -> None:
    words = ["--model", "wan22_14b_t2v", "--lora", "high=a.safetensors", "--lora", "low=b.safetensors@0.5"]
    words += ["--prompt", "one", "--prompt", "two", "--width", "832", "--seed", "-1", "--guidance-scale", "3.5"]
    words += ["--extra-lora", "both=c.safetensors@0.3", "--shift", "7", "--num-videos", "2", "--guidance-scale-2", "3"]
    request = given(*words, "--trigger-word", "sks", "--match", "preview", "--output-format", "gif")
    parsed = parse(request, MODELS["wan22_14b_t2v"])
    assert [lora.transformer for lora in parsed.loras] == ["high", "low"]
    assert [(prompt.prompt, prompt.width, prompt.seed) for prompt in parsed.prompts] == [("one", 832, -1), ("two", 832, -1)]
    assert [(lora.transformer, lora.network_multiplier) for lora in parsed.extra_loras] == [("both", 0.3)]
    assert [(prompt.shift, prompt.num_videos, prompt.guidance_scale_2) for prompt in parsed.prompts] == [(7.0, 2, 3.0)] * 2
    assert (parsed.trigger_word, parsed.match, parsed.output_format) == ("sks", "preview", "gif")
    assert not parsed.draft and parse(given(*words, "--draft"), MODELS["wan22_14b_t2v"]).draft


def test_every_field_has_an_option() -> None:
    parser = argparse.ArgumentParser()
    add_request_options(parser)
    options = {action.dest for action in parser._actions}
    by_another_name = {"loras": "lora", "prompts": "prompt", "hf_token": "send_hf_token", "ctrl_img_1": "ctrl_img"}
    assert {by_another_name.get(name, name) for name in (*Request.model_fields, *Prompt.model_fields)} <= options


def test_options_change_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"input": REQUEST, "policy": {"ttl": 1}}))
    assert given(str(file)) == {"input": REQUEST, "policy": {"ttl": 1}}
    changed = given(str(file), "--seed", "9", "--model", "wan21_14b")
    assert changed == {
        "input": REQUEST | {"model": "wan21_14b", "prompts": [REQUEST["prompts"][0] | {"seed": 9}]},
        "policy": {"ttl": 1},
    }
    assert given(str(file), "--prompt", "x", "--prompt", "y")["input"]["prompts"] == [
        {"prompt": "x", "seed": 7},
        {"prompt": "y", "seed": 7},
    ]


def test_a_request_can_come_from_stdin() -> None:
    assert given("-", stdin=json.dumps(REQUEST)) == REQUEST


@pytest.mark.parametrize(("text", "why"), [("{", "is not JSON"), ("[]", "must be a JSON object")])
def test_the_error_for_a_bad_file_names_the_file(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InvalidRequest, match=why):
        given(str(tmp_path / "r.json"))
    with pytest.raises(InvalidRequest, match="No such file"):
        given(str(tmp_path / "s.json"))


def test_an_image_option_is_relative_to_the_current_folder_and_replaces_the_files_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photo.png").write_bytes(b"pixels")
    (tmp_path / "elsewhere/r.json").write_text(json.dumps({**I2V, "prompts": [{"prompt": "x", "ctrl_img_1": "https://h/i"}]}))
    monkeypatch.chdir(tmp_path)
    request = given("elsewhere/r.json", "--image", "photo.png")
    (prompt,) = job_of(request, Path("elsewhere"), is_local=False)["input"]["prompts"]
    assert prompt["ctrl_img"] == f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"


def test_the_hub_token_of_the_environment_is_sent_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "hf_token" not in given("--model", "wan21_1b")
    assert given("--send-hf-token")["hf_token"] == "hf_x"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InvalidRequest, match="HF_TOKEN is not set"):
        given("--send-hf-token")


# The check.


def test_every_problem_is_listed_with_its_field() -> None:
    told = problems({"model": "wan22_14b_i2v", "loras": [{"path": "a"}], "prompts": [{"prompt": "x", "width": 32}]})
    for field in ("`loras[0].transformer`", "`prompts[0].width`", "`prompts[0].ctrl_img`"):
        assert field in told
    assert len(told.splitlines()) == 3


@pytest.mark.parametrize(
    "request_", [None, [], {}, "text", {"input": None}, {"input": {"prompts": 3, "loras": {}}}, {"model": 3}]
)
def test_a_value_that_is_not_a_request_is_an_error(request_: Any) -> None:
    assert problems(request_)


# Images.


def test_a_local_image_is_sent_inside_the_request(tmp_path: Path) -> None:
    (tmp_path / "photo.JPG").write_bytes(b"pixels")
    (prompt,) = job_of(with_image("photo.JPG"), tmp_path, is_local=False)["input"]["prompts"]
    assert prompt["ctrl_img"] == f"data:image/jpeg;base64,{base64.b64encode(b'pixels').decode()}"


@pytest.mark.parametrize(
    "image", ["https://example.com/a.png", "data:image/png;base64,AAAA", "iVBORw0KGgo=", "QUJD" * 100, "QUJD" * 3000]
)
def test_an_image_that_is_not_a_file_is_sent_unchanged(image: str) -> None:
    assert job_of(with_image(image), Path(), is_local=False)["input"]["prompts"][0]["ctrl_img"] == image


def test_the_request_of_the_caller_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    request = with_image("a.png")
    job_of(request, tmp_path, is_local=False)
    assert request["prompts"][0]["ctrl_img"] == "a.png"


def test_a_missing_image_is_an_error(tmp_path: Path) -> None:
    assert "`prompts[0].ctrl_img`: there is no file" in problems(with_image("missing.png"), folder=tmp_path)


def test_a_missing_file_of_an_image_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="`--image`: there is no file"):
        given("--image", str(tmp_path / "missing"))
    with pytest.raises(InvalidRequest, match="`--image`: there is no file"):
        given("--image", "QUJD" * 100)


def test_an_image_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert "64 MiB" in problems(with_image("a.png"), folder=tmp_path)


def test_the_error_for_a_request_that_is_too_large_names_the_image(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(MAX_PAYLOAD))
    told = problems(with_image("large.png"), folder=tmp_path)
    assert "13.3 MB, and RunPod accepts 10 MB" in told and "`prompts[0].ctrl_img`" in told
    assert job_of(with_image("large.png"), tmp_path, is_local=True)


def test_the_limit_is_runpods_10_mb_to_the_byte() -> None:
    room = 10_000_000 - len(body_of({"input": with_image("")}))
    assert len(body_of(job_of(with_image("A" * room), Path(), is_local=False))) == MAX_PAYLOAD == 10_000_000
    assert "RunPod accepts 10 MB" in problems(with_image("A" * (room + 1)))


def test_without_a_folder_no_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(b"pixels")
    request = with_image(str(tmp_path / "private.png"))
    assert job_of(request, None, is_local=False)["input"] == request


# LoRAs.


@pytest.mark.parametrize("path", ["{folder}/mine.safetensors", "./mine.safetensors", "mine.safetensors", "~/mine.safetensors"])
def test_a_lora_of_this_computer_is_refused_with_what_to_do(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.safetensors").touch()
    told = problems({**REQUEST, "loras": [{"path": path.format(folder=tmp_path)}]})
    assert "upload it" in told and "LORA_DIR" in told and len(told.splitlines()) == 1


def test_a_lora_below_lora_dir_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_of(REQUEST, Path(), is_local=False)["input"] == REQUEST
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    (tmp_path / "job/name.safetensors").touch()
    assert job_of(REQUEST, Path(), is_local=True)["input"] == REQUEST
    told = problems({**REQUEST, "loras": [{"path": "./job/name.safetensors"}]}, is_local=True)
    assert "not a path below the worker's LORA_DIR" in told
