"""From the start of a process to its first video, beside what plain diffusers use takes for the same video.

    python -m benchmarks.start [--repeat N]

Both make one tiny video with a LoRA, in turn, each time in a fresh process on cached files. Ours is `python handler.py
--test_input …`: settings, checks, model, job, file and result. The clock stops when the process has ended. On a machine that
has other things to do as well, the CPU time tells more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from benchmarks import report
from builder import tiny_checkpoints

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, FRAMES, STEPS = 64, 64, 5, 2
LORA = "wan21_1b/rank4.safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_checkpoints.write_checkpoints(folder)
        tiny_checkpoints.write_loras(folder / "loras")
        commands = {"plain diffusers": plain(folder), "handler.py": ours()}
        env = environment(folder)
        for command in commands.values():  # fills the caches, bytecode among them
            run(command, env)
        rounds = [{name: run(command, env) for name, command in commands.items()} for _ in range(repeat)]
    seconds, cpu_seconds = (
        {name: statistics.median(took[name][which] for took in rounds) for name in commands} for which in (0, 1)
    )
    rows = [
        {
            "process": name,
            "seconds": round(seconds[name], 2),
            "ratio": round(seconds[name] / seconds["plain diffusers"], 2),
            "cpu_seconds": round(cpu_seconds[name], 2),
            "cpu_ratio": round(cpu_seconds[name] / cpu_seconds["plain diffusers"], 2),
        }
        for name in commands
    ]
    report.write("start", rows, repeat=repeat)
    return 0


def plain(folder: Path) -> list[str]:
    checkpoint, lora, target = folder / tiny_checkpoints.T2V_1B, folder / "loras" / LORA, folder / "plain.mp4"
    size = ["--width", str(WIDTH), "--height", str(HEIGHT), "--num-frames", str(FRAMES), "--steps", str(STEPS)]
    return ["benchmarks/baseline.py", str(checkpoint), str(lora), str(target), *size]


def ours() -> list[str]:
    prompt = {"prompt": "a boat", "width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "sample_steps": STEPS}
    request = {"model": "wan21_1b", "loras": [{"path": LORA}], "prompts": [prompt]}
    return ["handler.py", "--test_input", json.dumps({"input": request})]


def environment(folder: Path) -> dict[str, str]:
    places = {"CHECKPOINT_DIR": folder, "LORA_DIR": folder / "loras", "OUTPUT_DIR": folder / "output"}
    worker = {"MODEL_ID": "wan21_1b", "DEVICE": "cuda" if torch.cuda.is_available() else "cpu", "OMP_NUM_THREADS": "1"}
    return os.environ | worker | {name: str(place) for name, place in places.items()}


def run(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(seconds, CPU seconds, those of its own processes included) of `python …`."""
    cpu, start = cpu_of_children(), time.perf_counter()
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start, cpu_of_children() - cpu


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
