"""Checks of the JSON, settings and commands in the documentation. Each yields what is wrong, in words."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import runpod.serverless

from pipelines.catalog import MODELS
from tests.worker_process import ROOT
from worker.errors import Code, WorkerError
from worker.parse import parse
from worker.progress import Progress
from worker.settings import Settings, SettingsError, load_settings
from worker.storage.choice import storage_of_job

Problems = Iterator[str]

FOLDERS = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
"""What begins with one of them is a path of the project."""

NOT_RUN = {
    "aws": "needs an account",
    "docker": "needs a Docker engine",
    "git": "needs a repository on a server",
    "hf": "downloads weights of many gigabytes",
    "pip": "changes the environment that the tests run in",
    "runpodctl": "needs an account",
}
"""Commands whose words are not checked; variables that docker is given, and files that are named, are."""

OF_THE_SHELL = {"cat", "cd", "chmod", "cp", "echo", "jq", "ls", "mkdir", "mv", "open", "sleep", "unzip", "wait"}
"""Commands that say nothing of this project."""

OTHER_VARIABLES = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "ENDPOINT_ID",
    "HF_HOME",
    "OMP_NUM_THREADS",
    "PATH",
    "RUNPOD_API_KEY",
    "RUNPOD_INIT_TIMEOUT",
}
"""Variables that are not the worker's, and neither the Makefile's nor the image's."""

OF_RUNPOD = r"(AMPERE|ADA|HOPPER|BLACKWELL)_\d+(_PRO)?"
"""Its names for kinds of GPUs."""

OF_THE_READER = {"request.json"}
"""Files that a page tells the reader to write, and others to send."""

ONLY_HELP = {
    "benchmarks": "takes minutes",
    "builder": "fetches and writes gigabytes",
    "client": "needs an endpoint; its own tests run it against one",
    "mkdocs": "tests/docs/test_site.py runs it",
    "playground": "serves until it is stopped",
    "tests": "takes minutes",
    "tools": "needs files; those of which there are some are run in test_blocks.py",
}
"""Packages whose commands are not run here: their options are looked for in what `--help` says."""

NAME = r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b"

MADE_LATER = ("output/", "site/")
"""Folders that a command makes."""

RUNPOD_OPERATIONS = {"run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health"}
JOB = {"input", "s3Config", "id", "webhook", "policy"}
"""What can stand beside a request in the body that is sent to RunPod."""
ANSWER = {"id", "status", "input", "output", "error", "delayTime", "executionTime", "workerId", "retries", "stream", "progress"}


# JSON.


def problems_of_json(text: str, result: dict[str, Any]) -> Problems:
    """`result`: a real one, of a job for wan22_14b_t2v with a contact sheet."""
    try:
        document = json.loads(text)
    except ValueError as error:
        yield f"is no JSON: {error}"
        return
    if not isinstance(document, dict):
        yield "is no object"
    elif "input" in document and "status" not in document:
        yield from _problems_of_job(document)
    elif "outputs" in document:
        yield from _problems_of_result(document, result)
    elif "stage" in document:
        yield from differences(document, asyncio.run(_progress()), "")
    elif "status" in document or "id" in document:
        yield from (f"`{name}` is in no answer of RunPod's API" for name in document.keys() - ANSWER)
        if "outputs" in (document.get("output") or {}):
            yield from _problems_of_result(document["output"], result)
    elif set(document) == {"error"}:
        yield from problems_of_message(document["error"])
    else:
        yield (
            'is neither a job (with "input"), a result ("outputs"), progress ("stage"), an answer of the API ("status") nor an '
            'error ("error"); if it is something else, give it a check in tests/docs/checks.py'
        )


