"""Run the job in test_input.json on the demo weights, and say in words what the film shows: `make run`.

    python -m builder.demo.run CHECKPOINTS [--model-id ID]

This runs the real worker, `python handler.py`, and prints its log in short. The result goes to a file beside the video. Another
model gets the same prompt with the LoRA that was trained for it, or with none, and a drawn first frame where it needs an image.
5B makes a film twice as large.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from builder.demo import captions, install, world
from builder.demo.judge import judge
from pipelines.catalog import MODELS, ModelSpec
from tools.frames import read_clip

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "output"
RESULT = "Job result: "
LORA_MODEL = "wan22_14b_t2v"
"""What the LoRA of test_input.json was trained for."""
LORAS = {LORA_MODEL: "striped_sail", "wan22_14b_i2v": "nightfall"}
"""The LoRA of each model that has one: its folder in `install.TRAINED`."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.run", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="what `python -m builder.demo.install` wrote")
    parser.add_argument("--model-id", choices=MODELS, default=LORA_MODEL, help="default: %(default)s")
    args = parser.parse_args()
    started = time.monotonic()
    result = run_worker(args.checkpoints.resolve(), args.model_id)
    if result is None:
        return 1
    folder = OUTPUT / "local_test"
    # Without the times, so that two runs write the same bytes; the worker's lines have told them.
    shown = {name: value for name, value in result.items() if name != "timings"}
    (folder / "result.json").write_text(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
    for video in result["outputs"]["videos"]:
        print("\n".join(in_words(video, result["settings"], folder)))
    print(f"  result   {folder / 'result.json'}")
    print(f"It took {time.monotonic() - started:.0f} s, the start of the worker included.")
    return 0


def job_of(model_id: str) -> dict[str, Any]:
    """Return the job of test_input.json for this model."""
    job: dict[str, Any] = json.loads((ROOT / "test_input.json").read_text())
    request = job["input"]
    prompt, spec = request["prompts"][0], MODELS[model_id]
    request["model"] = model_id
    if model_id in LORAS:
        of_request = LORAS[LORA_MODEL]
        request["loras"] = [lora | {"path": lora["path"].replace(of_request, LORAS[model_id])} for lora in request["loras"]]
    else:
        request |= {"loras": _without_effect(request["loras"], spec), "trigger_word": None}
        prompt["prompt"] = prompt["prompt"].replace("[trigger]", "").strip()
    for side in ("width", "height"):
        prompt[side] *= install.enlargement(spec)
    if spec.control_image == "required":
        prompt["ctrl_img"] = as_data_url(first_frame(prompt["prompt"], prompt["height"], prompt["width"]))
    return job


def _without_effect(loras: list[dict[str, Any]], spec: ModelSpec) -> list[dict[str, Any]]:
    """Return the LoRAs at scale 0: the worker wants one in every job, and these were trained for another model."""
    if not spec.moe:
        loras = [{"path": install.LORA_5B if spec.id == "wan22_5b" else loras[-1]["path"]}]
    return [lora | {"network_multiplier": 0.0} for lora in loras]


def first_frame(prompt: str, height: int, width: int) -> Image.Image:
    """Draw the start of a film of the prompt."""
    clip = world.sample(random.Random(0), **captions.understood(prompt))
    return world.to_pil(world.draw(clip, height, width, 2)[:, 0])


def as_data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def run_worker(checkpoints: Path, model_id: str) -> dict[str, Any] | None:
    """Run `python handler.py` and print its log lines in short.

    Returns the job's result, or None when it failed.
    """
    env = {"MODEL_ID": model_id, "DEVICE": "cpu", "OUTPUT_DIR": str(OUTPUT)}
    env |= {"CHECKPOINT_DIR": str(checkpoints), "LORA_DIR": str(checkpoints / "loras")}
    command = [sys.executable, str(ROOT / "handler.py"), "--test_input", json.dumps(job_of(model_id))]
    result = None
    with subprocess.Popen(  # noqa: S603 the command is ours
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as worker:
        for line in worker.stdout or ():
            if RESULT in line:
                result = ast.literal_eval(line.split(RESULT, 1)[1])["output"]
            elif line.startswith("{"):
                print(_short(json.loads(line)), flush=True)
            elif "error" in line.lower() or "cannot start" in line:
                print(line.rstrip(), file=sys.stderr)
    return result if worker.returncode == 0 else None


def _short(line: dict[str, Any]) -> str:
    seconds = f"  {line['seconds']:.1f} s" if "seconds" in line else ""
    return f"  {line['message']}{seconds}"


def in_words(video: dict[str, Any], settings: dict[str, Any], folder: Path) -> list[str]:
    """Return lines that say what was asked for, and what the film shows."""
    prompt = settings["prompts"][video["prompt_index"]]
    loras = ", ".join(
        f"{lora['transformer']} × {lora['network_multiplier']}" for lora in settings["loras"] if lora["network_multiplier"]
    )
    path = folder / f"{video['prompt_index']}.{video['format']}"
    return [
        "",
        f"Asked for: “{prompt['prompt']}”",
        f"  model {settings['model']}, LoRA {loras or 'none'}, seed {video['seed']}, {prompt['sample_steps']} steps, guidance "
        f"{prompt['guidance_scale']}",
        f"Made: {video['num_frames']} frames of {video['width']}x{video['height']} at {video['fps']} a second",
        f"It shows {judge(frames_of(path))} (judged by its pixels).",
        "",
        f"  video    {path}",
        f"  poster   {path.with_suffix('.poster.jpg')}",
    ]


def frames_of(path: Path) -> torch.Tensor:
    """Return a video file's frames [3, frames, height, width] in -1…1."""
    return torch.from_numpy(read_clip(path).frames).permute(3, 0, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    sys.exit(main())
