"""`python handler.py --rp_serve_api`: a job in, frames out, for all seven ids; errors are results, and the worker serves on."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from socket import create_server
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import save_file

from builder.tiny_checkpoints import SIZE_1B, lora_metadata, lora_tensors
from pipelines.catalog import MODELS
from tests import reference
from tests.conftest import REAL_TOOLKIT, STAND_IN
from tests.pipelines.test_models import PICTURE, lora_paths
from tests.worker_process import ROOT, LocalApi, environment, local_api

TOOLKIT = REAL_TOOLKIT or STAND_IN


def as_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def request_for(model_id: str, tiny: Path, **changes: Any) -> dict[str, Any]:
    """A whole request for lossless frames; `changes` go into its one prompt."""
    prompt = {"prompt": "[trigger] a boat", "width": 70, "height": 64, "num_frames": 7, "sample_steps": 3, **changes}
    if MODELS[model_id].control_image == "required":
        prompt["ctrl_img"] = as_base64(PICTURE)
    loras = [
        {"path": str(path.relative_to(tiny / "loras"))} | ({"transformer": side} if side else {})
        for path, side in lora_paths(model_id, tiny)
    ]
    return {"model": model_id, "trigger_word": "sks", "loras": loras, "prompts": [prompt], "output_format": "png"}


def file_of(item: dict[str, Any]) -> Path:
    url = urlsplit(item["url"])
    assert url.scheme == "file"
    return Path(unquote(url.path))


def frames_of(item: dict[str, Any]) -> np.ndarray:
    with zipfile.ZipFile(file_of(item)) as archive:
        return np.stack([np.asarray(Image.open(archive.open(name))) for name in sorted(archive.namelist())])


@pytest.mark.parametrize("model_id", MODELS)
def test_frames_out_of_the_api_are_those_of_the_model_pages(model_id: str, tiny: Path, tmp_path: Path) -> None:
    env = environment(tiny, model_id, AI_TOOLKIT_PATH=TOOLKIT, OUTPUT_DIR=tmp_path / "out")
    with local_api(env, tmp_path) as api:
        answer = api.run(request_for(model_id, tiny))
    assert answer["status"] == "COMPLETED", answer
    (video,) = answer["output"]["outputs"]["videos"]
    step = MODELS[model_id].size_divisor
    whole_frames = 5
    assert (video["width"], video["height"], video["num_frames"], video["seed"]) == (70 // step * step, 64, whole_frames, 42)
    wanted = reference.Wanted(
        prompt="sks a boat",
        width=video["width"],
        height=64,
        num_frames=whole_frames,
        image=PICTURE if "ctrl_img" in str(request_for(model_id, tiny)) else None,
        loras=[(path, 1.0, side) for path, side in lora_paths(model_id, tiny)],
    )
    theirs = reference.frames(model_id, tiny, TOOLKIT, wanted)
    assert np.abs(frames_of(video).astype(int) - theirs).max() <= 1
    assert video["bytes"] == file_of(video).stat().st_size


@pytest.fixture(scope="module")
def lora_dir(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LoRAs, and files that are none."""
    folder = tmp_path_factory.mktemp("loras")
    for path in (tiny / "loras").rglob("*.safetensors"):
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    whole = (folder / "wan21_1b/rank4.safetensors").read_bytes()
    (folder / "page.safetensors").write_text("<!doctype html><html>404</html>")
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    (folder / "pickle.safetensors").write_bytes(b"PK\x03\x04 not safetensors")
    factors = {f"diffusion_model.blocks.0.self_attn.q.lokr_w{number}": torch.ones(4, 6) for number in (1, 2)}
    save_file(factors, folder / "lokr.safetensors")
    return folder