def _problems_of_job(job: dict[str, Any]) -> Problems:
    yield from (f"`{name}` does not stand beside `input`" for name in job.keys() - JOB)
    request = job["input"]
    model = request.get("model") if isinstance(request, dict) else None
    try:
        parse(request, MODELS.get(model, MODELS["wan21_1b"]))
        if "s3Config" in job:
            storage_of_job(job["s3Config"], Settings.model_construct(model_id="wan21_1b"))
    except WorkerError as error:
        yield f"the worker would refuse it: {error}"


def _problems_of_result(said: dict[str, Any], result: dict[str, Any]) -> Problems:
    for error in said.get("errors", []):
        yield from differences(error, {"prompt_index": 0, "code": "", "message": ""}, "errors[].")
        yield from problems_of_message(f"{error.get('code')}: ")
    yield from differences({name: value for name, value in said.items() if name != "errors"}, result, "")


def differences(said: Any, real: Any, where: str) -> Problems:
    """Keys that one has and the other not, and values of another type. `…` as a key stands for whatever is left out."""
    if isinstance(said, dict) and isinstance(real, dict):
        yield from (f"`{where}{name}` does not exist" for name in said.keys() - real.keys() - {"…"})
        if "…" not in said:
            yield from (f"`{where}{name}` is missing" for name in real.keys() - said.keys())
        for name in said.keys() & real.keys():
            yield from differences(said[name], real[name], f"{where}{name}.")
    elif isinstance(said, list) and isinstance(real, list):
        for item in said if real else []:
            yield from differences(item, real[0], f"{where[:-1]}[].")
    elif said is not None and real is not None and _kind(said) is not _kind(real):
        yield f"`{where[:-1]}` is {_kind(real).__name__}, not {_kind(said).__name__}"


def problems_of_path(path: str) -> Problems:
    """A file or folder of the project."""
    if not path.startswith(MADE_LATER) and not (ROOT / path).exists():
        yield f"there is no `{path}` in the project"


def problems_of_name(name: str) -> Problems:
    """A variable, a code or a constant that a sentence names."""
    if not _is_the_workers(name) and name not in _names_in_the_code() and not re.fullmatch(OF_RUNPOD, name):
        yield f"`{name}` is neither a variable of the worker, nor an error code, nor in the code"


@cache
def _names_in_the_code() -> set[str]:
    """What is written in capitals, with an underscore, in all that is not documentation or a test."""
    kinds = ("*.py", "*.js", "*.hcl", "*.yml", "*Dockerfile", "Makefile")
    folders = [ROOT / name for name in FOLDERS if name not in ("tests/", *MADE_LATER)]
    files = [file for kind in kinds for file in ROOT.glob(kind)] + list(ROOT.glob(".github/workflows/*.yml"))
    files += [file for kind in kinds for folder in folders for file in folder.rglob(kind)]
    return {name for file in files for name in re.findall(NAME, file.read_text(errors="replace"))}


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


async def _progress() -> dict[str, Any]:
    return Progress([1]).latest | {"seconds_left": 1.0}


def problems_of_message(text: str) -> Problems:
    code = text.partition(":")[0]
    if code not in set(Code):
        yield f"`{code}` is no error code"


# Settings.


def problems_of_settings(settings: dict[str, str]) -> Problems:
    """Whether a worker would start with these, a MODEL_ID given."""
    yield from (f"`{name}` is no variable of the worker" for name in settings if not _is_the_workers(name))
    known = {name: value for name, value in settings.items() if name.lower() in Settings.model_fields and value}
    try:
        with mock.patch.dict(os.environ, {"MODEL_ID": "wan21_1b"} | known, clear=True):
            load_settings()
    except (SettingsError, WorkerError) as error:
        yield f"the worker would not start: {error}"


def settings_in(lines: str) -> dict[str, str]:
    pairs = (line.split("#")[0].strip().removeprefix("export ").partition("=") for line in lines.splitlines())
    return {name: value.strip("\"'") for name, _, value in pairs if name}


# Commands.


