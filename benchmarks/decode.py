"""What a decode by a VAE of the real size takes: plain diffusers, and the worker's way, one latent frame after another.

    python -m benchmarks.decode                                     64x64, 5 frames on a CPU; three sizes on a GPU
    python -m benchmarks.decode --width 832 --height 480 --num-frames 81

Random weights and latents, on a GPU in bf16. Both to frames in 0..255 in main memory. `equal`: whether the frames are those of
plain diffusers to the bit. `peak_gb`: the most that was allocated on the GPU at once, beside the weights.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor

from benchmarks import real_size, report
from pipelines.decode import decode

MODELS = ("wan21_1b", "wan22_5b")
"""One for each VAE: that of 2.1, which 14B of 2.2 has too, and that of 2.2."""
REPEAT = 3 if torch.cuda.is_available() else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("width", "height", "num-frames"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    sizes = [(832, 480, 41), (832, 480, 81), (1280, 720, 81)] if torch.cuda.is_available() else [(64, 64, 5)]
    if options.width:
        sizes = [(options.width, options.height or options.width, options.num_frames or 41)]
    rows = report.Rows("decode")
    for model_id in MODELS:
        vae = make_vae(model_id)
        for size in sizes:
            measure(rows, vae, model_id, size)
    return 0


def make_vae(model_id: str) -> Any:
    torch.manual_seed(0)
    with torch.device(report.device()):
        return real_size.vae(model_id).eval().to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def measure(rows: report.Rows, vae: Any, model_id: str, size: tuple[int, int, int]) -> None:
    latents = torch.randn(real_size.latents_of(model_id, *size), generator=torch.Generator().manual_seed(1)).to(vae.device)
    ways: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
        "plain diffusers": lambda: plain(vae, latents),
        "worker": lambda: np.concatenate(list(decode(vae, latents, vae.device))),
    }
    expected: np.ndarray[Any, Any] | None = None
    for way, call in ways.items():
        gc.collect()
        with report.Peak() as peak:
            frames, first = report.timed(call)
        expected = frames if expected is None else expected
        rows.add(
            model=model_id,
            size="x".join(map(str, size)),
            way=way,
            first_s=round(first, 3),
            seconds=round(report.median(REPEAT, call), 3),
            peak_gb=peak.gigabytes,
            equal=bool(np.array_equal(frames, expected)),
        )


@torch.no_grad()
def plain(vae: Any, latents: torch.Tensor) -> np.ndarray[Any, Any]:
    """As WanPipeline does it, to uint8 frames."""
    latents = latents.to(vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    video = vae.decode(latents / std + mean, return_dict=False)[0]
    images = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="pil")[0]
    return np.stack([np.asarray(image) for image in images])


if __name__ == "__main__":
    sys.exit(main())
