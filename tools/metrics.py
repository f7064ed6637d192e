"""Distances between two frames or videos: PSNR, SSIM, and a verdict in words. Reads no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
"""[height, width, 3], RGB."""
Plane = npt.NDArray[np.float64]
"""[height, width]."""

WINDOW = 11
"""Pixels per side; SSIM is not defined on smaller frames."""
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_TAPS = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * 1.5**2))
_TAPS /= _TAPS.sum()

_BLOCK = 8
"""Pixels per side."""


@dataclass(frozen=True)
class FrameDistance:
    """The distance between two frames."""

    mean_square: float
    """Mean squared difference over R, G and B."""
    ssim: float
    """On the luma; 1 for equal frames."""
    max_difference: int
    """Grey levels, 0 to 255."""
    mean_difference: float
    """Grey levels, over R, G and B."""
    coarse: float
    """Root mean square difference of the means of 8x8 blocks, in grey levels. Codecs keep the means, settings change them."""
    likeness: float
    """Correlation of those means in luma, -1 to 1. It is high if bright and dark are in the same places."""

    @property
    def psnr(self) -> float:
        """dB; infinite for equal frames."""
        return psnr_of(self.mean_square)


@dataclass(frozen=True)
class Verdict:
    """The meaning of a whole video's numbers."""

    code: Literal["identical", "encoding_noise", "same_scene", "different"]
    text: str
    advice: str = ""
    """The next step for the user."""

    @property
    def equal(self) -> bool:
        return self.code in ("identical", "encoding_noise")


@dataclass(frozen=True)
class Noise:
    """The largest distance at which two videos count as the same."""

    coarse: float
    """See `FrameDistance.coarse`."""
    ssim_loss: float
    """1 minus SSIM."""


SAME_SCENE_LIKENESS, SAME_SCENE_COARSE = 0.6, 60.0
"""Smallest likeness and largest coarse distance of two pictures with the same things in the same places. Measured: likeness
0.75 to 1.0 and coarse up to 30 for one picture redrawn or shifted by 3% of its width; likeness at most 0.3 for its mirror image
and for other pictures."""


def verdict(distances: Sequence[FrameDistance], noise: Noise) -> Verdict:
    """Judge two clips by the distances of their frames. Up to `noise`, a distance is due to their encoding."""
    if not any(pair.max_difference for pair in distances):
        return Verdict("identical", "identical: every pixel of every frame is the same")
    coarse = max(pair.coarse for pair in distances)
    if coarse <= noise.coarse and min(pair.ssim for pair in distances) >= 1 - noise.ssim_loss:
        return Verdict(
            "encoding_noise",
            "equal within encoding noise: the difference is no larger than the loss of these file formats",
            'to see smaller differences, request "output_format": "png", or the format of the other video',
        )
    likeness = sum(pair.likeness for pair in distances) / len(distances)
    if likeness >= SAME_SCENE_LIKENESS and coarse <= SAME_SCENE_COARSE:
        return Verdict(
            "same_scene",
            "same scene, made differently: the same things in the same places, drawn in another way",
            "compare solver and shift, guidance_scale, sample_steps, the LoRA's strength or step, quantization in the trainer",
        )
    return Verdict(
        "different",
        "different: not the same picture",
        "compare seed, prompt, size (another rounding changes all of the noise), frame count, control image, model, LoRA",
    )


def overall_psnr(distances: Sequence[FrameDistance]) -> float:
    """Return the PSNR in dB, from the mean squared difference over all frames."""
    return psnr_of(sum(pair.mean_square for pair in distances) / len(distances))


def distance(a: Frame, b: Frame) -> FrameDistance:
    """Return the distance between two frames of the same shape, at least 11x11."""
    difference = a.astype(np.float64) - b
    blocks_a, blocks_b = block_means(a), block_means(b)
    return FrameDistance(
        mean_square=float(np.mean(difference**2)),
        ssim=ssim(luma(a), luma(b)),
        max_difference=int(np.abs(difference).max()),
        mean_difference=float(np.abs(difference).mean()),
        coarse=float(np.sqrt(np.mean((blocks_a - blocks_b) ** 2))),
        likeness=correlation(luma(blocks_a), luma(blocks_b)),
    )


def psnr_of(mean_square: float) -> float:
    """Return the PSNR in dB for a mean squared difference of 8-bit values; infinite for 0."""
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def luma(rgb: npt.NDArray[np.generic]) -> Plane:
    """Return the BT.709 luma, 0 to 255, as in the worker's videos."""
    return np.asarray(rgb @ np.array([0.2126, 0.7152, 0.0722]), np.float64)


def ssim(a: Plane, b: Plane) -> float:
    """Return the mean structural similarity of two planes with values from 0 to 255.

    Gaussian window of 11x11 with sigma 1.5, K1 0.01, K2 0.03, at positions where the whole window is inside the plane.
    Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a = _blurred(a * a) - mean_a**2
    variance_b = _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return float(np.mean((2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1) * structure))


def _blurred(plane: Plane) -> Plane:
    height, width = (side - WINDOW + 1 for side in plane.shape)
    rows = sum((tap * plane[i : i + height] for i, tap in enumerate(_TAPS)), np.zeros((height, plane.shape[1])))
    return sum((tap * rows[:, i : i + width] for i, tap in enumerate(_TAPS)), np.zeros((height, width)))


def block_means(frame: Frame) -> npt.NDArray[np.float64]:
    """Return the means of 8x8 pixels, [height // 8, width // 8, 3]. Incomplete blocks at the right and bottom are left out."""
    rows, columns = frame.shape[0] // _BLOCK, frame.shape[1] // _BLOCK
    cut = frame[: rows * _BLOCK, : columns * _BLOCK].astype(np.float64)
    return np.asarray(cut.reshape(rows, _BLOCK, columns, _BLOCK, 3).mean(axis=(1, 3)))


def correlation(a: Plane, b: Plane) -> float:
    """Return the Pearson correlation; 1 if both planes are flat, 0 if one is."""
    a, b = a - a.mean(), b - b.mean()
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if norm_a < 1e-6 or norm_b < 1e-6:
        return float(norm_a < 1e-6 and norm_b < 1e-6)
    return float(np.sum(a * b) / (norm_a * norm_b))