def problems_of_command(words: list[str]) -> Problems:
    """Of one command, with the variables that are set before it."""
    variables = []
    while words and (words[0] == "export" or re.match(r"[A-Za-z_]\w*=", words[0])):
        variables.append(words[0])
        words = words[1:]
    pairs = [variable.partition("=") for variable in variables if "=" in variable]
    of_builds = {name for name in _variables_of_builds() if not _is_the_workers(name)}
    yield from problems_of_settings({name: value for name, _, value in pairs if "$" not in value and name not in of_builds})
    if words:
        yield from _problems_of_program(Path(words[0]).name, words[1:])


def _problems_of_program(name: str, arguments: list[str]) -> Problems:
    if name.startswith("python"):
        yield from _problems_of_python(arguments)
    elif name == "make":
        yield from _problems_of_make(arguments)
    elif name == "curl":
        yield from problems_of_curl(arguments)
    elif name in NOT_RUN:
        yield from _problems_of_files(arguments)
        if name == "docker":
            given = [value for option, value in itertools.pairwise(arguments) if option in ("-e", "--env")]
            yield from (f"`{each}` is no variable of the worker" for each in map(_name_of, given) if not _is_the_workers(each))
    elif name not in OF_THE_SHELL:
        yield (
            f"`{name}` belongs to no class of commands: run it in tests/docs/test_blocks.py, or put it with its reason into "
            "NOT_RUN of tests/docs/checks.py"
        )


def _name_of(assignment: str) -> str:
    return assignment.partition("=")[0]


def _is_the_workers(name: str) -> bool:
    return name.lower() in Settings.model_fields or name in OTHER_VARIABLES


@cache
def _variables_of_builds() -> set[str]:
    """What the Makefile, the Dockerfile and docker-bake.hcl take from the environment."""
    places = {"Makefile": r"\$\((\w+)\)", "Dockerfile": r"^ARG (\w+)", "docker-bake.hcl": r'^variable "(\w+)"'}
    files = {ROOT / name: pattern for name, pattern in places.items()}
    return {name for file, form in files.items() if file.is_file() for name in re.findall(form, file.read_text(), re.MULTILINE)}


def _problems_of_make(arguments: list[str]) -> Problems:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"`make {' '.join(arguments)}`: {done.stderr.strip()}"


def _problems_of_python(arguments: list[str]) -> Problems:
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        module, options = arguments[1], arguments[2:]
        if module.partition(".")[0] not in {*ONLY_HELP, "docs", "pytest"}:
            yield f"`python -m {module}`: the package belongs to no class; put it into ONLY_HELP of tests/docs/checks.py"
        elif not _is_module(module):
            yield f"`python -m {module}`: there is no such module"
        elif module.partition(".")[0] in ONLY_HELP:
            yield from _problems_of_files(options)
            yield from _unknown_options(options, f"python -m {module}", help_of(module, *_subcommand(module, options)))
    elif arguments and arguments[0].endswith(".py"):
        yield from _problems_of_files(arguments)
        if arguments[0] == "handler.py":
            known = inspect.getsource(runpod.serverless)
            yield from (f"`{option}` is no option of the SDK" for option in _options(arguments) if f'"{option}"' not in known)
        elif (ROOT / arguments[0]).is_file():
            yield from _unknown_options(arguments[1:], arguments[0], help_of(arguments[0]))
    elif arguments:
        yield f"`python {' '.join(arguments)}` names neither a module nor a file"


def _is_module(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
        return bool(found and (not found.submodule_search_locations or importlib.util.find_spec(f"{name}.__main__")))
    except ModuleNotFoundError:
        return False


def _subcommand(module: str, options: list[str]) -> list[str]:
    """`run` of `python -m client run --x`, when the help of the whole lists it."""
    first = options[0] if options and re.fullmatch(r"[a-z][a-z-]*", options[0]) else ""
    return [first] if first and re.search(rf"^\s+{first}\s|[{{,]{first}[,}}]", help_of(module), re.MULTILINE) else []


def _options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


def _unknown_options(words: list[str], command: str, help: str) -> Problems:
    if "usage" not in help.lower():
        yield f"`{command} --help` does not say how it is used"
        return
    for option in _options(words):
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help):
            yield f"`{option}` is no option of `{command}`"


