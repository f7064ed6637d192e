import pytest

from worker.errors import MEANING, Code, Problem, WorkerError

SIZE = Problem(Code.INVALID_INPUT, "prompts[0].width", "must be an integer; not 'big'")
LORA = Problem(Code.LORA_NOT_FOUND, "loras[0].path", "no such file")
MODEL = Problem(Code.MODEL_NOT_FOUND, "model", "this is no model id")


def test_the_text_of_an_error_starts_with_its_code():
    assert str(WorkerError(Code.TIMEOUT, "too slow")) == "TIMEOUT: too slow"


def test_one_problem_is_told_with_its_field():
    assert str(WorkerError.of([LORA])) == "LORA_NOT_FOUND: `loras[0].path`: no such file"


def test_a_problem_without_a_field_is_told_as_it_is():
    assert str(Problem(Code.INVALID_INPUT, "", "must be an object")) == "must be an object"


@pytest.mark.parametrize("problems", [[SIZE, LORA, MODEL], [LORA, MODEL, SIZE], [MODEL, SIZE, LORA]])
def test_the_code_of_several_problems_does_not_depend_on_their_order(problems):
    assert WorkerError.of(problems).code is Code.MODEL_NOT_FOUND


def test_a_broken_schema_comes_before_a_missing_file():
    assert WorkerError.of([LORA, SIZE]).code is Code.INVALID_INPUT


def test_every_problem_is_listed_and_those_of_another_code_name_it():
    assert str(WorkerError.of([SIZE, LORA])) == (
        "INVALID_INPUT: 2 problems: (1) `prompts[0].width`: must be an integer; not 'big'; "
        "(2) LORA_NOT_FOUND: `loras[0].path`: no such file"
    )


def test_the_problems_stay_with_the_error():
    assert WorkerError.of([SIZE, LORA]).problems == [SIZE, LORA]


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "\udc00\ud800"])
def test_lone_surrogates_are_replaced_so_that_the_text_is_valid_unicode(text):
    error = WorkerError(Code.INVALID_INPUT, f"not {text}")
    assert str(error).encode("utf-8").startswith(b"INVALID_INPUT: not ")
    assert "?" in error.message


def test_other_unicode_is_kept():
    assert WorkerError(Code.INVALID_INPUT, "naïve 🎬").message == "naïve 🎬"


def test_every_code_is_its_own_name_and_has_a_meaning():
    assert [str(code) for code in Code] == [code.name for code in Code]
    assert set(MEANING) == set(Code)
    assert all(MEANING.values())
