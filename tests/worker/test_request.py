from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipelines.catalog import MODELS, ModelSpec
from pipelines.recipes import documented, draft_of, preview
from worker.decide import Shot, shots_of
from worker.delivery import Identity
from worker.errors import Code, WorkerError
from worker.parse import parse
from worker.request import MAX_SEED, Prompt, Request

SINGLE = MODELS["wan21_1b"]
MOE = MODELS["wan22_14b_t2v"]
I2V_14B = MODELS["wan22_14b_i2v"]
IMAGE = MODELS["wan21_i2v_14b"]
EITHER = MODELS["wan22_5b"]


def an_input(spec=SINGLE, first: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A request that is fine for `spec`, with these fields of the first prompt and of the request set."""
    lora = {"path": "job/name.safetensors"} | ({"transformer": "high"} if spec.moe else {})
    image = {"ctrl_img": "https://example.com/i.png"} if spec.control_image == "required" else {}
    return {"model": spec.id, "loras": [lora], "prompts": [{"prompt": "a boat"} | image | (first or {})]} | fields


def error_of(raw: Any, model=SINGLE) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        parse(raw, model)
    return caught.value


def found(raw: Any, model=SINGLE) -> list[tuple[str, str]]:
    """(code, field) of every problem."""
    return [(problem.code.value, problem.field) for problem in error_of(raw, model).problems]


def shots(raw: Any, model=SINGLE) -> list[Shot]:
    """As the request's `match` says; `preview` by the newest trainer."""
    request = parse(raw, model)
    recipe_for = partial(preview, model, "flowmatch", "it is new") if request.match == "preview" else partial(documented, model)
    return shots_of(request, recipe_for, Identity.of(None, raw).seed, {})


def shot_of(prompt: dict[str, Any], model=SINGLE, **fields: Any) -> Shot:
    return shots(an_input(model, prompt, **fields), model)[0]


def control_image_of(prompt: dict[str, Any]) -> tuple[str, str] | None:
    return parse(an_input(EITHER, prompt), EITHER).prompts[0].control_image


# What is accepted


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_smallest_request_of_every_model_is_accepted_with_the_documented_defaults(model):
    [shot] = shots(an_input(model), model)
    video = shot.sampling
    assert (video.width, video.height, video.num_frames, shot.fps) == (1024, 1024, 41, 16)
    assert (video.num_inference_steps, video.guidance_scale, video.negative_prompt, video.seed) == (25, 4.0, "", 42)
    assert (shot.recipe, shot.warnings) == (documented(model), ())


def test_the_defaults_of_the_request_itself():
    request = parse(an_input(), SINGLE)
    assert (request.output_format, request.trigger_word, request.hf_token) == ("mp4", None, None)
    assert request.contact_sheet is False
    assert (request.loras[0].network_multiplier, request.loras[0].transformer) == (1.0, None)
    assert (request.match, request.prompts[0].sampler, request.prompts[0].control_image) == (None, None, None)


@pytest.mark.parametrize("match", ["documented", "preview"])
def test_a_request_can_say_what_its_videos_match(match):
    assert parse(an_input(match=match), SINGLE).match == match


@pytest.mark.parametrize("name", [name for name, info in Prompt.model_fields.items() if not info.is_required()])
def test_null_in_a_prompt_is_the_default(name):
    assert parse(an_input(first={name: None}), SINGLE) == parse(an_input(), SINGLE)


@pytest.mark.parametrize("name", [name for name, info in Request.model_fields.items() if not info.is_required()])
def test_null_in_the_request_is_the_default(name):
    assert parse(an_input(**{name: None}), SINGLE) == parse(an_input(), SINGLE)


@pytest.mark.parametrize("name", ["transformer", "network_multiplier"])
def test_null_in_a_lora_is_the_default(name):
    assert parse(an_input(loras=[{"path": "job/name.safetensors", name: None}]), SINGLE) == parse(an_input(), SINGLE)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("width", [64, 4096]),
        ("height", [64, 4096]),
        ("sample_steps", [1, 150]),
        ("guidance_scale", [0, 20, 3.5]),
        ("seed", [-1, 0, MAX_SEED]),
        ("num_frames", [1, 1000]),
        ("fps", [1, 120]),
        ("sampler", ["unipc", "flowmatch"]),
        ("neg", ["", "blurry"]),
    ],
)
def test_the_ends_of_every_range_are_accepted(name, values):
    for value in values:
        assert getattr(parse(an_input(first={name: value}), SINGLE).prompts[0], name) == value


WHOLE = {"width": 832.0, "height": 480.0, "sample_steps": 25.0, "seed": 42.0, "num_frames": 41.0, "fps": 24.0}


@pytest.mark.parametrize(("name", "value"), WHOLE.items())
def test_a_whole_number_with_a_point_is_an_integer_as_many_languages_write_it(name, value):
    taken = getattr(parse(an_input(first={name: value}), SINGLE).prompts[0], name)
    assert (taken, type(taken)) == (value, int)


def test_a_whole_number_that_is_out_of_range_is_refused_as_an_integer_is():
    assert found(an_input(first={"fps": 121.0})) == found(an_input(first={"fps": 121})) != []


@pytest.mark.parametrize("scale", [-2, 0, 1, 2, 0.75])
def test_a_network_multiplier_lies_between_minus_two_and_two(scale):
    assert (
        parse(an_input(loras=[{"path": "a.safetensors", "network_multiplier": scale}]), SINGLE).loras[0].network_multiplier
        == scale
    )