@pytest.fixture(scope="module")
def api(tiny: Path, lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    """One worker of wan21_1b for all requests below."""
    folder = tmp_path_factory.mktemp("api")
    env = environment(tiny, "wan21_1b", LORA_DIR=lora_dir, OUTPUT_DIR=folder / "out", LORA_CACHE_DIR=folder / "cache")
    with local_api(env, folder) as api:
        yield api


@pytest.fixture
def good(tiny: Path) -> dict[str, Any]:
    return request_for("wan21_1b", tiny)


def output_of(api: LocalApi, request: dict[str, Any]) -> dict[str, Any]:
    answer = api.run(request)
    assert answer["status"] == "COMPLETED", answer
    return answer["output"]


MALFORMED: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown model", {"model": "flux"}, "MODEL_NOT_FOUND", "model"),
    ("another model", {"model": "wan22_5b"}, "MODEL_NOT_SERVED", "model"),
    ("no LoRA", {"loras": []}, "LORA_FILE_REQUIRED", "loras"),
    ("two LoRAs", {"loras": [{"path": "wan21_1b/rank4.safetensors"}] * 2}, "SINGLE_LORA_ONLY", "loras"),
    (
        "a side on a single model",
        {"loras": [{"path": "wan21_1b/rank4.safetensors", "transformer": "high"}]},
        "MOE_FORMAT_NOT_SUPPORTED",
        "loras[0].transformer",
    ),
    ("missing LoRA", {"loras": [{"path": "nothing.safetensors"}]}, "LORA_NOT_FOUND", "loras[0].path"),
    ("outside the folder", {"loras": [{"path": "../../etc/passwd"}]}, "INVALID_INPUT", "loras[0].path"),
    ("web page as LoRA", {"loras": [{"path": "page.safetensors"}]}, "LORA_INVALID", "loras[0].path"),
    ("LoRA cut short", {"loras": [{"path": "cut.safetensors"}]}, "LORA_INVALID", "loras[0].path"),
    ("pickle", {"loras": [{"path": "pickle.safetensors"}]}, "LORA_INVALID", "loras[0].path"),
    ("LoKr", {"loras": [{"path": "lokr.safetensors"}]}, "LORA_INCOMPATIBLE", "loras[0].path"),
    ("LoRA of 5B", {"loras": [{"path": "wan22_5b/rank8.safetensors"}]}, "LORA_INCOMPATIBLE", "loras[0].path"),
    ("unreachable LoRA", {"loras": [{"path": "http://127.0.0.1:9/x?sig=s3cret"}]}, "LORA_DOWNLOAD_FAILED", "loras[0].path"),
    ("no prompts", {"prompts": []}, "INVALID_INPUT", "prompts"),
    ("misspelt field", {"prompts": [{"prompt": "x", "smaple_steps": 3}]}, "INVALID_INPUT", "prompts[0].smaple_steps"),
    ("text for a number", {"prompts": [{"prompt": "x", "width": "64"}]}, "INVALID_INPUT", "prompts[0].width"),
    ("too many steps", {"prompts": [{"prompt": "x", "sample_steps": 151}]}, "INVALID_INPUT", "prompts[0].sample_steps"),
    ("image on a text model", {"prompts": [{"prompt": "x", "ctrl_img": "AAAA"}]}, "INVALID_INPUT", "prompts[0].ctrl_img"),
    ("unknown format", {"output_format": "avi"}, "INVALID_INPUT", "output_format"),
]


