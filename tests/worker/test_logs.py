import io
import json
import logging
import re
import time
from datetime import UTC, datetime, timedelta

import pytest

from worker import logs
from worker.logs import log, stage


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
    log.setLevel(level)


def test_a_log_line_is_one_json_object(lines):
    log.info("stored %d files", 3, extra={"fields": {"job": "j1"}})
    [line] = lines()
    assert (line["level"], line["message"], line["job"]) == ("INFO", "stored 3 files", "j1")


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
