"""The checks of the documentation find what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs import checks
from tests.docs.blocks import blocks_of, commands_of, spans_of

VIDEO = {"url": "x", "poster": {"url": "x"}}
RESULT: dict[str, Any] = {"model": "x", "outputs": {"videos": [VIDEO]}, "timings": {"total": 1.5}}
REQUEST = {"model": "wan21_1b", "loras": [{"path": "a.safetensors"}], "prompts": [{"prompt": "a boat"}]}


def found_in(shell: str) -> str:
    return "; ".join(problem for words in commands_of(shell) for problem in checks.problems_of_command(words))


@pytest.mark.parametrize(
    "shell",
    [
        "make run   # it's quick",
        "OMP_NUM_THREADS=1 make test",
        "export MODEL_ID=wan21_1b DEVICE=cpu\n.venv/bin/python handler.py --rp_serve_api",
        "python -m tools.compare a.mp4 b.mp4 \\\n  --sheet sheet.png",
        "python builder/tiny_checkpoints.py /tmp/tiny",
        "docker run --gpus all -e MODEL_ID=wan21_1b image",
        "export COMMIT=$(git rev-parse HEAD) && docker build .",
        'curl "https://api.runpod.ai/v2/$ENDPOINT_ID/run" -d @request.json',
        "curl -s https://api.runpod.ai/v2/ENDPOINT_ID/run -H 'Authorization: Bearer …' -d @test_input.json | jq .id",
    ],
)
def test_what_is_right_passes(shell: str) -> None:
    assert found_in(shell) == ""


@pytest.mark.parametrize(
    ("shell", "problem"),
    [
        ("make rum", "rum"),
        ("make run && make nothing", "nothing"),
        ("python -m tools.compare a b --shet x.png", "`--shet` is no option of `python -m tools.compare`"),
        ("python -m tools.compares a b", "there is no such module"),
        ("python -m unheard.of", "belongs to no class"),
        ("python -m tools.inspect_lora benchmarks/none.safetensors", "there is no `benchmarks/none.safetensors`"),
        (".venv/bin/python handler.py --rp_serve", "`--rp_serve` is no option of the SDK"),
        ("python builder/tiny.py x", "there is no `builder/tiny.py` in the project"),
        ("python builder/tiny_checkpoints.py --fast x", "`--fast` is no option"),
        ("export MODEL_IDS=wan21_1b", "`MODEL_IDS` is no variable of the worker"),
        ("export MODEL_ID=wan21_2b", "is not a model id"),
        ("DEVICE=gpu python handler.py", "DEVICE"),
        ("docker run -e MODELS=wan21_1b image", "`MODELS` is no variable"),
        ("docker build -f image/Dockerfile .", "there is no `image/Dockerfile` in the project"),
        ("frobnicate --all", "`frobnicate` belongs to no class of commands"),
        ("curl https://api.runpod.ai/v2/ID/runs", "is no operation of RunPod's API"),
        ("curl https://example.com/run", "neither the local API nor RunPod's"),
        ("curl http://localhost:8000/runsync -d @input.json", "there is no file `input.json`"),
        ("""curl http://localhost:8000/run -d '{"input": {"model": "wan21_1b"}}'""", "the worker would refuse it"),
        ("curl -Z http://localhost:8000/run", "`-Z` of curl is not known"),
    ],
)
def test_a_wrong_command_is_found(shell: str, problem: str) -> None:
    assert problem in found_in(shell)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"input": REQUEST}, ""),
        ({"input": REQUEST | {"contact_sheets": True}}, "did you mean `contact_sheet`?"),
        ({"input": REQUEST, "s3config": {}}, "`s3config` does not stand beside `input`"),
        ({"input": REQUEST, "s3Config": {"accessId": "a"}}, "s3Config.bucketName"),
        (RESULT, ""),
        ({"…": "more", "outputs": RESULT["outputs"]}, ""),
        ({"outputs": RESULT["outputs"], "timings": {"total": 3}}, "`model` is missing"),
        (RESULT | {"warning": []}, "`warning` does not exist"),
        (
            RESULT | {"outputs": {"videos": [VIDEO | {"poster": {"uri": "x"}}]}},
            "`outputs.videos[].poster.uri` does not exist",
        ),
        (RESULT | {"outputs": {"videos": [VIDEO | {"poster": None}]}}, ""),
        (RESULT | {"timings": {"total": "1.5"}}, "`timings.total` is float, not str"),
        (RESULT | {"errors": [{"prompt_index": 1, "code": "TOO_BIG", "message": ""}]}, "`TOO_BIG` is no error code"),
        ({"stage": "denoise", "percent": 3}, "`seconds_left` is missing"),
        ({"id": "a", "status": "COMPLETED", "result": {}}, "`result` is in no answer"),
        ({"error": "NO_IDEA: what"}, "`NO_IDEA` is no error code"),
        ({"something": "else"}, "is neither a job"),
    ],
)
def test_wrong_json_is_found(document: dict[str, Any], problem: str) -> None:
    found = "; ".join(checks.problems_of_json(json.dumps(document), RESULT))
    assert problem in found if problem else found == ""


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("LORA_CACHE_DIR=/volume/cache  # shared", ""),
        ("BUCKET_NAME=my-videos\nBUCKET_ACCESS_KEY_ID=…\nBUCKET_SECRET_ACCESS_KEY=…", ""),
        ("BUCKET_NAME=my-videos", "only partly configured"),
        ("PRESIGNED_URL_TTL=31536000", "PRESIGNED_URL_TTL"),
        ("LORA_FOLDER=/loras", "`LORA_FOLDER` is no variable"),
        ("TINY=.tiny", "`TINY` is no variable"),  # the Makefile's
    ],
)
def test_wrong_settings_are_found(settings: str, problem: str) -> None:
    found = "; ".join(checks.problems_of_settings(checks.settings_in(settings)))
    assert problem in found if problem else found == ""


def test_options_are_looked_for_where_the_subcommand_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {(): "usage: client COMMAND\n  run  make videos\n", ("run",): "usage: client run [--model ID]"}
    monkeypatch.setattr(checks, "help_of", lambda _, *subcommand: told[subcommand])
    monkeypatch.setattr(checks, "_is_module", lambda _: True)
    assert found_in("python -m client run job.json --model wan21_1b") == ""
    assert found_in("python -m client run --models x") == "`--models` is no option of `python -m client`"
    assert found_in("python -m client --model x") == "`--model` is no option of `python -m client`"


def test_a_path_that_is_not_there_is_found() -> None:
    assert list(checks.problems_of_path("worker/jobs.py")) == ["there is no `worker/jobs.py` in the project"]
    assert list(checks.problems_of_path("worker/job.py")) == list(checks.problems_of_path("output/x")) == []


def test_a_name_that_is_nowhere_is_found() -> None:
    assert list(checks.problems_of_name("UPLOAD_TIMEOUTS")) == [
        "`UPLOAD_TIMEOUTS` is neither a variable of the worker, nor an error code, nor in the code"
    ]
    assert [*checks.problems_of_name("UPLOAD_TIMEOUT"), *checks.problems_of_name("LORA_INVALID")] == []


def test_blocks_and_spans_are_found_with_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n`make run`\n\n```sh\nmake `x`\n```\n\n1. B\n\n   ~~~json\n   {}\n   ~~~\n\nand `make test`\n")
    blocks = [(block.line, block.language, block.text) for block in blocks_of(page)]
    assert blocks == [(5, "sh", "make `x`\n"), (11, "json", "{}\n")]
    assert [(span.line, span.text) for span in spans_of(page)] == [(3, "make run"), (15, "make test")]