@pytest.mark.parametrize(("change", "code", "field"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_a_malformed_request_gets_its_code_and_field_and_nothing_of_the_machine(
    api: LocalApi, good: dict[str, Any], change: dict[str, Any], code: str, field: str
) -> None:
    answer = api.run(good | change)
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith(f"{code}: ")
    assert f"`{field}`" in answer["error"]
    assert not re.search(r"Traceback|/tmp|/home|/root|s3cret|File \"", answer["error"])


def test_after_all_that_the_worker_serves_on(api: LocalApi, good: dict[str, Any]) -> None:
    first = frames_of(output_of(api, good)["outputs"]["videos"][0])
    api.run(good | {"loras": [{"path": "wan22_5b/rank8.safetensors"}]})
    assert np.array_equal(frames_of(output_of(api, good)["outputs"]["videos"][0]), first)


def test_one_frame_is_a_png_image(api: LocalApi, tiny: Path) -> None:
    outputs = output_of(api, request_for("wan21_1b", tiny, num_frames=1) | {"output_format": "mp4"})["outputs"]
    assert outputs["videos"] == []
    (image,) = outputs["images"]
    assert image["format"] == "png"
    assert Image.open(file_of(image)).size == (image["width"], image["height"]) == (64, 64)


def test_several_prompts_give_as_many_videos_with_seeds_counted_up(api: LocalApi, good: dict[str, Any]) -> None:
    prompt = good["prompts"][0]
    videos = output_of(api, good | {"prompts": [prompt, prompt | {"fps": 5}, prompt | {"seed": 42}]})["outputs"]["videos"]
    assert [(video["prompt_index"], video["seed"], video["fps"]) for video in videos] == [(0, 42, 16), (1, 43, 5), (2, 42, 16)]
    first, second, third = (frames_of(video) for video in videos)
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)


def test_a_random_seed_is_told_and_gives_the_same_video_again(api: LocalApi, tiny: Path) -> None:
    (drawn,) = output_of(api, request_for("wan21_1b", tiny, seed=-1))["outputs"]["videos"]
    frames = frames_of(drawn)
    (again,) = output_of(api, request_for("wan21_1b", tiny, seed=drawn["seed"]))["outputs"]["videos"]
    assert np.array_equal(frames_of(again), frames)


def test_what_was_adjusted_is_a_warning(api: LocalApi, good: dict[str, Any]) -> None:
    warnings = "\n".join(output_of(api, good)["warnings"])
    assert "70x64 became 64x64" in warnings
    assert "7 frames became 5" in warnings


def test_an_untrained_lora_says_that_it_does_nothing(api: LocalApi, good: dict[str, Any], lora_dir: Path) -> None:
    tensors = {key: value * (0 if "lora_B" in key else 1) for key, value in lora_tensors(SIZE_1B, 4, 1).items()}
    save_file(tensors, lora_dir / "untrained.safetensors", metadata=lora_metadata("untrained", "wan_2.1"))
    output = output_of(api, good | {"loras": [{"path": "untrained.safetensors"}]})
    assert any("no effect" in warning for warning in output["warnings"])


def test_the_log_is_json_lines_with_the_jobs_id_and_no_url(api: LocalApi, good: dict[str, Any]) -> None:
    output_of(api, good)
    lines = [json.loads(line) for line in api.log.read_text().splitlines() if line.startswith("{")]
    stages = {line.get("stage") for line in lines if line.get("job", "").startswith("test-")}
    assert {"fetch", "wait", "load", "generate", "upload", "job"} <= stages
    assert "file://" not in api.log.read_text()
    assert "s3cret" not in api.log.read_text()


def call(api: LocalApi, method: str, path: str, body: Any = None) -> Any:
    return requests.request(method, f"{api.url}/{path}", json=body, timeout=120).json()


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("192.168.1.5:8000", True),
        ("worker:8000", True),
        ("gpu-box.local:8000", True),
        ("host.docker.internal:8000", True),
        ("rebound.example.com:8000", False),
        ("localhost.example.com", False),
        ("127.0.0.1.nip.io", False),
        ("[", False),
    ],
)
def test_a_page_whose_name_was_bound_to_this_machine_is_refused(api: LocalApi, host: str, answers: bool) -> None:
    answer = requests.post(f"{api.url}/run", json={"input": {}}, headers={"Host": host}, timeout=10)
    assert answer.status_code == (200 if answers else 403)
    assert answers or "does not answer to this host name" in answer.json()["error"]


@pytest.mark.parametrize("path", ["run", "runsync", "cancel/x", "status/x"])
def test_a_page_of_another_origin_is_refused(api: LocalApi, path: str) -> None:
    headers = {"Origin": "https://example.com", "Content-Type": "application/json"}
    assert requests.post(f"{api.url}/{path}", data="{}", headers=headers, timeout=10).status_code == 403


def test_no_result_is_posted_to_a_webhook(api: LocalApi) -> None:
    with create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1)
        hook = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        answer = requests.post(f"{api.url}/runsync", json={"input": {"x": 1}, "webhook": hook}, timeout=30).json()
        assert answer["status"] == "FAILED"
        with pytest.raises(TimeoutError):
            listener.accept()
    assert "the local API ignores `webhook`" in api.log.read_text()


