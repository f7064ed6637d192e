"""A node for ComfyUI that makes a video on a worker: copy this file into ComfyUI/custom_nodes and start ComfyUI again.

It needs no package. The API key comes from the variable RUNPOD_API_KEY of ComfyUI's process, so that it gets into no workflow
and into no picture's metadata. A local API needs none.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

EXAMPLE = {
    "model": "wan22_14b_t2v",
    "trigger_word": "sks",
    "loras": [
        {"path": "my_job/my_job_high_noise.safetensors", "transformer": "high"},
        {"path": "my_job/my_job_low_noise.safetensors", "transformer": "low"},
    ],
    "prompts": [{"prompt": "[trigger] a sailing boat at sunset", "width": 832, "height": 480, "num_frames": 41}],
}
RUNNING = ("IN_QUEUE", "IN_PROGRESS")
SECONDS_BETWEEN_LOOKS = 2
TRIES = 5


class WorkerWanLora:
    """Sends one request and waits for its first video or image."""

    CATEGORY = "video"
    DESCRIPTION = "Makes a video with worker-wan-lora, on a RunPod endpoint or a local API."
    FUNCTION = "make"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("url", "file")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "url": ("STRING", {"default": "https://api.runpod.ai/v2/ENDPOINT_ID"}),
                "request": ("STRING", {"default": json.dumps(EXAMPLE, indent=2), "multiline": True}),
                "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": "Empty: the request's own."}),
                "seed": ("INT", {"default": 42, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            },
            "optional": {"image": ("IMAGE", {"tooltip": "The first frame, for models that take one."})},
        }

    def make(self, url: str, request: str, prompt: str, seed: int, image: Any = None) -> dict[str, Any]:
        """Return what the node shows, and (presigned URL, path of the file in ComfyUI's output folder).

        Raises RuntimeError with the worker's error.
        """
        job = json.loads(request)
        job = job.get("input", job)
        first = job["prompts"][0]
        first["seed"] = seed
        if prompt:
            first["prompt"] = prompt
        if image is not None:
            first["ctrl_img"] = _png(image)
        job_id = _call(f"{url}/run", {"input": job}, tries=1)["id"]  # sent once: a repeated request is made, and paid, twice
        outputs = _wait(url, job_id)["outputs"]
        made = [*outputs["videos"], *outputs["images"]][0]
        target = Path(folder_paths.get_output_directory()) / f"{job_id}{Path(made['key']).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)  # a new ComfyUI has none yet
        with urllib.request.urlopen(made["url"]) as answer, target.open("wb") as file:  # noqa: S310 the worker's own URL
            shutil.copyfileobj(answer, file)
        shown = {"filename": target.name, "subfolder": "", "type": "output"}
        return {
            "ui": {"images": [shown], "animated": (target.suffix != ".png",)},
            "result": (made["url"], str(target)),
        }


def _wait(url: str, job_id: str) -> dict[str, Any]:
    bar = comfy.utils.ProgressBar(100)
    while True:
        answer = _call(f"{url}/status/{job_id}")
        if answer["status"] == "COMPLETED":
            return dict(answer["output"])
        if answer["status"] not in RUNNING:
            raise RuntimeError(f"{answer['status']}: {answer.get('error', 'see the log of the worker')}")
        try:
            bar.update_absolute((answer.get("output") or {}).get("percent", 0))  # raises too, when the user stops the queue
            comfy.model_management.throw_exception_if_processing_interrupted()
        except BaseException:
            _call(f"{url}/cancel/{job_id}", {})
            raise
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _call(url: str, body: dict[str, Any] | None = None, tries: int = TRIES) -> dict[str, Any]:
    """POST with a `body`, else GET. A lost connection is tried again."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("RUNPOD_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:  # noqa: S310
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code < 500 or not left:
                raise RuntimeError(f"{url} answers with status {error.code}") from error
        except OSError as error:
            if not left:
                raise RuntimeError(f"no answer from {url}: {error}") from error
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise AssertionError


def _png(image: Any) -> str:
    """ComfyUI's IMAGE, a tensor [batch, height, width, 3] from 0 to 1, as a data URL; the first of the batch."""
    from PIL import Image

    pixels = (image[0].cpu().numpy() * 255).round().clip(0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


NODE_CLASS_MAPPINGS = {"WorkerWanLora": WorkerWanLora}
NODE_DISPLAY_NAME_MAPPINGS = {"WorkerWanLora": "Wan video with a LoRA (worker)"}
