"""The workflows for n8n and ComfyUI in examples/ make a video at a local API."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from pipelines.catalog import MODELS
from tests.worker_process import ROOT, LocalApi
from worker.parse import parse

N8N = ROOT / "examples/n8n/workflow.json"
COMFYUI = ROOT / "examples/comfyui"
NODE = shutil.which("node")


def made_small(request: dict[str, Any]) -> dict[str, Any]:
    """The request of an example, for the worker of the tests: with its tiny LoRAs, few pixels, frames and steps."""
    parse(request, MODELS["wan22_14b_t2v"])  # as it stands in the example
    for lora in request["loras"]:
        lora["path"] = f"wan22_14b_t2v/wan22_14b_t2v_{lora['transformer']}_noise.safetensors"
    for prompt in request["prompts"]:
        prompt |= {"width": 64, "height": 64, "num_frames": 5, "sample_steps": 2}
    return request


def run_in_n8n(worker: LocalApi, folder: Path, **changes: Any) -> dict[str, Any]:
    """What the workflow's last node gives. `changes`: of the first LoRA."""
    flow = json.loads(N8N.read_text())
    [edited] = [node["parameters"] for node in flow["nodes"] if node["name"] == "Request"]
    filled = {"url": worker.url, "input": made_small(json.loads(edited["jsonOutput"])["input"])}
    filled["input"]["loras"][0] |= changes
    edited["jsonOutput"] = json.dumps(filled)
    (folder / "workflow.json").write_text(json.dumps(flow))
    command = [str(NODE), str(Path(__file__).parent / "n8n.mjs"), str(folder / "workflow.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    given: dict[str, Any] = json.loads(done.stdout)
    return given


@pytest.mark.skipif(NODE is None, reason="no Node; apt-get install nodejs")
def test_the_n8n_workflow_waits_for_the_video_and_gives_its_url(worker: LocalApi, tmp_path: Path) -> None:
    given = run_in_n8n(worker, tmp_path)
    assert Path(unquote(urlsplit(given["url"]).path)).stat().st_size > 0
    assert given["result"]["settings"]["prompts"][0]["prompt"] == "sks a sailing boat at sunset"


@pytest.mark.skipif(NODE is None, reason="no Node; apt-get install nodejs")
def test_the_n8n_workflow_stops_with_the_workers_error(worker: LocalApi, tmp_path: Path) -> None:
    assert run_in_n8n(worker, tmp_path, path="lost.safetensors")["error"].startswith("FAILED: LORA_NOT_FOUND: ")


class Comfy:
    """ComfyUI, as far as the node uses it."""

    def __init__(self, node: ModuleType) -> None:
        self.node = node
        self.progress: list[int] = []
        self.is_interrupted = False
        self.shown: dict[str, Any] = {}

    def make(self, url: str, **changes: Any) -> tuple[str, str]:
        """Run the node of workflow.json with its inputs. `changes`: of the first prompt."""
        [node] = [
            node for node in json.loads((COMFYUI / "workflow.json").read_text()).values() if node["class_type"] != "PreviewAny"
        ]
        given = node["inputs"]
        kind = self.node.NODE_CLASS_MAPPINGS[node["class_type"]]
        assert set(given) == set(kind.INPUT_TYPES()["required"])
        request = made_small(json.loads(given["request"]))
        request["prompts"][0] |= changes
        answer = getattr(kind(), kind.FUNCTION)(**given | {"url": url, "request": json.dumps(request)})
        self.shown = answer["ui"]
        made: tuple[str, str] = answer["result"]
        return made


class Interrupted(BaseException):
    """As ComfyUI's InterruptProcessingException."""


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comfy:
    names = ("comfy", "comfy.utils", "comfy.model_management", "folder_paths")
    package, utils, management, paths = (ModuleType(name) for name in names)
    for name, module in zip(names, (package, utils, management, paths), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    package.utils, package.model_management = utils, management  # type: ignore[attr-defined]

    class ProgressBar:
        def __init__(self, total: int) -> None:
            assert total == 100

        def update_absolute(self, value: int) -> None:
            found.progress.append(value)
            throw()  # as ComfyUI's own hook does

    def throw() -> None:
        if found.is_interrupted:
            raise Interrupted

    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = throw  # type: ignore[attr-defined]
    paths.get_output_directory = lambda: str(tmp_path / "output")  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("worker_wan_lora", COMFYUI / "worker_wan_lora.py")
    assert spec and spec.loader
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    monkeypatch.setattr(node, "SECONDS_BETWEEN_LOOKS", 0.05)
    found = Comfy(node)
    return found


def test_the_comfyui_node_makes_the_video_of_the_workflow(comfy: Comfy, worker: LocalApi, tmp_path: Path) -> None:
    example = json.loads(json.dumps(comfy.node.EXAMPLE))
    parse(example, MODELS["wan22_14b_t2v"])
    url, file = comfy.make(worker.url, sample_steps=20)
    assert Path(file).read_bytes() == Path(unquote(urlsplit(url).path)).read_bytes()
    assert Path(file).parent == tmp_path / "output"  # which does not exist in a new ComfyUI
    assert comfy.shown == {"images": [{"filename": Path(file).name, "subfolder": "", "type": "output"}], "animated": (True,)}
    assert comfy.progress == sorted(comfy.progress) and comfy.progress


def test_the_comfyui_node_fails_with_the_workers_error(comfy: Comfy, worker: LocalApi) -> None:
    with pytest.raises(RuntimeError, match=r"^FAILED: INVALID_INPUT: `prompts\[0\].width`"):
        comfy.make(worker.url, width=20)


def test_stopping_comfyui_cancels_the_job(comfy: Comfy, worker: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    called, call = [], comfy.node._call
    monkeypatch.setattr(comfy.node, "_call", lambda url, *more, **options: (called.append(url), call(url, *more, **options))[1])
    comfy.is_interrupted = True
    with pytest.raises(Interrupted):
        comfy.make(worker.url, sample_steps=150, num_frames=81)
    job = called[-1].rpartition("/cancel/")[2]
    assert requests.get(f"{worker.url}/status/{job}", timeout=60).json()["status"] == "CANCELLED"


def test_an_image_of_comfyui_becomes_a_png(comfy: Comfy) -> None:
    image = torch.rand(2, 4, 6, 3)
    with urlopen(comfy.node._png(image)) as data:  # the standard library reads data URLs
        pixels = np.asarray(Image.open(BytesIO(data.read())))
    assert np.abs(pixels / 255 - image[0].numpy()).max() < 1 / 255