@pytest.mark.parametrize("sides", [["high"], ["low"], ["high", "low"], ["low", "high"]])
def test_a_moe_model_takes_one_lora_for_each_side_and_can_do_without_one(sides):
    loras = [{"path": f"{side}.safetensors", "transformer": side} for side in sides]
    assert [lora.transformer for lora in parse(an_input(MOE, loras=loras), MOE).loras] == sides


@pytest.mark.parametrize(
    "path",
    [
        "name.safetensors",
        "job/name.safetensors",
        "a..b/..c.safetensors",
        "HTTPS://example.com/x.safetensors",
        "https://huggingface.co/me/lora/blob/main/x.safetensors",
        "https://example.com/tree/x.safetensors",
    ],
)
def test_files_and_urls_are_accepted_as_lora_paths(path):
    assert parse(an_input(loras=[{"path": path}]), SINGLE).loras[0].path == path


@pytest.mark.parametrize("prompt", [{}, {"ctrl_img": ""}, {"ctrl_img": None, "ctrl_img_1": ""}])
def test_an_optional_control_image_can_be_left_out(prompt):
    assert control_image_of(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({"ctrl_img": "https://a/i.png"}, "ctrl_img"),
        ({"ctrl_img_1": "https://a/i.png"}, "ctrl_img_1"),
        ({"ctrl_img": " ", "ctrl_img_1": "https://a/i.png"}, "ctrl_img_1"),
        (dict.fromkeys(("ctrl_img", "ctrl_img_1"), "https://a/i.png"), "ctrl_img"),
    ],
)
def test_ctrl_img_and_ctrl_img_1_are_the_same_field(prompt, field):
    assert control_image_of(prompt) == (field, "https://a/i.png")


@pytest.mark.parametrize("name", ["ctrl_img", "ctrl_img_1"])
def test_a_control_image_is_taken_without_the_space_around_it_and_knows_its_field(name):
    assert control_image_of({name: " https://a/i.png\n"}) == (name, "https://a/i.png")


# What is refused: (change, code, field)