@cache
def help_of(program: str, *subcommand: str) -> str:
    """What a module or a script prints with --help. In this process: torch is imported once."""
    status, output = run_here(program, *subcommand, "--help")
    return output if status == 0 else f"exit status {status}: {output}"


def run_here(program: str, *arguments: str) -> tuple[int, str]:
    """Run a module or a script as a command: (exit status, what it printed)."""
    output = io.StringIO()
    printing = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
    with printing[0], printing[1], mock.patch.object(sys, "argv", [program, *arguments]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a test has imported the module before
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                package = importlib.util.find_spec(program)
                inner = f"{program}.__main__" if package and package.submodule_search_locations else program
                runpy.run_module(inner, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, output.getvalue()


def _problems_of_files(arguments: list[str]) -> Problems:
    """Files of the project that a command names."""
    for word in arguments:
        if word.startswith(FOLDERS) or re.fullmatch(r"(\./)?[\w./-]*(\.py|Dockerfile|\.hcl|requirements[\w-]*\.txt)", word):
            yield from problems_of_path(word)


# curl.

_CURL = {"-X", "--request", "-H", "--header", "-d", "--data", "--json", "-o", "--output"}
"""Options with a value."""
_CURL_ALONE = {"-s", "-S", "-f", "-L", "-O", "-sS", "-fsS", "-sf", "-N", "--fail", "--silent", "--no-buffer"}


def is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1")


def has_placeholder(url: str) -> bool:
    """Something that the reader puts in: `$ID`, `<id>`, `JOB_ID`, `…`."""
    return bool(re.search(r"[$<{…]|/[A-Z][A-Z_]+\b", url))


def parts_of_curl(arguments: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """(URL, options with their values, options without one)."""
    url, options, alone, words = "", {}, [], iter(arguments)
    for word in words:
        if word in _CURL:
            options[word] = next(words, "")
        elif word.startswith("-"):
            alone.append(word)
        else:
            url = word
    return url, options, alone


def url_of_curl(arguments: list[str]) -> str:
    return parts_of_curl(arguments)[0]


def problems_of_curl(arguments: list[str]) -> Problems:
    """What can be told without sending it. Those to the local API are sent, see test_blocks.py."""
    url, options, alone = parts_of_curl(arguments)
    yield from (f"`{option}` of curl is not known here" for option in alone if option not in _CURL_ALONE)
    for body in (options.get(name) for name in ("-d", "--data", "--json")):
        if body and body.startswith("@"):
            if body[1:] not in OF_THE_READER and not (ROOT / body[1:]).is_file():
                yield f"there is no file `{body[1:]}` to send"
        elif body and "$" not in body:
            yield from problems_of_json(body, {})
    parts = urlsplit(url)
    if parts.hostname == "api.runpod.ai":
        operation = parts.path.split("/")[3:4]
        if parts.path.split("/")[1] != "v2" or not operation or operation[0] not in RUNPOD_OPERATIONS:
            yield f"`{url}` is no operation of RunPod's API; the known ones are {', '.join(sorted(RUNPOD_OPERATIONS))}"
    elif not is_local(url) and "$" not in url and not has_placeholder(url):
        yield f"`{url}` is neither the local API nor RunPod's"


def send(arguments: list[str], address: str, folder: Path) -> tuple[int, str]:
    """Run curl for the local API, which serves at `address`: (exit status, the answer)."""
    url = url_of_curl(arguments)
    there = urlsplit(url)._replace(netloc=urlsplit(address).netloc).geturl()
    words = [there if word == url else word for word in arguments]
    done = subprocess.run(["curl", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout
