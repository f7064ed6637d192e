"""A failed job's error is a text. The client reads the problems back that the worker wrote into it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import JobFailed
from worker.errors import Code, Problem, WorkerError

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="`"), min_size=1).filter(
    lambda text: not re.search(r"; \(\d+\) |^[A-Z_]+: |^\d+ problems: ", text)
)
FIELDS = st.sampled_from(["", "model", "prompts[1].width"])


@given(st.lists(st.builds(Problem, st.sampled_from(Code), FIELDS, TEXTS), min_size=1))
def test_every_problem_of_an_error_is_read_back_from_its_text(problems: list[Problem]) -> None:
    written = WorkerError.of(problems)
    read = JobFailed(str(written))
    assert (read.problems, read.code) == (tuple(problems), written.code)


@pytest.mark.parametrize("text", ["Worker exited with 137", "NEW_CODE: of a later version", "", "(1) first; (2) second"])
def test_any_other_text_lists_no_problems(text: str) -> None:
    assert JobFailed(text).problems == ()