WRONG_PROMPT_FIELDS = {
    "width": [63, 4097, "832", 832.5, True, [832]],
    "height": [63, 4097, "480", -480],
    "sample_steps": [0, 151, "25", True],
    "guidance_scale": [-0.1, 20.1, "4", True, float("nan"), float("inf")],
    "seed": [-2, MAX_SEED + 1, "42", 4.2],
    "num_frames": [0, 1001, "41", 40.5],
    "fps": [0, 121, "16"],
    "sampler": ["euler", "", 1],
    "neg": [1, ["blurry"]],
    "trigger_word": [1, {}],
    "ctrl_img": [1, ["https://a/i.png"], {"url": "https://a/i.png"}],
    "prompt": [None, 1, ["a boat"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_PROMPT_FIELDS.items() for value in values])
def test_a_wrong_value_in_a_prompt_is_named_with_its_path(name, value):
    assert found(an_input(EITHER, {name: value}), EITHER) == [("INVALID_INPUT", f"prompts[0].{name}")]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": None}, "prompts"),
        ({"prompts": "a boat"}, "prompts"),
        ({"prompts": {"prompt": "a boat"}}, "prompts"),
        ({"prompts": ["a boat"]}, "prompts[0]"),
        ({"prompts": [{"prompt": "a boat"}, {}]}, "prompts[1].prompt"),
        ({"loras": "a.safetensors"}, "loras"),
        ({"loras": {"path": "a.safetensors"}}, "loras"),
        ({"loras": ["a.safetensors"]}, "loras[0]"),
        ({"loras": [{}]}, "loras[0].path"),
        ({"loras": [{"path": None}]}, "loras[0].path"),
        ({"loras": [{"path": 7}]}, "loras[0].path"),
        ({"loras": [{"path": "a", "network_multiplier": 2.1}]}, "loras[0].network_multiplier"),
        ({"loras": [{"path": "a", "network_multiplier": -2.1}]}, "loras[0].network_multiplier"),
        ({"loras": [{"path": "a", "network_multiplier": "1"}]}, "loras[0].network_multiplier"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"output_format": "avi"}, "output_format"),
        ({"output_format": "MP4"}, "output_format"),
        ({"match": "trainer"}, "match"),
        ({"match": "Preview"}, "match"),
        ({"match": ""}, "match"),
        ({"match": True}, "match"),
        ({"hf_token": 5}, "hf_token"),
        ({"trigger_word": ["sks"]}, "trigger_word"),
        ({"contact_sheet": "true"}, "contact_sheet"),
        ({"contact_sheet": 1}, "contact_sheet"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_value_in_the_request_is_named_with_its_path(fields, field):
    assert found(an_input(**fields)) == [("INVALID_INPUT", field)]


@pytest.mark.parametrize("name", ["model", "prompts"])
def test_a_required_field_that_is_missing_is_named(name):
    raw = an_input()
    del raw[name]
    assert found(raw) == [("INVALID_INPUT", name)]


@pytest.mark.parametrize("raw", [None, [], "text", 5, True, 1.5])
def test_an_input_that_is_no_object_is_refused_in_words(raw):
    assert str(error_of(raw)) == "INVALID_INPUT: `input` must be an object with the fields model, loras and prompts"


@pytest.mark.parametrize(
    "path",
    [
        "/loras/a.safetensors",
        "~/a.safetensors",
        "../a.safetensors",
        "job/../../a.safetensors",
        "job\\..\\a.safetensors",
        "\\\\host\\a.safetensors",
        "a\0.safetensors",
        "ftp://example.com/a.safetensors",
        "file:///etc/passwd",
        "s3://bucket/a.safetensors",
        "https://",
        "https:///a.safetensors",
        "https://huggingface.co/me/lora/tree/main",
        "https://hf.co/me/lora/tree/main/folder",
    ],
)
def test_a_lora_path_that_cannot_be_fetched_is_invalid_input(path):
    assert found(an_input(loras=[{"path": path}])) == [("INVALID_INPUT", "loras[0].path")]


@pytest.mark.parametrize("path", ["https://[", "http://[::1", "https://[zz]/a.safetensors", "https://a\uff03b/c"])
def test_a_lora_url_whose_host_is_no_host_is_invalid_input(path):
    assert found(an_input(loras=[{"path": path}])) == [("INVALID_INPUT", "loras[0].path")]


@pytest.mark.parametrize(
    ("model", "loras", "problems"),
    [
        (SINGLE, [], [("LORA_FILE_REQUIRED", "loras")]),
        (SINGLE, None, [("LORA_FILE_REQUIRED", "loras")]),
        (MOE, [], [("LORA_FILE_REQUIRED", "loras")]),
        (SINGLE, [{"path": ""}], [("LORA_FILE_REQUIRED", "loras[0].path")]),
        (SINGLE, [{"path": "  "}], [("LORA_FILE_REQUIRED", "loras[0].path")]),
        (SINGLE, [{"path": "a"}, {"path": "b"}], [("SINGLE_LORA_ONLY", "loras")]),
        (SINGLE, [{"path": "a", "transformer": "high"}], [("MOE_FORMAT_NOT_SUPPORTED", "loras[0].transformer")]),
        (MOE, [{"path": "a"}], [("MOE_FORMAT_REQUIRED", "loras[0].transformer")]),
        (
            MOE,
            [{"path": "a", "transformer": "high"}, {"path": "b"}],
            [("MOE_FORMAT_REQUIRED", "loras[1].transformer")],
        ),
        (
            MOE,
            [{"path": "a", "transformer": "low"}, {"path": "b", "transformer": "low"}],
            [("SINGLE_MOE_CONFIG_ONLY", "loras")],
        ),
        (
            MOE,
            [{"path": side, "transformer": side} for side in ("high", "low", "high")],
            [("SINGLE_MOE_CONFIG_ONLY", "loras")],
        ),
        (
            MOE,
            [{"path": "a", "transformer": "high"}, {"path": "b", "transformer": "low"}, {"path": "c"}],
            [("MOE_FORMAT_REQUIRED", "loras[2].transformer"), ("SINGLE_MOE_CONFIG_ONLY", "loras")],
        ),
        (MOE, [{"path": "a", "transformer": "middle"}], [("INVALID_INPUT", "loras[0].transformer")]),
    ],
)
def test_loras_in_a_form_that_the_model_does_not_take(model, loras, problems):
    assert found(an_input(model, loras=loras), model) == problems


def test_a_request_without_loras_says_what_one_looks_like():
    raw = an_input(MOE)
    del raw["loras"]
    assert str(error_of(raw, MOE)).endswith('such as [{"path": "job/name.safetensors", "transformer": "high"}]')


@pytest.mark.parametrize("prompt", [{"ctrl_img": None}, {"ctrl_img": ""}, {"ctrl_img": "", "ctrl_img_1": " \n"}])
def test_an_image_to_video_model_requires_a_control_image(prompt):
    assert found(an_input(IMAGE, prompt), IMAGE) == [("CONTROL_IMAGE_REQUIRED", "prompts[0].ctrl_img")]


@pytest.mark.parametrize("name", ["ctrl_img", "ctrl_img_1"])
def test_a_text_to_video_model_takes_no_control_image_and_says_which_do(name):
    error = error_of(an_input(SINGLE, {name: "https://a/i.png"}))
    assert [problem.field for problem in error.problems] == [f"prompts[0].{name}"]
    assert "wan22_5b" in str(error) and "wan22_14b_t2v" not in str(error)


def test_two_different_control_images_are_an_error():
    prompt = {"ctrl_img": "https://a/1.png", "ctrl_img_1": "https://a/2.png"}
    assert found(an_input(IMAGE, prompt), IMAGE) == [("INVALID_INPUT", "prompts[0].ctrl_img")]


def test_an_unknown_model_lists_the_known_ones():
    error = error_of(an_input(model="wan99"))
    assert (error.code, error.problems[0].field) == (Code.MODEL_NOT_FOUND, "model")
    assert "'wan99'" in str(error) and all(model_id in str(error) for model_id in MODELS)


def test_a_misspelt_model_names_the_nearest_and_its_rules_are_not_guessed():
    raw = an_input(IMAGE) | {"model": "wan22_14b_I2v"}  # no control image, and no side for the LoRA
    assert found(raw, IMAGE) == [("MODEL_NOT_FOUND", "model")]
    assert "did you mean `wan22_14b_i2v`?" in str(error_of(raw))


def test_a_model_of_another_worker_is_told_apart_from_an_unknown_one():
    error = error_of(an_input(MOE), SINGLE)
    assert error.code is Code.MODEL_NOT_SERVED
    assert "serves wan21_1b, not wan22_14b_t2v" in str(error)


def test_a_request_for_another_model_is_checked_by_the_rules_of_that_model():
    raw = an_input(MOE, loras=[{"path": "a"}])
    assert found(raw, SINGLE) == [("MODEL_NOT_SERVED", "model"), ("MOE_FORMAT_REQUIRED", "loras[0].transformer")]


def test_one_error_lists_every_problem_of_every_kind():
    raw = an_input(
        IMAGE,
        loras=[{"path": "/a", "transformer": "high"}],
        prompts=[{"prompt": "a", "width": 10, "stepz": 3}, {"ctrl_img": "https://a/i.png", "fps": "24"}],
    )
    problems = found(raw, IMAGE)
    assert sorted(problems) == [
        ("CONTROL_IMAGE_REQUIRED", "prompts[0].ctrl_img"),
        ("INVALID_INPUT", "loras[0].path"),
        ("INVALID_INPUT", "prompts[0].stepz"),
        ("INVALID_INPUT", "prompts[0].width"),
        ("INVALID_INPUT", "prompts[1].fps"),
        ("INVALID_INPUT", "prompts[1].prompt"),
        ("MOE_FORMAT_NOT_SUPPORTED", "loras[0].transformer"),
    ]
    assert str(error_of(raw, IMAGE)).startswith("INVALID_INPUT: 7 problems: (1) ")


def test_an_error_says_the_rule_what_was_sent_and_a_value_that_would_do():
    assert str(error_of(an_input(first={"width": 10}))) == (
        "INVALID_INPUT: `prompts[0].width`: must be an integer from 64 to 4096, such as 832; got 10"
    )
    assert "`contact_sheet`: must be true or false; got 1" in str(error_of(an_input(contact_sheet=1)))
    assert '"mp4", "webp", "gif", "png"; got \'avi\'' in str(error_of(an_input(output_format="avi")))


@pytest.mark.parametrize(
    ("fields", "field", "most"),
    [
        ({"prompts": [{"prompt": "x" * 10_001}]}, "prompts[0].prompt", 10_000),
        ({"prompts": [{"prompt": "a", "neg": "x" * 10_001}]}, "prompts[0].neg", 10_000),
        ({"prompts": [{"prompt": "a", "trigger_word": "x" * 501}]}, "prompts[0].trigger_word", 500),
        ({"trigger_word": "x" * 501}, "trigger_word", 500),
        ({"hf_token": "x" * 501}, "hf_token", 500),
        ({"loras": [{"path": "a/" * 4097}]}, "loras[0].path", 8192),
    ],
)
def test_texts_have_a_length_that_an_error_names(fields, field, most):
    [problem] = error_of(an_input(**fields)).problems
    assert problem.field == field
    assert f"a string of at most {most} characters" in problem.text


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": [{"prompt": "a", "width": 1}] * 1_000},
        {"prompts": [{"prompt": "a", "widht": 1}] * 1_000},
        {f"surprise{number}": 1 for number in range(4_000)},
        {"prompts": [{"prompt": "\ud800"}] * 4_000},
    ],
    ids=["numbers", "fields", "fields of the request", "surrogates"],
)
def test_of_very_many_problems_the_first_hundred_are_told(fields):
    error = error_of(an_input(**fields))
    assert len(error.problems) == 100
    assert str(error).endswith("(100) there are more than 100 problems; correct these first")
    assert len(str(error)) < 25_000