def test_a_job_tells_how_far_it_is_until_it_is_done(api: LocalApi, tiny: Path) -> None:
    job_id = call(api, "POST", "run", {"input": request_for("wan21_1b", tiny, sample_steps=150, num_frames=49)})["id"]
    steps = []
    while (answer := call(api, "GET", f"status/{job_id}"))["status"] == "IN_PROGRESS":
        steps.append(answer.get("output", {}).get("step", 0))
        time.sleep(0.05)
    assert answer["status"] == "COMPLETED"
    assert len(frames_of(answer["output"]["outputs"]["videos"][0])) == 49
    assert steps == sorted(steps) and steps[-1] > 0
    assert call(api, "GET", f"status/{job_id}") == answer, "and it can be asked again"


def test_a_post_for_the_status_waits_for_the_end(api: LocalApi, good: dict[str, Any]) -> None:
    job_id = call(api, "POST", "run", {"input": good})["id"]
    assert call(api, "POST", f"status/{job_id}")["status"] == "COMPLETED"


def test_a_cancelled_job_stops_and_the_next_one_runs(api: LocalApi, tiny: Path, good: dict[str, Any]) -> None:
    job_id = call(api, "POST", "run", {"input": request_for("wan21_1b", tiny, sample_steps=150, num_frames=81)})["id"]
    while "step" not in call(api, "GET", f"status/{job_id}").get("output", {}):
        time.sleep(0.02)
    assert call(api, "POST", f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    assert call(api, "GET", f"status/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    assert frames_of(output_of(api, good)["outputs"]["videos"][0]).any()


def test_its_health_is_that_of_an_endpoint_with_one_worker_and_names_the_model(api: LocalApi) -> None:
    answer = requests.get(f"{api.url}/health", timeout=30).json()
    assert answer["model"] == "wan21_1b"
    assert answer["workers"] == {"idle": 1, "initializing": 0, "ready": 1, "running": 0, "throttled": 0, "unhealthy": 0}
    assert set(answer["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}


def test_its_answers_are_those_of_the_openapi_document(api: LocalApi, good: dict[str, Any]) -> None:
    import jsonschema
    import openapi_spec_validator

    document = json.loads((ROOT / "docs/openapi.json").read_text())
    openapi_spec_validator.validate(document)

    def check(answer: Any, name: str) -> None:
        jsonschema.Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"}).validate(answer)

    done = api.run(good)
    check({"input": good}, "Job")
    check(done, "Status")
    check(done["output"], "Result")
    check(api.run(good | {"loras": [{"path": "none.safetensors"}]}), "Status")
    check(requests.get(f"{api.url}/health", timeout=30).json(), "Health")
    served = requests.get(f"{api.url}/openapi.json", timeout=30).json()["paths"]
    assert {(path, verb) for path, verbs in document["paths"].items() for verb in verbs} <= {
        (path, verb) for path, verbs in served.items() for verb in verbs
    }


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node; apt-get install nodejs")
def test_the_javascript_client_makes_a_video(api: LocalApi, good: dict[str, Any]) -> None:
    module = json.dumps((ROOT / "client/js/worker-wan-lora.js").as_uri())
    script = f"""import {{ Client }} from {module};
    const result = await Client.local({json.dumps(api.url)}, {{ pause: 0.1 }}).run({json.dumps(good)});
    console.log(JSON.stringify(result));"""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (video,) = json.loads(done.stdout)["outputs"]["videos"]
    assert file_of(video).stat().st_size == video["bytes"]


def test_a_failed_job_has_the_error_of_runsync(api: LocalApi, good: dict[str, Any]) -> None:
    job_id = call(api, "POST", "run", {"input": good | {"loras": []}})["id"]
    answer = call(api, "POST", f"status/{job_id}")
    assert (answer["status"], answer["error"]) == ("FAILED", api.run(good | {"loras": []})["error"])


def test_a_job_that_is_not_known_is_not_found(api: LocalApi) -> None:
    for method, path in (("GET", "status/x"), ("POST", "status/x"), ("POST", "cancel/x")):
        assert requests.request(method, f"{api.url}/{path}", timeout=10).status_code == 404
