"""How a training ran: what the request says, and what is read from the config beside a LoRA."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipelines.catalog import MODELS
from pipelines.trained import NOT_SAID
from worker import loras
from worker.errors import WorkerError
from worker.parse import parse
from worker.settings import Settings
from worker.training import NOT_KNOWN, training_of

SPEC = MODELS["wan21_1b"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job_000000100.safetensors").touch()
    return Settings(model_id="wan21_1b", lora_dir=tmp_path)


def request_with(path: str = "job/job_000000100.safetensors", **fields: Any) -> Any:
    return parse({"model": "wan21_1b", "loras": [{"path": path}], "prompts": [{"prompt": "a"}]} | fields, SPEC)


def write(settings: Settings, document: Any) -> None:
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    (settings.lora_dir / "job" / "config.yaml").write_text(text)


def config(name: str = "job", **process: Any) -> dict[str, Any]:
    return {"job": "extension", "config": {"name": name, "process": [process]}}


QUANTIZED = config(model={"quantize": True, "low_vram": True}, train={"dtype": "bf16"}, save={"dtype": "float32"})


def test_the_config_beside_a_lora_is_read(settings: Settings) -> None:
    write(settings, QUANTIZED)
    found = training_of(request_with(), settings)
    assert (found.why, found.warning) == ("the config.yaml beside the LoRA says so", None)
    assert (found.trained.quantize, found.trained.low_vram, found.trained.save_dtype) == (True, True, "float32")


def test_the_request_goes_before_the_config(settings: Settings) -> None:
    write(settings, QUANTIZED)
    found = training_of(request_with(trained_with={"quantize": False}), settings)
    assert (found.trained.quantize, found.trained.low_vram, found.why) == (False, None, "the request says so")
    assert training_of(request_with(trained_with={}), settings).trained == NOT_SAID


@pytest.mark.parametrize("path", ["https://example.com/job.safetensors", "job/missing.safetensors"])
def test_nothing_is_read_where_no_lora_lies(settings: Settings, path: str) -> None:
    write(settings, QUANTIZED)
    assert training_of(request_with(path), settings) == NOT_KNOWN


def test_the_config_of_another_job_is_not_used(settings: Settings) -> None:
    write(settings, QUANTIZED | {"config": QUANTIZED["config"] | {"name": "other"}})
    assert training_of(request_with(), settings) == NOT_KNOWN


@pytest.mark.parametrize("text", ["a: [", "42", "config: 3", "config: {name: job, process: []}", "\xff", "x" * 1_000_001])
def test_a_config_that_cannot_be_read_is_a_warning(settings: Settings, text: str) -> None:
    (settings.lora_dir / "job" / "config.yaml").write_bytes(text.encode("latin-1"))
    found = training_of(request_with(), settings)
    assert found.trained == NOT_SAID
    assert found.warning == "the config.yaml beside the LoRA is not a readable training config; it is ignored"


def test_a_format_that_is_not_rebuilt_is_a_warning(settings: Settings) -> None:
    write(settings, config(model={"quantize": True, "qtype": "nf4"}))
    found = training_of(request_with(), settings)
    assert found.trained == NOT_SAID
    assert found.warning and "has the qtype nf4, which this worker cannot rebuild; it knows qfloat8" in found.warning


def test_a_config_that_leads_out_of_the_folder_is_not_read(
    settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "config.yaml"
    outside.write_text(yaml.safe_dump(QUANTIZED))
    (settings.lora_dir / "job" / "config.yaml").symlink_to(outside)
    assert training_of(request_with(), settings) == NOT_KNOWN


@pytest.mark.parametrize(
    ("sample", "multipliers"),
    [
        ({"prompts": ["a", "b"]}, "equal"),
        ({"network_multiplier": "0.8", "samples": [{"prompt": "a"}, {"prompt": "b", "network_multiplier": 0.8}]}, "equal"),
        ({"samples": [{"prompt": "a"}, {"prompt": "b", "network_multiplier": 0.8}]}, "mixed"),
        ({"prompts": ["a --m 0.5 --w 64", "b"]}, "mixed"),
        ({"prompts": ["a --network_multiplier 0.5", "b"]}, "mixed"),
        ({"prompts": ["a --m 0.5 --network_multiplier 1 --w 64", "b"]}, "equal"),
        ({"prompts": ["a --m 1.0", "b --m 1"]}, "equal"),
        ({"samples": [{"prompt": "a", "network_multiplier": "full"}, {"prompt": "b", "network_multiplier": 1}]}, "equal"),
        ({"samples": [{"prompt": "a"}, {"network_multiplier": 0.8}]}, "equal"),
        ({}, "equal"),
    ],
)
def test_several_multipliers_keep_the_trainer_from_merging(settings: Settings, sample: Any, multipliers: str) -> None:
    write(settings, config(model={}, sample=sample))
    trained = training_of(request_with(), settings).trained
    assert trained.multipliers == multipliers and trained.merges == (multipliers == "equal")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"quantize": "yes"}, "`trained_with.quantize`: must be true or false"),
        ({"qtype": "nf4"}, "`trained_with.qtype`: must be one of qfloat8, float8, int8, uint2"),
        ({"qtype": "|a/b/c"}, "`trained_with.qtype`: must be one of"),
        ({"low_ram": True}, "`trained_with.low_ram`: is not a field here; did you mean `low_vram`?"),
        ({"multipliers": "some"}, '`trained_with.multipliers`: must be one of "equal", "mixed"'),
        ("bf16", "`trained_with`: must be an object with fields such as quantize, quantize_te"),
        ([], "`trained_with`: must be an object with fields"),
    ],
)
def test_what_is_wrong_in_trained_with_is_told_by_its_field(given: Any, says: str) -> None:
    with pytest.raises(WorkerError) as caught:
        request_with(trained_with=given)
    assert says in str(caught.value)


def test_a_signature_in_the_url_of_an_adapter_is_not_repeated(settings: Settings) -> None:
    given = {"quantize": True, "qtype": "uint4|https://example.com/a.safetensors?X-Amz-Signature=s3cr3t"}
    trained = training_of(request_with(trained_with=given), settings).trained
    assert trained.recovery_adapter == "https://example.com/a.safetensors?X-Amz-Signature=s3cr3t"
    assert trained.as_words() == {"quantize": True, "qtype": "uint4|https://example.com/a.safetensors"}


@pytest.mark.parametrize("name", ["org/repo/adapter.safetensors", "/data/adapter.safetensors", "adapter.safetensors"])
@pytest.mark.parametrize("place", ["lora_dir", "checkpoint_dir"])
def test_a_recovery_adapter_is_found_below_the_folders_wherever_the_training_had_it(
    settings: Settings, tmp_path_factory: Any, name: str, place: str
) -> None:
    settings = settings.model_copy(update={"checkpoint_dir": tmp_path_factory.mktemp("weights")})
    save_file({"x": torch.zeros(1)}, getattr(settings, place) / "adapter.safetensors")
    assert fetched(name, settings).path == getattr(settings, place) / "adapter.safetensors"


def test_a_recovery_adapter_that_lies_nowhere_is_told_with_the_remedy(settings: Settings) -> None:
    with pytest.raises(WorkerError, match=r"^LORA_NOT_FOUND: `f`: .* `a.safetensors` is not in the worker's LoRA folder"):
        fetched("/training/a.safetensors", settings)


def test_the_hub_is_asked_for_what_it_has(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(loras, "fetch_lora", lambda url, *_: asked.append(url))
    fetched("org/repo/a.safetensors", settings)
    fetched("https://example.com/b.safetensors", settings)
    assert asked == ["https://huggingface.co/org/repo/resolve/main/a.safetensors", "https://example.com/b.safetensors"]


def fetched(name: str, settings: Settings) -> Any:
    return loras.fetch_recovery_adapter(name, "f", None, settings, threading.Event(), ExitStack())