def test_more_prompts_than_a_result_can_hold_are_refused():
    [problem] = error_of(an_input(prompts=[{"prompt": "a"}] * 1_001)).problems
    assert problem.text == "must be a list with at least one item and 1000 at most; got a filled list of 1001"


def test_the_path_of_a_deep_place_is_cut_short():
    deep = "\ud800"
    for _ in range(900):
        deep = [deep]
    assert found(an_input(first={"prompt": deep})) == [("INVALID_INPUT", "prompts[0].prompt[0][0][0]…")]


def test_a_hundred_problems_are_all_told():
    error = error_of(an_input(prompts=[{"prompt": "a", "width": 1}] * 100))
    assert [problem.field for problem in error.problems] == [f"prompts[{index}].width" for index in range(100)]


# Hints


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("steps", "sample_steps"),
        ("num_inference_steps", "sample_steps"),
        ("sample_step", "sample_steps"),
        ("cfg", "guidance_scale"),
        ("guidance", "guidance_scale"),
        ("negative_prompt", "neg"),
        ("image", "ctrl_img"),
        ("ctrl_image", "ctrl_img"),
        ("frames", "num_frames"),
        ("Width", "width"),
        ("heigth", "height"),
        ("hf_token", "hf_token` of the request itself"),
        ("output_format", "output_format` of the request itself"),
        ("network_multiplier", "loras[].network_multiplier"),
    ],
)
def test_an_unknown_field_of_a_prompt_names_the_nearest_one(name, hint):
    text = str(error_of(an_input(first={name: 1})))
    assert f"`prompts[0].{name}`: is not a field here; did you mean `{hint}" in text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("prompt", "prompts[].prompt"),
        ("lora", "loras"),
        ("width", "prompts[].width"),
        ("seed", "prompts[].seed"),
        ("format", "output_format"),
    ],
)
def test_an_unknown_field_of_the_request_names_the_nearest_one(name, hint):
    assert f"`{name}`: is not a field here; did you mean `{hint}`" in str(error_of(an_input(**{name: 1})))


@pytest.mark.parametrize(
    ("name", "hint"), [("strength", "network_multiplier"), ("weight", "network_multiplier"), ("paht", "path")]
)
def test_an_unknown_field_of_a_lora_names_the_nearest_one(name, hint):
    raw = an_input(loras=[{"path": "a", name: 1}])
    assert f"`loras[0].{name}`: is not a field here; did you mean `{hint}`?" in str(error_of(raw))


def test_a_field_like_no_other_is_answered_with_the_list_of_fields():
    assert "the fields here are model, loras, extra_loras" in str(error_of(an_input(zzzzzz=1)))


# Secrets

SECRET = "S3cr3t"
PIN = 8675309


@pytest.mark.parametrize(
    "change",
    [
        {"hf_token": [f"hf_{SECRET}"]},
        {"hf_token": {"token": f"hf_{SECRET}"}},
        {"loras": [{"path": f"https://huggingface.co/tree/{SECRET}"}]},
        {"loras": [{"path": f"ftp://user:{SECRET}@example.com/a"}]},
        {"loras": [{"path": f"/home/{SECRET}/a.safetensors"}]},
        {"loras": [{"path": [SECRET]}]},
        {"loras": [f"https://example.com/{SECRET}"]},
        {"loras": f"https://example.com/a?sig={SECRET}"},
        {"prompts": [{"prompt": "a", "ctrl_img": f"https://example.com/i.png?sig={SECRET}"}]},
        {"prompts": [{"prompt": "a", "ctrl_img": [SECRET]}]},
        {"prompts": [{"prompt": "a", "hf_token": SECRET}]},
        {"prompts": [{"prompt": "a", "width": f"https://example.com/?sig={SECRET}"}]},
        {"model": f"https://example.com/?sig={SECRET}"},
        {"output_format": f"/home/{SECRET}"},
        {"token": SECRET},
        {"model": f"hf_{SECRET:x<34}"},
        {"output_format": f"hf_{SECRET:x<34}"},
    ],
)
def test_tokens_urls_and_paths_are_not_repeated_in_an_error(change):
    assert SECRET not in str(error_of(an_input(**change)))


@pytest.mark.parametrize(
    "change",
    [{"hf_token": PIN}, {"loras": [{"path": PIN}]}, {"prompts": [{"prompt": "a", "ctrl_img": PIN, "ctrl_img_1": PIN}]}],
)
def test_numbers_in_the_place_of_secrets_are_not_repeated_either(change):
    assert str(PIN) not in str(error_of(an_input(**change)))


def test_tokens_and_images_are_not_in_the_text_of_a_request():
    request = parse(an_input(EITHER, {"prompt": "a"}, hf_token=SECRET), EITHER)
    assert SECRET not in repr(request)
    assert SECRET not in repr(shot_of({"ctrl_img": f"https://a/{SECRET}"}, EITHER))


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (an_input(first={"prompt": "\ud800"}), "prompts[0].prompt"),
        (an_input(trigger_word="a\udfff"), "trigger_word"),
        (an_input(first={"\ud800": 1}), "prompts[0].?"),
        (an_input(first={"neg": ["\ud800"]}), "prompts[0].neg[0]"),
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(raw, field):
    assert found(raw) == [("INVALID_INPUT", field)]


# What will be made


MATCHES = pytest.mark.parametrize("match", ["documented", "preview"])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@MATCHES
@given(width=st.integers(64, 4096), height=st.integers(64, 4096))
def test_sizes_are_floored_to_the_divisor_and_told_when_they_change(model, match, width, height):
    shot = shot_of({"width": width, "height": height}, model, match=match)
    divisor = model.trainer_size_divisor if match == "preview" else model.size_divisor
    for asked, made in ((width, shot.sampling.width), (height, shot.sampling.height)):
        assert made % divisor == 0
        assert asked - divisor < made <= asked
    assert bool(shot.warnings) == ((shot.sampling.width, shot.sampling.height) != (width, height))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@given(width=st.integers(64, 4096), height=st.integers(64, 4096))
