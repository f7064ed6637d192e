"""`python -m client`: its stdout, its stderr and its exit statuses."""

from __future__ import annotations

import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from client import Client
from client.cli import _STATUS_OF, DONE, INTERRUPTED, _parser, main
from client.display import Display, line_of
from client.result import Progress
from pipelines.catalog import MODELS
from tests.client.conftest import BODY, REQUEST, picture, result, update
from tests.client.endpoint import KEY, Api, Script
from tests.faults import Dropped, Status, Unanswered
from tests.worker.web_server import Web
from tests.worker_process import ROOT, free_port

JOB = ["--endpoint", "endpoint"]


@pytest.fixture(autouse=True)
def _environment(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", api.base_url)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """The arguments of a successful run."""
    file = tmp_path / "request.json"
    file.write_text(json.dumps(REQUEST))
    return ["run", str(file), *JOB, "--output-dir", str(tmp_path / "videos")]


def test_a_run_prints_the_paths_and_nothing_else_on_stdout(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "videos/a-sailing-boat-at-sunset-7.mp4"
    assert out == f"{path}\n"
    assert path.read_bytes() == BODY
    lines = err.splitlines()
    assert lines[0] == "job job-1"
    assert lines[1:4] == ["waiting for a worker", "running", "denoise, step 1 of 10, 10%, 1 min 24 s left"]
    assert lines[-2:] == ["warning: a word", "prompts[0]: 64x64, 5 frames, seed 7"]
    assert KEY not in err


def test_json_prints_one_object(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["job_id"] == "job-1"
    (file,) = printed["files"]
    assert (file["prompt_index"], file["seed"], Path(file["path"]).read_bytes()) == (0, 7, BODY)
    assert printed["result"]["model"] == "wan21_1b"


def test_a_draft_says_how_long_the_full_run_takes(
    run: list[str], script: Script, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = result(web.url("/0.mp4"))
    answer["output"]["timings"] |= {"generate": 9.4, "full_run_estimate": 92.3}
    script.answers = [answer]
    assert main([*run, "--model", "wan21_14b", "--draft"]) == 0
    assert script.submitted[-1]["input"]["draft"] is True
    assert "a draft: the full run would take about 92 s of the GPU\n" in capsys.readouterr().err


def test_pictures_are_printed_after_their_video(
    run: list[str], script: Script, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.gives("/0.jpg", BODY)
    script.answers = [result(web.url("/0.mp4"), poster=picture(web.url("/0.jpg")), contact_sheet=picture(web.url("/0.jpg")))]
    videos = f"{tmp_path}/videos/a-sailing-boat-at-sunset-7"
    assert main([*run, "--contact-sheet"]) == 0
    assert script.submitted[-1]["input"]["contact_sheet"] is True
    assert capsys.readouterr().out == f"{videos}.mp4\n{videos}.sheet.jpg\n"
    assert main([*run, "--posters", "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert (file["contact_sheet"], file["poster"]) == (f"{videos}.sheet.jpg", f"{videos}.poster.jpg")
    script.answers = [result(web.url("/0.mp4"), contact_sheet=picture(web.url("/gone.jpg")))]
    assert main(run) == 5
    out, err = capsys.readouterr()
    assert (out, "DOWNLOAD_FAILED: prompts[0], contact sheet: " in err) == (f"{videos}.mp4\n", True)


def test_a_job_can_be_resumed_after_the_client_gave_up(run: list[str], tmp_path: Path, api: Api) -> None:
    api.faults.order("status", Dropped(), times=100)
    assert main([*run, "--patience", "0.2"]) == 3
    api.faults.forget()
    assert main(["resume", "job-1", *JOB, "--output-dir", str(tmp_path / "resumed")]) == 0
    assert [path.read_bytes() for path in (tmp_path / "resumed").iterdir()] == [BODY]
    assert api.times("run") == 1


def test_status_and_cancel_print_one_word(run: list[str], script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run) == 0
    script.answers = [update(40)]
    capsys.readouterr()
    assert main(["status", "job-1", *JOB]) == 0
    assert capsys.readouterr() == ("IN_PROGRESS\n", "denoise, step 4 of 10, 40%, 1 min 24 s left\n")
    assert main(["status", "job-1", *JOB, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["percent"] == 40
    assert main(["cancel", "job-1", *JOB]) == 0
    assert capsys.readouterr().out == "CANCELLED\n"
    assert main(["status", "job-1", *JOB]) == 0
    assert capsys.readouterr() == ("CANCELLED\n", "")


def test_models_prints_every_model_and_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{model_id} " in out for model_id in MODELS)
    assert re.search(r"\nprompts\[\]\.guidance_scale +4\.0 ", out)


@pytest.mark.parametrize("words", [["models"], ["run", "--help"]])
def test_a_closed_pipe_is_not_an_error(words: list[str]) -> None:
    """As `| head` does."""
    reads, writes = os.pipe()
    os.close(reads)
    command, env = [sys.executable, "-m", "client", *words], os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


# Exit statuses.


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        ({"status": "FAILED", "error": "LORA_NOT_FOUND: `loras[0].path`"}, 1, "LORA_NOT_FOUND: `loras[0].path`\n"),
        ({"status": "FAILED", "error": "it broke"}, 1, "JOB_FAILED: it broke\n"),
        ({"status": "CANCELLED"}, 4, "CANCELLED: the job was cancelled\n"),
        ({"status": "TIMED_OUT"}, 4, "TIMEOUT: RunPod stopped the job"),
    ],
)
def test_a_job_that_ends_badly(
    run: list[str], script: Script, answer: dict[str, Any], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [answer]
    assert main(run) == status
    out, err = capsys.readouterr()
    assert text in err and out == ""
    script.answers = [answer]
    assert main([*run, "--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["job_id"] == "job-2" and text.startswith(printed["error"]["code"])


def test_a_bad_request_is_2_and_nothing_is_sent(run: list[str], api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, "--width", "32", "--sample-steps", "0"]) == 2
    assert capsys.readouterr().err.count("\n  - `--") == 2
    with pytest.raises(SystemExit) as caught:
        main([*run, "--widht", "32"])
    assert caught.value.code == 2
    assert api.asked == []


def test_problems_of_options_have_the_names_of_options(
    run: list[str], tmp_path: Path, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    def problems(*arguments: str) -> list[str]:
        assert main(arguments) == 2
        return re.findall(r"^  - (.*)", capsys.readouterr().err, re.MULTILINE)

    given = ["run", *JOB, "--prompt", "a boat"]
    image, lora = problems(*given, "--model", "wan21_i2v_14b")[::-1]
    assert image.startswith("`--image`: is required by this model: an image of this computer")
    assert lora.startswith("`--lora`: is required: a file below the worker's LORA_DIR")
    (side,) = problems(*given, "--model", "wan22_14b_t2v", "--lora", "a.safetensors")
    assert side.startswith("`--lora`: needs its side with this model: write high=PATH")
    (model,) = problems(*given, "--model", "wan22_14b_t2", "--lora", "a.safetensors", "--guidance-scale", "3")
    assert model.startswith("`--model`: 'wan22_14b_t2' is not a model id; did you mean `wan22_14b_t2v`?")
    assert {problem.split("`")[1] for problem in problems(*given)} == {"--model", "--lora"}
    (width,) = problems(*run, "--width", "10")
    assert width.startswith("`--width`: must be an integer from 64 to 4096")
    (tmp_path / "bad.json").write_text(json.dumps(REQUEST | {"prompts": [{"prompt": "x", "fps": 0}]}))
    (in_file,) = problems("run", str(tmp_path / "bad.json"), *JOB)
    assert in_file.startswith("`prompts[0].fps`"), "what the file says has the file's names"
    assert api.asked == []


def test_no_key_a_wrong_one_and_no_connection_are_3(
    run: list[str], api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_WRONG")
    assert main(run) == 3
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert main(run) == 3
    assert "set RUNPOD_API_KEY" in capsys.readouterr().err
    assert main([*run[:2], "--url", f"http://127.0.0.1:{free_port()}", "--patience", "0.1"]) == 3
    assert main(["resume", "gone", "--endpoint", "other"]) == 3


def test_a_download_that_fails_is_5_and_the_other_files_are_fetched(
    run: list[str], script: Script, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    web.gives("/1.mp4", status=403)
    script.answers = [result(web.url("/1.mp4"), web.url("/0.mp4"), expires_at="2020-01-01T00:00:00Z")]
    assert main(run) == 5
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "URL_EXPIRED: prompts[0]: its URL expired" in err


def test_a_prompt_that_failed_is_5_and_the_others_are_fetched(
    run: list[str], script: Script, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [result(web.url("/0.mp4"))]
    script.answers[0]["output"]["errors"] = [{"prompt_index": 1, "code": "OUT_OF_MEMORY", "message": "too large"}]
    assert main(run) == 5
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "prompts[1] failed: OUT_OF_MEMORY: too large" in err


def test_a_submission_whose_answer_was_lost_is_6(run: list[str], api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.faults.order("run", Unanswered())
    assert main(run) == 6
    assert "the job may run, or it may not" in capsys.readouterr().err


def test_an_outage_is_reported_on_stderr(run: list[str], api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.faults.order("status", Status(502), times=2)
    assert main(run) == 0
    assert capsys.readouterr().err.count("status 502; retrying") == 1


def test_after_an_interrupt_the_job_runs_on_and_the_next_commands_are_printed(
    run: list[str], script: Script, api: Api, tmp_path: Path
) -> None:
    script.answers = [update(10)]
    process = subprocess.Popen(
        [sys.executable, "-m", "client", *run], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not api.times("status"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"python -m client resume job-1 --endpoint endpoint --output-dir {tmp_path}/videos\n" in err
    assert "python -m client cancel job-1 --endpoint endpoint\n" in err
    assert out == "" and "Traceback" not in err
    assert api.times("cancel") == 0


# The bar.


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Display() as display:
            display.show(Progress("job-1", "IN_QUEUE"))
            display.show(Progress("job-1", "IN_PROGRESS", "denoise", 1, 2, 7, 25, 64, 84.2))
            display.say("a word between")
            display.show(Progress("job-1", "COMPLETED"))
            terminal.write("a path")
            terminal.flush()
            display.say("a word at the end")
    shown = ""
    with suppress(OSError):  # the other end is closed
        while part := os.read(ours, 100_000):
            shown += part.decode()
    os.close(ours)
    assert "waiting for a worker" in shown
    assert "denoise 2/2" in shown and " 64% " in shown and "1 min 24 s left" in shown
    assert line_of(Progress("job-1", "IN_PROGRESS", "encode", 0, 1, 25, 25, 100, None)) == "encode, 99%", "it is not done yet"
    assert "a word between\r\n" in shown
    assert re.search(r"\r *\r(\x1b\[A)?a patha word at the end", shown), "the bar is gone, and not drawn again"


def test_the_client_needs_no_torch() -> None:
    code = "import sys, client.cli; sys.exit(bool({'torch', 'runpod', 'boto3', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The documentation.


def test_the_documentation_has_every_command_every_option_and_every_status() -> None:
    page = (ROOT / "docs/client.md").read_text()
    commands = _parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(re.findall(r"^\| `python -m client ([\w-]+)", page, re.MULTILINE)) == set(commands)
    known = {option for command in commands.values() for action in command._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w|-])--[a-z][a-z-]*", page)) <= known
    documented = {int(status) for status in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert documented == {DONE, *_STATUS_OF.values(), INTERRUPTED}


def test_the_documentation_has_the_patience() -> None:
    of_endpoint, of_local = (inspect.signature(make).parameters["patience"].default for make in (Client.endpoint, Client.local))
    assert f"{of_endpoint:.0f} by default, {of_local:.0f} for a local API" in (ROOT / "docs/client.md").read_text()


def test_the_documentation_has_every_exception() -> None:
    page = (ROOT / "docs/client.md").read_text()
    assert set(re.findall(r"^\| `([A-Z]\w+)`", page, re.MULTILINE)) == {error.__name__ for error in _STATUS_OF}


def test_what_a_server_sends_cannot_steer_the_terminal(
    run: list[str], script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [{"status": "FAILED", "error": "OUT_OF_MEMORY: \x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\rgone"}]
    assert main(run) == 1
    shown = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e\r") & set(shown.err + shown.out)
    assert "OUT_OF_MEMORY: ?]0;title??[2J?31m?evil?gone" in shown.err
