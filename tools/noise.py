"""How much the encoders of two files alone would change their frames, measured on these very frames.

A fixed limit would not do: a codec changes grain and saturated colours far more than a calm picture.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np

from tools.frames import Clip, Frames, pairs, read_clip
from tools.metrics import Noise, distance
from worker.request import OutputFormat
from worker.video import VIDEO, encode

ROUNDING = Noise(coarse=0.5, ssim_loss=0.01)
"""What is left without any loss: rounding, and what another GPU does."""

_MARGIN = 1.4
"""Not every frame loses the same, and of a file that is encoded already a second encoding takes less."""

_FRAMES = 5
"""Enough for frames that MP4 predicts from others."""


def noise_between(a: Clip, b: Clip) -> Noise:
    """What may differ between two encodings of one video, in the kinds of `a` and `b`."""
    limits = [ROUNDING]
    for kind in (a.kind, b.kind):
        if kind not in ("png", "bmp"):
            worst = [_encoding_noise(clip.frames[:_FRAMES], kind) for clip in (a, b)]
            limits.append(Noise(max(noise.coarse for noise in worst), max(noise.ssim_loss for noise in worst)))
    return Noise(
        coarse=_MARGIN * math.hypot(*(noise.coarse for noise in limits)),
        ssim_loss=_MARGIN * sum(noise.ssim_loss for noise in limits),
    )


def _encoding_noise(frames: Frames, kind: str) -> Noise:
    """At the quality that the worker and the trainer write; what they do not write counts as WebP."""
    names: dict[str, OutputFormat] = {"mp4": "mp4", "gif": "gif"}
    encoding = VIDEO[names.get(kind, "webp")]
    even = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge")  # as H.264 needs it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"frames{encoding.suffix}"
        encode([even], file, encoding, 16, len(even))
        found = [distance(left, right) for left, right in pairs(frames, read_clip(file).frames)]
    return Noise(max(pair.coarse for pair in found), 1 - min(pair.ssim for pair in found))
