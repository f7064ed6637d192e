from pathlib import Path

import pytest
from pydantic import SecretStr

from pipelines.catalog import MODELS
from worker.errors import Code, WorkerError
from worker.settings import SEVEN_DAYS, SettingsError, load_settings

BUCKET = {
    "BUCKET_NAME": "videos",
    "BUCKET_ENDPOINT_URL": "https://s3.example.com",
    "BUCKET_ACCESS_KEY_ID": "the-id",
    "BUCKET_SECRET_ACCESS_KEY": "the-secret",
}
IN_CLOUD = {"RUNPOD_WEBHOOK_GET_JOB": "https://api.example.com/job-take/x?gpu=y"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; MODEL_ID is set unless a test says otherwise."""

    def set_all(**variables: str) -> None:
        for name, value in {"MODEL_ID": "wan21_1b", **variables}.items():
            monkeypatch.setenv(name, value)

    return set_all


def problem_of(environment, **variables: str) -> str:
    environment(**variables)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return str(caught.value)


def test_a_model_id_is_all_that_is_needed(environment):
    environment()
    settings = load_settings()
    assert (settings.model_id, settings.device, settings.offload_mode) == ("wan21_1b", "cuda", "auto")
    assert (settings.default_match, settings.lora_mode) == ("documented", "adapter")
    assert (settings.bucket_name, settings.presigned_url_ttl, settings.in_cloud) == (None, 86400, False)


@pytest.mark.parametrize("model_id", MODELS)
def test_every_model_of_the_catalog_can_be_served(environment, model_id):
    environment(MODEL_ID=model_id)
    assert load_settings().model_id == model_id


def test_every_variable_is_read(environment):
    environment(
        **BUCKET,
        CHECKPOINT_DIR="/weights",
        AI_TOOLKIT_PATH="/toolkit",
        DEVICE="cuda",
        OFFLOAD_MODE="model",
        DEFAULT_MATCH="preview",
        LORA_MODE="merge",
        BUCKET_REGION="eu-west-1",
        BUCKET_ADDRESSING_STYLE="virtual",
        BUCKET_KEY_PREFIX="videos/",
        PRESIGNED_URL_TTL="3600",
        HF_TOKEN="hf_x",
        JOB_TIMEOUT="90.5",
        MAX_LORA_BYTES="1000",
    )
    settings = load_settings()
    assert (settings.checkpoint_dir, settings.ai_toolkit_path) == (Path("/weights"), Path("/toolkit"))
    assert (settings.device, settings.offload_mode) == ("cuda", "model")
    assert (settings.default_match, settings.lora_mode) == ("preview", "merge")
    assert (settings.bucket_name, settings.bucket_region) == ("videos", "eu-west-1")
    assert settings.bucket_secret_access_key == SecretStr("the-secret")
    assert (settings.bucket_addressing_style, settings.bucket_key_prefix) == ("virtual", "videos/")
    assert (settings.presigned_url_ttl, settings.job_timeout, settings.max_lora_bytes) == (3600, 90.5, 1000)
    assert settings.hf_token == SecretStr("hf_x")


@pytest.mark.parametrize("model_id", [None, ""])
def test_without_a_model_id_the_known_ones_are_listed(monkeypatch, model_id):
    if model_id is not None:
        monkeypatch.setenv("MODEL_ID", model_id)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == f"MODEL_ID is not set; set it to one of {', '.join(MODELS)}"


def test_an_unknown_model_id_is_refused_with_the_known_ones(environment):
    text = problem_of(environment, MODEL_ID="wan99")
    assert text.startswith("MODEL_ID: ") and all(model_id in text for model_id in MODELS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEVICE", "s3cr3t"),
        ("DEVICE", "CUDA:0"),
        ("OFFLOAD_MODE", "s3cr3t"),
        ("DEFAULT_MATCH", "s3cr3t"),
        ("DEFAULT_MATCH", "Preview"),
        ("LORA_MODE", "s3cr3t"),
        ("LORA_MODE", "fuse"),
        ("PRESIGNED_URL_TTL", "s3cr3t"),
        ("PRESIGNED_URL_TTL", "1.5"),
        ("PRESIGNED_URL_TTL", "0"),
        ("PRESIGNED_URL_TTL", "-600"),
        ("PRESIGNED_URL_TTL", str(SEVEN_DAYS + 1)),
        ("BUCKET_ADDRESSING_STYLE", "s3cr3t"),
        ("JOB_TIMEOUT", "s3cr3t"),
        ("BUCKET_NAME", "Not A Bucket"),
        ("BUCKET_NAME", "s3://videos"),
        ("JOB_TIMEOUT", "-3"),
        ("MAX_LORA_BYTES", "8GB"),
        ("MAX_IMAGE_BYTES", "-5"),
    ],
)
def test_a_wrong_value_gives_one_line_that_names_the_variable_and_not_the_value(environment, name, value):
    text = problem_of(environment, **{name: value})
    assert text.startswith(f"{name}: ")
    assert "\n" not in text and value not in text


@pytest.mark.parametrize(
    "variables", [{"MODEL_ID": "wan22_5b", "OFFLOAD_MODE": "model"}, {"DEVICE": "cpu", "OFFLOAD_MODE": "model"}]
)
def test_an_offload_mode_that_cannot_be_says_so(environment, variables):
    text = problem_of(environment, **variables)
    assert "OFFLOAD_MODE" in text and "\n" not in text


MERGES = pytest.mark.parametrize(
    "variables", [{"LORA_MODE": "merge"}, {"DEFAULT_MATCH": "preview"}, {"LORA_MODE": "merge", "DEFAULT_MATCH": "preview"}]
)


@MERGES
def test_sequential_offloading_cannot_merge_loras_and_says_what_can(environment, variables):
    text = problem_of(environment, OFFLOAD_MODE="sequential", **variables)
    assert text.startswith("OFFLOAD_MODE=sequential cannot merge LoRAs; use auto or model") and "\n" not in text


@MERGES
@pytest.mark.parametrize("offload_mode", ["auto", "none", "text_encoder", "group", "model"])
def test_the_other_offload_modes_merge_loras(environment, variables, offload_mode):
    environment(OFFLOAD_MODE=offload_mode, **variables)
    assert load_settings().offload_mode == offload_mode


def test_sequential_offloading_runs_with_adapters_and_documented(environment):
    environment(OFFLOAD_MODE="sequential", LORA_MODE="adapter", DEFAULT_MATCH="documented")
    assert load_settings().offload_mode == "sequential"


def test_every_wrong_variable_is_in_the_one_line(environment):
    text = problem_of(environment, DEVICE="tpu", OFFLOAD_MODE="all", JOB_TIMEOUT="never")
    assert "\n" not in text
    assert all(f"{name}: " in text for name in ("DEVICE", "OFFLOAD_MODE", "JOB_TIMEOUT"))


def test_a_url_can_be_valid_for_seven_days_and_no_longer(environment):
    environment(PRESIGNED_URL_TTL=str(SEVEN_DAYS))
    assert load_settings().presigned_url_ttl == 604800
    assert "604800" in problem_of(environment, PRESIGNED_URL_TTL=str(SEVEN_DAYS + 1))


@pytest.mark.parametrize(
    "name",
    [
        *["DEVICE", "DEFAULT_MATCH", "LORA_MODE", "PRESIGNED_URL_TTL", "JOB_TIMEOUT"],
        *["BUCKET_NAME", "BUCKET_ENDPOINT_URL", "HF_TOKEN", "AI_TOOLKIT_PATH", "CHECKPOINT_DIR"],
    ],
)
def test_an_empty_variable_counts_as_not_set(environment, name):
    environment()
    unset = load_settings()
    environment(**{name: ""})
    assert load_settings() == unset


def test_an_empty_cloud_variable_is_no_cloud(environment):
    environment(RUNPOD_WEBHOOK_GET_JOB="")
    assert not load_settings().in_cloud


def test_in_the_cloud_a_bucket_is_required(environment):
    environment(**IN_CLOUD)
    with pytest.raises(WorkerError) as caught:
        load_settings()
    assert caught.value.code is Code.STORAGE_NOT_CONFIGURED
    assert "BUCKET_NAME" in str(caught.value)


def test_in_the_cloud_with_a_bucket_it_starts(environment):
    environment(**IN_CLOUD, **BUCKET)
    assert load_settings().in_cloud


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["BUCKET_NAME"], ["BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"]),
        (["BUCKET_ENDPOINT_URL"], ["BUCKET_NAME", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"]),
        (["BUCKET_NAME", "BUCKET_ACCESS_KEY_ID"], ["BUCKET_SECRET_ACCESS_KEY"]),
        (["BUCKET_NAME", "BUCKET_SECRET_ACCESS_KEY"], ["BUCKET_ACCESS_KEY_ID"]),
        (["BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"], ["BUCKET_NAME"]),
    ],
)
def test_half_a_bucket_names_what_is_missing_and_no_value(environment, given, missing):
    text = problem_of(environment, **{name: BUCKET[name] for name in given})
    assert all(name in text for name in missing)
    assert not any(name in text for name in given)
    assert not any(value in text for value in BUCKET.values())


def test_half_a_bucket_is_told_in_the_cloud_too(environment):
    text = problem_of(environment, **IN_CLOUD, BUCKET_NAME="videos")
    assert "BUCKET_SECRET_ACCESS_KEY" in text


def test_a_bucket_on_aws_needs_no_endpoint(environment):
    environment(**{name: value for name, value in BUCKET.items() if name != "BUCKET_ENDPOINT_URL"})
    assert load_settings().bucket_endpoint_url is None


def test_secrets_are_not_in_the_text_of_the_settings(environment):
    environment(**BUCKET, HF_TOKEN="hf_token_of_mine")
    text = repr(load_settings())
    assert not any(secret in text for secret in ("the-id", "the-secret", "hf_token_of_mine"))


def test_settings_cannot_be_changed(environment):
    environment()
    with pytest.raises(ValueError, match="frozen"):
        load_settings().device = "cpu"
