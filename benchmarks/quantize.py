"""What a preview of a quantized training costs: rounding the weights, and putting those of the checkpoint back.

    python -m benchmarks.quantize                        tiny models, on a CPU
    python -m benchmarks.quantize --size 1.3B            random weights of the real size, written to a temp folder

Prints a table and writes JSON with the device and versions to benchmarks/results/. Each figure is the median of several rounds,
measured in one run with fresh pipelines of plain diffusers.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.switch import arguments, in_a_folder, plain_diffusers, write_model
from pipelines import load_pipeline
from pipelines.trained import Quantization


def main() -> int:
    parser = arguments("python -m benchmarks.quantize", __doc__, repeat=3)
    parser.add_argument("--formats", nargs="+", default=["qfloat8", "float8", "uint4"])
    options = parser.parse_args()
    in_a_folder(lambda folder: measure(folder, options.size, options.blocks, options.formats, options.repeat))
    return 0


def measure(root: Path, size: str, blocks: int | None, formats: list[str], repeat: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = write_model(root, size, blocks)
    fresh = report.median(repeat, lambda: plain_diffusers(root, device))
    model = load_pipeline("wan21_1b", root, device, dtype=torch.bfloat16)
    rows = []
    for name in formats:
        there, back = [], []
        for _ in range(repeat):
            there.append(report.seconds(partial(model.apply_loras, [], quantization=Quantization(name, None))))
            back.append(report.seconds(partial(model.apply_loras, [])))
        row: dict[str, object] = {"format": name}
        for step, values in {"round": there, "restore": back}.items():
            seconds = statistics.median(values)
            row |= {f"{step}_seconds": round(seconds, 3), f"{step}_to_fresh": round(seconds / fresh, 3)}
        rows.append(row)
    gigabytes = round(sum(p.nbytes for p in model._pipe.transformer.parameters()) / 1e9, 2)
    size = f"{size}-{shape.blocks}-blocks"
    report.write(f"quantize-{size}", rows, size=size, transformer_gigabytes=gigabytes, fresh_pipeline_seconds=round(fresh, 3))


if __name__ == "__main__":
    sys.exit(main())
