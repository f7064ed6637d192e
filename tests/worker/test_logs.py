import io
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime, timedelta

import pytest

from tests.worker_process import ROOT
from worker import logs
from worker.logs import hidden, log, redact, stage


@pytest.fixture
def lines(monkeypatch):
    """What the worker logs, as a function that gives the lines so far."""
    root, root_level, level = logging.getLogger(), logging.getLogger().level, log.level
    handlers = root.handlers[:]
    stream = io.StringIO()
    root.handlers.clear()  # pytest's own, which `force` would close
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        logs.configure()
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = handlers
    root.setLevel(root_level)
    logging.captureWarnings(False)
    log.setLevel(level)


def test_a_log_line_is_one_json_object(lines):
    log.info("stored %d files", 3, extra={"fields": {"job": "j1"}})
    [line] = lines()
    assert (line["level"], line["message"], line["job"]) == ("INFO", "stored 3 files", "j1")
    assert "gpu" not in line


def test_a_line_of_another_gpus_process_names_its_gpu():
    code = "from worker import logs; logs.configure(2); logs.log.info('ready')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["gpu"] == 2


@pytest.fixture
def far_from_utc(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
def test_the_time_is_utc_in_iso_8601_with_milliseconds(lines):
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    log.info("now")
    logged = lines()[0]["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", logged)
    assert before <= datetime.fromisoformat(logged) <= datetime.now(UTC)


def test_line_breaks_and_unicode_stay_within_the_line(lines):
    log.info("naïve\nsecond line")
    assert [line["message"] for line in lines()] == ["naïve\nsecond line"]


def test_a_field_that_json_does_not_know_is_written_as_text(lines):
    log.info("x", extra={"fields": {"where": ValueError("odd")}})
    assert lines()[0]["where"] == "odd"


def test_an_exception_is_logged_with_its_traceback_in_the_same_line(lines):
    try:
        raise KeyError("lost")
    except KeyError:
        log.exception("the job failed")
    [line] = lines()
    assert line["level"] == "ERROR"
    assert line["traceback"].startswith("Traceback") and "KeyError: 'lost'" in line["traceback"]


def test_other_libraries_are_logged_from_warnings_on(lines):
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("look here")
    assert [line["message"] for line in lines()] == ["look here"]


def test_a_stage_logs_its_name_fields_and_seconds(lines):
    with stage("upload", job="j1", bytes=5):
        pass
    [line] = lines()
    assert line["message"] == "upload done"
    assert (line["stage"], line["job"], line["bytes"]) == ("upload", "j1", 5)
    assert line["seconds"] >= 0


@pytest.mark.parametrize("error", [ValueError("secret"), KeyboardInterrupt("secret")])
def test_a_stage_that_fails_logs_the_kind_of_error_alone_and_lets_it_pass(lines, error):
    timings: dict[str, float] = {}
    with pytest.raises(type(error)), stage("fetch", timings):
        raise error
    [line] = lines()
    assert line["message"] == f"fetch {type(error).__name__}"
    assert "seconds" in line and "secret" not in json.dumps(line)
    assert "fetch" in timings


def test_a_stage_that_runs_twice_adds_its_seconds_up():
    timings = {"upload": 10.0}
    with stage("upload", timings):
        pass
    assert timings["upload"] >= 10.0


def test_a_stage_needs_no_timings():
    with stage("wait"):
        pass


SIGNED = "https://bucket.example.com/a.mp4?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=5ec2e7"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET {SIGNED} failed", "GET https://bucket.example.com/a.mp4?… failed"),
        (f"'{SIGNED}'", "'https://bucket.example.com/a.mp4?…'"),
        ('"GET /a.safetensors?token=5ec2e7 HTTP/1.1" 200', '"GET /a.safetensors?… HTTP/1.1" 200'),
        ("url: /a?response[x]=1&sig=5ec2e7 (Caused by", "url: /a?… (Caused by"),
        ("https://me:5ec2e7@example.com/a", "https://…@example.com/a"),
        ("Authorization: Bearer 5ec2e75ec2e7", "Authorization: Bearer …"),
        ("{'Authorization': 'Bearer hf_5ec2e75ec2e7'}", "{'Authorization': 'Bearer hf_…'}"),
        ("the token hf_5ec2e75ec2e7 is wrong", "the token hf_… is wrong"),
        ("AWS4-HMAC-SHA256 Credential=AKIA5EC2E75EC2E7AAAA/2026, Signature=5ec2e7", None),
        ("&X-Amz-Security-Token=5ec2e7&x=1", "&X-Amz-Security-Token=…&x=1"),
        ("Is it right? Yes: a = b, 832x480", "Is it right? Yes: a = b, 832x480"),
        ("prompts[0]: what? 3 steps", "prompts[0]: what? 3 steps"),
    ],
)
def test_what_looks_secret_is_taken_out_and_nothing_else(text, shown):
    if shown is not None:
        assert redact(text) == shown
    assert "5ec2e7" not in redact(text).lower()


def test_a_known_secret_is_in_no_message_field_or_traceback(lines):
    with hidden(["correct horse"]):
        try:
            raise ValueError("it is correct horse")
        except ValueError:
            log.exception("%s!", "correct horse", extra={"fields": {"why": "correct horse"}})
    log.info("the horse is correct")
    assert "correct horse" not in json.dumps(lines())
    assert lines()[0]["message"] == "…!" and lines()[1]["message"] == "the horse is correct"


def test_a_secret_is_hidden_as_long_as_one_job_has_it(lines):
    with hidden(["correct horse"]):
        with hidden(["correct horse"]):
            pass
        log.info("correct horse")
    assert lines()[0]["message"] == "…"


def test_a_secret_too_short_to_be_one_does_not_eat_the_log(lines):
    with hidden(["a", ""]):
        log.info("a value")
    assert lines()[0]["message"] == "a value"


def test_what_libraries_log_and_warn_is_guarded_too(lines):
    logging.getLogger("urllib3.connectionpool").warning("Retrying: %s", SIGNED)
    warnings.warn(f"slow: {SIGNED}", stacklevel=1)
    assert len(lines()) == 2 and "5ec2e7" not in json.dumps(lines())


def test_a_library_line_with_wrong_arguments_is_still_logged(lines):
    logging.getLogger("some.library").warning("%d of %d", "one")
    assert lines()[0]["message"] == "%d of %d"


def test_every_secret_is_hidden_while_another_job_ends():
    """The list of secrets changes while a line is redacted."""
    other = hidden(["the other job's"])
    other.__enter__()

    class Line(str):
        def replace(self, old: str, new: str, count: int = -1) -> str:
            if old == "the other job's":
                other.__exit__(None, None, None)
            return Line(str.replace(self, old, new, count))

    with hidden(["my own secret"]):
        assert "secret" not in redact(Line("here is my own secret"))


def test_a_job_that_ends_does_not_show_the_secret_that_another_one_has_too():
    with hidden(["shared secret"]):
        with hidden(["shared secret"]):
            pass
        assert redact("a shared secret") == "a …"
    assert redact("a shared secret") == "a shared secret"


def test_a_closed_stderr_stops_nothing(lines):
    assert lines() == []
    logging.getLogger().handlers[0].stream.close()
    log.info("nobody reads this")
