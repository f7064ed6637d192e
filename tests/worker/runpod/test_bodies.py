"""Every job that was handed out has an answer, whatever a client put into it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from worker.runpod.bodies import bodies_of, parse_jobs

GOOD = {"id": "good", "input": {"a": 1}}


def test_a_job_and_a_list_of_jobs_are_taken() -> None:
    assert parse_jobs(json.dumps(GOOD).encode()) == ([GOOD], [])
    assert parse_jobs(json.dumps([GOOD, GOOD | {"id": "b"}]).encode()) == ([GOOD, GOOD | {"id": "b"}], [])


@pytest.mark.parametrize(
    "body", [b"", b" ", b"null", b"[]", b"{}", b"3", b'"job"', b'["job"]', b"<html>", b'{"id": "a', b"\xff\xfe"]
)
def test_what_is_no_job_is_none(body: bytes) -> None:
    assert parse_jobs(body) == ([], [])


@pytest.mark.parametrize("job_id", [None, 3, "", []])
def test_a_job_without_an_id_takes_no_other_with_it(job_id: Any) -> None:
    assert parse_jobs(json.dumps([{"id": job_id, "input": {}}, GOOD]).encode()) == ([GOOD], [])


def test_a_job_without_an_input_is_taken_to_be_refused() -> None:
    assert parse_jobs(b'{"id": "a"}') == ([{"id": "a"}], [])


@pytest.mark.parametrize(("open", "close"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [3_000, 300_000])
def test_a_job_that_nests_too_deep_is_answered(open: str, close: str, depth: int) -> None:
    deep = open * depth + "1" + close * depth
    started = time.process_time()
    jobs, unreadable = parse_jobs(f'{{"input": {{"id": "not this", "x": {deep}}}, "id": "j\\u00f6b"}}'.encode())
    assert jobs == []
    ((job_id, error),) = unreadable
    assert job_id == "jöb"
    assert error == "INVALID_INPUT: the input nests lists or objects deeper than can be read; a request has four levels"
    assert time.process_time() - started < 5


def test_of_a_list_of_jobs_each_that_nests_too_deep_is_answered() -> None:
    deep = "[" * 5000 + "]" * 5000
    body = f'[{{"id": "a", "input": {deep}}}, {{"id": "b", "input": {{"id": "c"}}}}]'
    assert [job_id for job_id, _ in parse_jobs(body.encode())[1]] == ["a", "b"]


@pytest.mark.parametrize(("digits", "value"), [("9" * 5001, float("inf")), ("-" + "9" * 5001, float("-inf")), ("7", 7)])
def test_a_number_of_thousands_of_digits_is_one_that_no_field_takes(digits: str, value: float) -> None:
    [job], _ = parse_jobs(f'{{"id": "a", "input": {{"seed": {digits}}}}}'.encode())
    assert job["input"]["seed"] == value


RESULT = {"output": {"outputs": {"videos": [{"url": "https://a"}]}, "settings": {"x": 1}, "warnings": ["w"]}}


def test_a_result_that_is_too_large_is_sent_without_its_details_and_then_as_an_error() -> None:
    whole, smaller, error = (json.loads(body) for body in bodies_of(RESULT))
    assert whole == RESULT
    assert smaller["output"]["outputs"] == RESULT["output"]["outputs"] and smaller["output"]["settings"] == {}
    assert "result.json beside the files" in smaller["output"]["warnings"][0]
    assert error["error"].startswith("INTERNAL: the result is too large")


@pytest.mark.parametrize(
    ("result", "sent"),
    [
        ({"output": {"x": "a\ud800b"}}, {"output": {"x": "a?b"}}),
        ({"output": {"x": float("nan")}}, {"error": "INTERNAL: the result cannot be written as JSON"}),
    ],
)
def test_a_result_that_no_json_can_hold_is_sent_all_the_same(result: Any, sent: Any) -> None:
    assert json.loads(next(bodies_of(result))) == sent
