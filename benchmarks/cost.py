"""How the arithmetic of a video grows with its pixels and frames, counted by running the real code without contents.

    python -m benchmarks.cost

In PFLOP (1e15 multiplications and additions) for the real sizes: what one denoising step takes with guidance, two forward
passes, how much of it is attention, and what the texts and the decode take once. A GPU's time is this over its speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import real_size, report
from pipelines.diffusers_privates import decode_pieces

SIZES = [(832, 480, 21), (832, 480, 41), (832, 480, 81), (1024, 1024, 41), (1280, 720, 41), (1280, 720, 81)]
"""Width, height, frames."""
MODELS = ("wan21_1b", "wan22_5b", "wan22_14b_t2v")
_ON_A_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION = {_ON_A_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}  # type: ignore[no-untyped-call]
"""torch counts the attention of GPUs only; it is the same."""
_BLOCKS = 2
"""Enough to tell one block from what is there once."""


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_default_dtype(torch.bfloat16)
    rows = [row(model_id, *size) for model_id in MODELS for size in SIZES]
    report.write("cost", rows, unit="PFLOP, counted")
    return 0


def row(model_id: str, width: int, height: int, num_frames: int) -> dict[str, Any]:
    latents = real_size.latents_of(model_id, width, height, num_frames)

    def forward(blocks: int) -> tuple[float, float]:
        return counted(
            lambda: real_size.transformer(model_id, num_layers=blocks),
            lambda model: model(torch.empty(latents), torch.tensor([500]), torch.empty(1, 512, 4096)),
        )

    def decode(vae: Any) -> None:
        for _ in decode_pieces(vae, torch.empty(latents)):
            pass

    (one, attention_of_one), (two, attention_of_two) = forward(_BLOCKS - 1), forward(_BLOCKS)
    blocks = real_size.TRANSFORMERS[model_id]["num_layers"]
    step = 2 * (one + (blocks - 1) * (two - one))
    attention = 2 * (attention_of_one + (blocks - 1) * (attention_of_two - attention_of_one))
    return {
        "model": model_id,
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "step": round(step / 1e15, 3),
        "attention_part": round(attention / step, 2),
        "decode": round(counted(lambda: real_size.vae(model_id), decode)[0] / 1e15, 3),
    }


def counted(make: Callable[[], Any], run: Callable[[Any], object]) -> tuple[float, float]:
    """(floating point operations, those of attention)."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = make().eval()
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            run(model)
    by_operation = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in by_operation.items() if "attention" in str(operation))
    return float(counter.get_total_flops()), float(attention)


if __name__ == "__main__":
    sys.exit(main())
