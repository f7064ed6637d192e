"""Every command, request, result and setting in the documentation is run, or held against what decides it.

A block of no known kind fails: it is given a check here, or a place with a reason in one of the lists of checks.py.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import torch
import yaml
from safetensors.torch import save_file

from pipelines.catalog import MODELS
from tests.docs import checks
from tests.docs.blocks import PAGES, Block, blocks_of, commands_of, spans_of
from tests.tools.test_compare import FRAMES, written
from tests.tools.test_requests_from_config import config
from tests.worker_process import ROOT, LocalApi, environment, local_api
from worker.errors import WorkerError
from worker.parse import parse

Problems = Iterator[str]

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SPANS = [span for page in PAGES for span in spans_of(page)]

MESSAGES: dict[str, dict[str, Any]] = {
    "INVALID_INPUT: 2 problems:": {"prompts": [{"prompt": "a boat", "smaple_steps": 25, "width": 32}]},
    "INVALID_INPUT: `prompts[0].width`:": {"prompts": [{"prompt": "a boat", "width": 32}]},
}
"""How the error messages in `text` blocks begin, and what a request for wan21_1b must have in it to get them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Where the reader stands: with the files that the documentation has them send and look at. The job is a small one."""
    folder = tmp_path_factory.mktemp("reader")
    job = json.loads((ROOT / "test_input.json").read_text())
    job["input"]["prompts"][0] |= {"width": 64, "height": 64, "num_frames": 5, "sample_steps": 1}
    for name in ("test_input.json", *checks.OF_THE_READER):
        (folder / name).write_text(json.dumps(job))
    written(folder, "webp", FRAMES, "preview")
    written(folder, "png", FRAMES, "result")
    config(folder, {"prompts": ["a boat"]})
    (folder / "output/harbour").mkdir(parents=True)
    for name in ("my_lora", "boat", "output/harbour/harbour_high_noise"):
        (folder / f"{name}.safetensors").write_bytes((tiny / "loras/wan21_1b/rank4.safetensors").read_bytes())
    sides = {
        f"diffusion_model.transformer_{number}.blocks.0.self_attn.q.lora_{half}.weight" for number in (1, 2) for half in "AB"
    }
    save_file({key: torch.ones(2, 2) for key in sides}, folder / "harbour.safetensors")
    return folder


@pytest.fixture(scope="module")
def api(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    """`make serve`, on another port."""
    folder = tmp_path_factory.mktemp("api")
    with local_api(environment(tiny, "wan22_14b_t2v", OUTPUT_DIR=folder / "out"), folder) as api:
        yield api


@pytest.fixture(scope="module")
def result(api: LocalApi, folder: Path) -> dict[str, Any]:
    """A real one, with all there is."""
    request = json.loads((folder / "test_input.json").read_text())["input"]
    answer = api.run(request | {"contact_sheet": True})
    assert answer["status"] == "COMPLETED", answer
    return answer["output"]


def is_command(span: Block) -> bool:
    """Within a sentence: a program with its arguments, or NAME=value."""
    return bool(re.match(r"(make|python|\.venv/bin/python|curl|docker) \S|[A-Z][A-Z0-9_]+=\S", span.text))


def json_block(block: Block, request: pytest.FixtureRequest) -> Problems:
    """A request that is taken, or a result as it is."""
    yield from checks.problems_of_json(block.text, request.getfixturevalue("result"))


def settings_block(block: Block, _: pytest.FixtureRequest) -> Problems:
    """A worker starts with them."""
    yield from checks.problems_of_settings(checks.settings_in(block.text))


def shell_block(block: Block, _: pytest.FixtureRequest) -> Problems:
    """The commands exist, and take these options; what can be run is run below."""
    for words in commands_of(block.text):
        yield from checks.problems_of_command(words)


def python_block(block: Block, _: pytest.FixtureRequest) -> Problems:
    """It compiles, and what it imports is there."""
    tree = ast.parse(block.text, str(block))
    imports: list[ast.stmt] = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    compile(block.text, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    try:
        exec(compile(ast.Module(imports, []), str(block), "exec"), {})
    except ImportError as error:
        yield str(error)


def yaml_block(block: Block, _: pytest.FixtureRequest) -> Problems:
    if not yaml.safe_load(block.text):
        yield "is empty"


def shown_block(block: Block, _: pytest.FixtureRequest) -> Problems:
    """Not checked: there need be no JavaScript engine on a test machine."""
    return iter(())


def text_block(block: Block, _: pytest.FixtureRequest) -> Problems:
    """What is shown. An error message is the one that the worker gives."""
    if not re.match(r"[A-Z_]{4,}:", block.text):
        return
    yield from checks.problems_of_message(block.text)
    request = next((fields for start, fields in MESSAGES.items() if block.text.startswith(start)), None)
    if request is None:
        yield "write into MESSAGES of this test which request gets that message"
        return
    with pytest.raises(WorkerError) as caught:
        parse({"model": "wan21_1b", "loras": [{"path": "a.safetensors"}]} | request, MODELS["wan21_1b"])
    if str(caught.value) != block.text.strip():
        yield f"the worker says: {caught.value}"


KINDS: dict[str, Callable[[Block, pytest.FixtureRequest], Problems]] = {
    "dotenv": settings_block,
    "env": settings_block,
    "js": shown_block,
    "json": json_block,
    "python": python_block,
    "sh": shell_block,
    "text": text_block,
    "yaml": yaml_block,
}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_what_a_block_says_is_so(block: Block, request: pytest.FixtureRequest) -> None:
    check = KINDS.get(block.language)
    assert check, (
        f"{block}: a block of no kind that is checked, ```{block.language}; write one of {', '.join(KINDS)} behind its first "
        "marks, or give the new kind a check in tests/docs/test_blocks.py"
    )
    problems = list(check(block, request))
    assert not problems, f"{block}: " + "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_settings_and_files_within_the_text_exist(page: Path) -> None:
    problems = []
    for span in (span for span in SPANS if span.page == page):
        if is_command(span):
            problems += [f"{span}: {each}" for words in commands_of(span.text) for each in checks.problems_of_command(words)]
        elif span.text.startswith(checks.FOLDERS) and re.fullmatch(r"[\w./-]+", span.text):
            problems += [f"{span}: {each}" for each in checks.problems_of_path(span.text)]
        elif re.fullmatch(checks.NAME, span.text):
            problems += [f"{span}: {each}" for each in checks.problems_of_name(span.text)]
    assert not problems, "\n".join(problems)


# What is run.

_SHELL = [*(block for block in BLOCKS if block.language == "sh"), *(span for span in SPANS if is_command(span))]
COMMANDS = [(block, words) for block in _SHELL for words in commands_of(block.text)]
CURLS = [
    (block, words) for block, words in COMMANDS if words[0] == "curl" and checks.is_local(checks.parts_of_curl(words[1:])[0])
]
TOOLS = [(block, words) for block, words in COMMANDS if words[1:2] == ["-m"] and words[2].startswith("tools.") and words[3:]]


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl program")
@pytest.mark.parametrize(("block", "words"), CURLS, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_what_is_sent_to_the_local_api_is_answered(block: Block, words: list[str], api: LocalApi, folder: Path) -> None:
    url = checks.url_of_curl(words[1:])
    if checks.has_placeholder(url):
        path = urlsplit(url).path.split("/")[1]
        known = {route.split("/")[1] for route in requests.get(f"{api.url}/openapi.json", timeout=10).json()["paths"]}
        assert path in known, f"{block}: the local API has no /{path}"
        return
    status, answer = checks.send(words[1:], api.url, folder)
    assert status == 0, f"{block}: curl ended with {status}"
    assert json.loads(answer).get("status") in ("COMPLETED", "IN_QUEUE", "IN_PROGRESS"), f"{block}: {answer}"


@pytest.mark.parametrize(("block", "words"), TOOLS, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_tools_run_on_the_files_that_are_named(
    block: Block, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: it fits, 1: it does not. 2 is bad input."""
    monkeypatch.chdir(folder)
    status, output = checks.run_here(words[2], *words[3:])
    assert status in (0, 1), f"{block}: {output}"