def test_previews_have_sizes_in_multiples_of_16_and_of_32_with_the_5b_model(model, width, height):
    shot = shot_of({"width": width, "height": height}, model, match="preview")
    divisor = 32 if model is EITHER else 16
    assert (shot.sampling.width, shot.sampling.height) == (width // divisor * divisor, height // divisor * divisor)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@MATCHES
@given(asked=st.integers(1, 1000))
def test_frame_counts_become_4n_plus_1_by_the_rule_of_the_model(model, match, asked):
    shot = shot_of({"num_frames": asked}, model, match=match)
    assert shot.sampling.num_frames % 4 == 1
    assert abs(shot.sampling.num_frames - asked) <= 3
    assert shot.sampling.num_frames == asked or asked % 4 != 1
    assert bool(shot.warnings) == (shot.sampling.num_frames != asked)
    if model.drops_incomplete_frames:
        assert shot.sampling.num_frames <= asked


@pytest.mark.parametrize(("model", "made"), [(SINGLE, 41), (MOE, 41), (EITHER, 37), (MODELS["wan22_14b_i2v"], 37)])
def test_40_frames_become_41_with_diffusers_and_37_with_the_toolkit(model, made):
    shot = shot_of({"num_frames": 40}, model)
    assert shot.sampling.num_frames == made
    assert shot.warnings == (f"prompts[0]: 40 frames became {made}, since Wan makes 4n+1 frames",)


@pytest.mark.parametrize(
    ("match", "made", "divisor"),
    [(None, (832, 480), 32), ("documented", (832, 480), 32), ("preview", (848, 496), 16)],
)
def test_14b_t2v_floors_sizes_to_32_in_documented_and_to_16_in_preview_and_tells_it(match, made, divisor):
    shot = shot_of({"width": 850, "height": 500}, MOE, match=match)
    assert (shot.sampling.width, shot.sampling.height) == made
    assert shot.warnings == (
        f"prompts[0]: 850x500 became {made[0]}x{made[1]}, since wan22_14b_t2v makes multiples of {divisor}",
    )


@MATCHES
def test_every_prompt_is_made_by_the_recipe_for_its_sampler(match):
    samplers = [None, "unipc", "flowmatch", None]
    raw = an_input(MOE, prompts=[{"prompt": "a", "sampler": sampler} for sampler in samplers], match=match)
    by_hand = [preview(MOE, "flowmatch", "it is new", s) if match == "preview" else documented(MOE, s) for s in samplers]
    assert [shot.recipe for shot in shots(raw, MOE)] == by_hand


@given(count=st.integers(1, 20))
def test_seeds_default_to_42_plus_the_index_of_the_prompt(count):
    raw = an_input(prompts=[{"prompt": "a"} for _ in range(count)])
    assert [shot.sampling.seed for shot in shots(raw)] == [42 + index for index in range(count)]


@given(seed=st.integers(0, MAX_SEED))
def test_a_seed_that_is_given_is_kept(seed):
    assert shot_of({"seed": seed}).sampling.seed == seed


def test_seed_minus_one_draws_a_new_seed_for_every_prompt_and_every_job():
    raw = an_input(prompts=[{"prompt": "a", "seed": -1}] * 20)
    drawn = [shot.sampling.seed for _ in range(2) for shot in shots(raw)]
    assert len(set(drawn)) > 30
    assert all(0 <= seed < 2**31 for seed in drawn)


def test_a_job_that_comes_again_draws_the_same_seeds():
    raw = an_input(prompts=[{"prompt": "a", "seed": -1}] * 2)
    first, again, other = (Identity.of(job_id, raw) for job_id in ("job", "job", "other"))
    assert [first.seed(0), first.seed(1)] == [again.seed(0), again.seed(1)]
    assert len({first.seed(0), first.seed(1), other.seed(0)}) == 3


@pytest.mark.parametrize(
    ("of_prompt", "of_request", "made"),
    [
        (None, "sks", "a sks boat, sks"),
        ("own", "sks", "a own boat, own"),
        ("own", None, "a own boat, own"),
        ("", "sks", "a sks boat, sks"),
    ],
)
def test_the_trigger_word_replaces_every_trigger_and_that_of_the_prompt_goes_first(of_prompt, of_request, made):
    shot = shot_of({"prompt": "a [trigger] boat, [trigger]", "trigger_word": of_prompt}, trigger_word=of_request)
    assert (shot.sampling.prompt, shot.warnings) == (made, ())


def test_a_trigger_without_a_trigger_word_is_kept_and_told():
    shot = shot_of({"prompt": "a [trigger] boat"})
    assert shot.sampling.prompt == "a [trigger] boat"
    assert "trigger_word" in shot.warnings[0]


def warnings_of(prompt: dict[str, Any], size: tuple[int, int] | None = None, **fields: Any) -> tuple[str, ...]:
    request = parse(an_input(EITHER, prompt, **fields), EITHER)
    images = {"https://example.com/i.png": Image.new("RGB", size)} if size else {}
    [shot] = shots_of(request, partial(documented, EITHER), Identity.of(None, {}).seed, images)
    return shot.warnings


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt": "a [name] boat"}, "the prompt has [name], which is not replaced; only [trigger] in the prompt is"),
        ({"prompt": "a [Trigger] boat"}, "the prompt has [Trigger], which is not replaced"),
        ({"prompt": "a boat", "neg": "no [trigger]"}, "the neg has [trigger], which is not replaced"),
        ({"prompt": "a boat --w 512 --h 512"}, "the prompt has the trainer's flag --w, which is read as text; set the fields"),
        ({"prompt": "a boat", "neg": "blurry --m 0.8"}, "the neg has the trainer's flag --m"),
    ],
)
def test_what_the_text_encoder_would_read_as_words_is_told(prompt, says):
    [warning] = warnings_of(prompt, trigger_word="sks")
    assert warning.startswith(f"prompts[0]: {says}")


@pytest.mark.parametrize("prompt", ["a well--known boat", "a boat -- w 5", "a boat --ar 16:9", "[triggers] (name)"])
def test_a_text_that_only_looks_like_it_is_no_warning(prompt):
    assert warnings_of({"prompt": prompt}) == ()


@pytest.mark.parametrize(
    ("size", "told"), [((64, 64), False), ((650, 640), False), ((660, 640), True), ((640, 660), True), ((1280, 720), True)]
)
def test_a_control_image_that_would_be_stretched_visibly_is_told(size, told):
    warnings = warnings_of({"ctrl_img": "https://example.com/i.png", "width": 64, "height": 64}, size)
    stretched = f"prompts[0]: the control image has {size[0]}x{size[1]} pixels and is stretched to 64x64; crop it, set"
    assert [warning.startswith(stretched) for warning in warnings] == [True] * told
    assert not warnings_of({"ctrl_img": "https://example.com/i.png", "width": 64, "height": 64, "image_fit": "crop"}, size)


def test_shots_come_in_the_order_of_the_prompts():
    raw = an_input(prompts=[{"prompt": text} for text in "abc"])
    assert [(shot.index, shot.sampling.prompt) for shot in shots(raw)] == [(0, "a"), (1, "b"), (2, "c")]


# Anything else that JSON can carry


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (an_input() | {"prompts": [1] * 100_000}, "prompts"),
        (an_input() | {"loras": [{}] * 100_000}, "loras"),
        (an_input(zzz={"a": {"b": [0] * 100_000}}), "zzz.a.b"),
        (an_input() | {str(number): 0 for number in range(100_000)}, ""),
        (an_input(first={str(number): 0 for number in range(100_000)}), "prompts[0]"),
    ],
    ids=["prompts", "loras", "deep", "fields", "fields of a prompt"],
)
def test_more_values_than_any_request_has_are_one_problem_found_before_a_value_is_looked_at(raw: Any, field: str) -> None:
    [problem] = error_of(raw).problems
    assert (problem.field, problem.text) == (
        field,
        "has too many values: the whole input may have 20000; send several jobs",
    )


def test_a_thousand_whole_prompts_are_not_too_many() -> None:
    prompt = {name: info.examples[0] for name, info in Prompt.model_fields.items() if info.examples} | {"num_videos": 1}
    prompt["ctrl_img_1"] = prompt["ctrl_img"]
    assert len(parse(an_input(I2V_14B, prompts=[prompt] * 1000), I2V_14B).prompts) == 1000


def test_a_number_of_thousands_of_digits_is_refused_as_any_other() -> None:
    assert "`prompts[0].seed`: must be an integer" in str(error_of(an_input(first={"seed": 10**5001})))
    assert "`prompts[0].fps`: must be an integer from 1 to 120, such as 16; got a longer number" in str(
        error_of(an_input(first={"fps": 10**5001}))
    )


NAMES = sorted({name for model in (Request, Prompt) for name in model.model_fields} | {"path", "transformer", "steps"})
TEXTS = st.one_of(
    st.text(st.characters(codec=None, exclude_categories=()), max_size=12),
    st.sampled_from(
        [*MODELS, "", "high", "low", "unipc", "mp4", "preview", "a.safetensors", "https://a/b.safetensors", "\ud800"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2, 200), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES) | TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def outcome_of(raw: Any, model) -> list[Shot] | WorkerError:
    try:
        return shots(raw, model)
    except WorkerError as error:
        return error


def check(outcome: list[Shot] | WorkerError) -> None:
    """Something that can be made, or an error that can be sent: nothing else."""
    if isinstance(outcome, WorkerError):
        assert outcome.code in Code
        assert str(outcome).encode("utf-8").startswith(outcome.code.encode())
        assert all(problem.code in Code and problem.text for problem in outcome.problems)
    else:
        assert all(shot.sampling.num_frames % 4 == 1 and 0 <= shot.sampling.seed <= MAX_SEED for shot in outcome)
        assert len(outcome) > 0


@given(raw=VALUES, model=st.sampled_from(list(MODELS.values())))
@example(raw={}, model=SINGLE)
@example(raw={"loras": [None], "prompts": [None]}, model=MOE)
def test_any_input_gives_a_request_or_a_known_error(raw, model):
    check(outcome_of(raw, model))


@given(data=st.data(), model=st.sampled_from(list(MODELS.values())))
def test_any_value_in_any_place_of_a_good_request_gives_a_request_or_a_known_error(data, model):
    raw = an_input(model)
    place = data.draw(st.sampled_from([raw, raw["loras"][0], raw["prompts"][0]]))
    place[data.draw(st.sampled_from(NAMES) | TEXTS)] = data.draw(VALUES)
    check(outcome_of(raw, model))


def test_a_gif_that_would_fill_the_memory_is_refused_and_another_format_of_it_is_not():
    large = {"width": 2048, "height": 2048, "num_frames": 301}
    assert found(an_input(first=large, output_format="gif")) == [("INVALID_INPUT", "prompts[0].num_frames")]
    assert parse(an_input(first=large, output_format="webp"), SINGLE)
    assert parse(an_input(first=large | {"num_frames": 201}, output_format="gif"), SINGLE)


@pytest.mark.parametrize(
    ("model", "extra", "problems"),
    [
        (SINGLE, [{"path": "a", "transformer": "both"}], [("MOE_FORMAT_NOT_SUPPORTED", "extra_loras[0].transformer")]),
        (MOE, [{"path": "a", "transformer": "both"}, {"path": "b"}], [("MOE_FORMAT_REQUIRED", "extra_loras[1].transformer")]),
        (SINGLE, [{"path": "../a"}], [("INVALID_INPUT", "extra_loras[0].path")]),
        (SINGLE, [{"path": "a", "network_multiplier": 2.5}], [("INVALID_INPUT", "extra_loras[0].network_multiplier")]),
        (SINGLE, [{"path": "a"}] * 9, [("INVALID_INPUT", "extra_loras")]),
    ],
)
def test_extra_loras_are_checked_as_loras_are(model: ModelSpec, extra: list[Any], problems: list[tuple[str, str]]) -> None:
    loras = [{"path": "a", "transformer": "high"}] if model == MOE else [{"path": "a"}]
    with pytest.raises(WorkerError) as caught:
        parse(an_input(model=model.id, loras=loras, extra_loras=extra), model)
    assert [(problem.code.value, problem.field) for problem in caught.value.problems] == problems


@pytest.mark.parametrize(
    ("model", "prompt", "says"),
    [
        (SINGLE, {"guidance_scale_2": 3.0}, "`prompts[0].guidance_scale_2`: wan21_1b has one transformer"),
        (I2V_14B, {"guidance_scale": 1, "guidance_scale_2": 3.0}, "`prompts[0].guidance_scale_2`: there is no guidance at all"),
        (MODELS["wan21_i2v_14b"], {"last_img": "aGk="}, "`prompts[0].last_img`: wan21_i2v_14b was not made to end on a given"),
        (I2V_14B, {"last_img": "aGk=", "num_frames": 4}, "`prompts[0].last_img`: a video with a first and a last frame has 5"),
        (SINGLE, {"shift": 0}, "`prompts[0].shift`: must be a number from 0.1 to 100, such as 5.0; got 0"),
        (SINGLE, {"image_fit": "cover"}, '`prompts[0].image_fit`: must be one of "stretch", "crop", "pad"; got '),
        (SINGLE, {"flow_shift": 5}, "did you mean `shift`?"),
    ],
)
def test_a_field_that_this_model_cannot_honour_is_refused(model: ModelSpec, prompt: dict[str, Any], says: str) -> None:
    loras = [{"path": "a", "transformer": "high"}] if model.moe else [{"path": "a"}]
    image = {} if model.control_image == "none" else {"ctrl_img": "aGk="}
    with pytest.raises(WorkerError) as caught:
        parse(an_input(model, {"prompt": "a boat", **image, **prompt}, loras=loras), model)
    assert says in str(caught.value)
    assert len(caught.value.problems) == 1


def test_several_videos_of_a_prompt_have_the_seeds_that_follow() -> None:
    raw = an_input(SINGLE, {"num_videos": 3, "seed": 7, "width": 70}, output_format="png")
    raw["prompts"] += [{"prompt": "b"}, {"prompt": "c", "seed": -1, "num_videos": 2}]
    shots = shots_of(parse(raw, SINGLE), partial(documented, SINGLE), lambda index: 1000 + index)
    assert [shot.sampling.seed for shot in shots] == [7, 8, 9, 43, 1002, 1003]
    assert [shot.index for shot in shots] == list(range(6))
    assert [(shot.prompt_index, shot.video_index) for shot in shots] == [(0, 0), (0, 1), (0, 2), (1, None), (2, 0), (2, 1)]
    assert [bool(shot.warnings) for shot in shots] == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ([{"prompt": "a", "num_videos": 17}], "prompts[0].num_videos"),
        ([{"prompt": "a", "num_videos": 2, "seed": MAX_SEED}], "prompts[0].seed"),
        ([{"prompt": "a", "num_videos": 16}] * 63, "prompts"),
    ],
)
def test_more_videos_than_can_be_made_are_refused(prompts: list[dict[str, Any]], field: str) -> None:
    assert [problem.field for problem in error_of(an_input(prompts=prompts)).problems] == [field]


def test_fields_that_change_nothing_are_named() -> None:
    prompts = [
        {"guidance_scale": 1, "neg": "blurry"},
        {"guidance_scale": 1},
        {"guidance_scale": 2, "neg": "blurry"},
        {"image_fit": "crop"},
    ]
    raw = an_input(MOE, prompts=[{"prompt": "a", **prompt} for prompt in prompts])
    shots = shots_of(parse(raw, MOE), lambda _: documented(MOE), Identity.of(None, raw).seed, {})
    assert [shot.warnings for shot in shots] == [
        ("prompts[0]: `neg` has no effect: with `guidance_scale` 1 there is no guidance",),
        (),
        (),
        ("prompts[3]: `image_fit` has no effect: the prompt has no image",),
    ]


# Drafts


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_draft_needs_a_recipe_of_its_model(model: ModelSpec) -> None:
    with_one = ["wan22_14b_i2v", "wan22_14b_t2v", "wan21_i2v_14b", "wan21_i2v_14b480p", "wan21_14b"]
    raw = an_input(model, draft=True)
    if model.id in with_one:
        assert parse(raw, model).lora_fields == ["loras[0]", *["draft"] * (2 if model.moe else 1)]
        assert parse(raw | {"draft": False}, model).lora_fields == ["loras[0]"]
    else:
        text = f"there is no few-step recipe for {model.id}; leave it out, or use one of {', '.join(with_one)}"
        assert str(error_of(raw, model)) == f"INVALID_INPUT: `draft`: {text}"


def test_a_draft_is_no_preview() -> None:
    assert found(an_input(MOE, draft=True, match="preview"), MOE) == [("INVALID_INPUT", "draft")]
    assert parse(an_input(MOE, draft=True, match="documented"), MOE).draft
    assert found(an_input(MOE, draft="yes"), MOE) == [("INVALID_INPUT", "draft")]


def test_a_draft_takes_its_own_steps_and_says_which_fields_it_does_not_look_at() -> None:
    prompt = {"width": 70, "sample_steps": 30, "guidance_scale_2": 3.0, "shift": 7.0, "sampler": "unipc", "neg": "blurry"}
    raw = an_input(MOE, prompt, draft=True)
    raw["prompts"] += [{"prompt": "b", "sample_steps": 25, "guidance_scale": 4.0, "seed": 5}]
    first, second = shots_of(parse(raw, MOE), lambda _: draft_of(MOE), Identity.of(None, raw).seed, {})
    for shot in (first, second):
        sampling = shot.sampling
        assert (sampling.num_inference_steps, sampling.guidance_scale, sampling.guidance_scale_2) == (4, 1.0, None)
        assert (shot.recipe.shift, shot.recipe.timesteps) == (5.0, (1000, 750, 500, 250))
    assert (first.sampling.seed, first.sampling.width, second.sampling.seed) == (42, 64, 5)
    named = "`neg`, `sample_steps`, `guidance_scale_2`, `shift`, `sampler`"
    assert first.warnings[1:] == (f"prompts[0]: {named} have no effect: a draft takes its own 4 steps, without guidance",)
    assert second.warnings == ()
