"""Measures how much the encoders of two files change their frames.

The measurement uses the frames themselves, since a codec changes grain and saturated colours far more than a calm picture.
"""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tools.frames import Clip, Frames, pairs, read_clip
from tools.metrics import Noise, distance
from worker.request import OutputFormat
from worker.video import VIDEO, encode

ROUNDING = Noise(coarse=0.5, ssim_loss=0.01)
"""Differences without any encoding loss: rounding, and another GPU."""

_MARGIN = 1.4
"""Frames lose different amounts, and a file that is already encoded loses less when it is encoded again."""

_FRAMES = 5
"""Enough to include frames that MP4 predicts from others."""


def noise_between(a: Clip, b: Clip) -> Noise:
    """Return the largest distance between two encodings of one video, in the formats of `a` and `b`."""
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
    """Return the loss of encoding `frames` at the worker's and the trainer's quality. Others count as WebP.

    The trainer's samples of one frame are JPEGs of Pillow's own quality, 75.
    """
    if kind in ("jpeg", "mpo"):
        found = [distance(frame, _as_jpeg(frame)) for frame in frames]
        return Noise(max(pair.coarse for pair in found), 1 - min(pair.ssim for pair in found))
    names: dict[str, OutputFormat] = {"mp4": "mp4", "gif": "gif"}
    encoding = VIDEO[names.get(kind, "webp")]
    # H.264 needs even sides.
    even = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"frames{encoding.suffix}"
        encode([even], file, encoding, 16, len(even))
        found = [distance(left, right) for left, right in pairs(frames, read_clip(file).frames)]
    return Noise(max(pair.coarse for pair in found), 1 - min(pair.ssim for pair in found))


def _as_jpeg(frame: Frames) -> Frames:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return np.asarray(Image.open(file))
