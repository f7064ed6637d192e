"""Names the likely causes of a difference between two videos, from the settings of one or both.

The sizes are mean differences, of 255. They come from three recorded trainings in `tests/trainer_runs`, whose samples were made
again with one setting changed. The models are tiny; real ones were not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
"""Flat, as in the comment of an MP4."""

Differing = Mapping[str, tuple[Any, Any]]
"""Path of each setting that differs → its values in A and B."""


@dataclass(frozen=True)
class _Cause:
    settings: str
    """The paths of its settings, as a pattern."""
    words: str
    size: str = ""
    """The measured mean difference; "" if it was not measured."""


_CAUSES = (
    _Cause(r"model|checkpoints.*", "another model or checkpoint does"),
    _Cause(r"prompt|neg", "another text does"),
    _Cause(r"width|height|num_frames", "another size does, since it changes all of the noise"),
    _Cause(r"seed", "another seed does", "54 to 56"),
    _Cause(r"control_image_sha256", "another control image does"),
    _Cause(r"loras\[\d\]\.(sha256|step)|loras", "another LoRA, or another step of it, does"),
    _Cause(r"loras\[\d\]\.network_multiplier", "another strength of the LoRA does", "29 for half of it"),
    _Cause(r"guidance_scale", "another guidance does", "12 to 42 for none"),
    _Cause(r"sample_steps", "another number of steps does", "13 to 24 for half of them"),
    _Cause(r"scheduler|shift|boundary_ratio|era|sampler|match", "another scheduler does"),
    _Cause(r"decodes_in_tiles|trained_with\.(low_vram|vae_tiling)", "tiles do", "9"),
    _Cause(r"quantize|trained_with(\.(quantize|quantize_te|qtype))?", "a quantized training does", "3 to 5"),
    _Cause(
        r"loras\[\d\]\.applied_by|trained_with\.multipliers|trainer_dtypes|text_attention", "another order of roundings does"
    ),
    _Cause(r"device|gpus|dtype|attention|compiled|versions\..*", "another machine or library does", "0.8 to 1.6, in bf16,"),
)
"""Sorted by the size of the change, the largest first."""


def likely_causes(differing: Differing) -> list[str]:
    """Return one line for each cause whose settings differ, the largest first."""
    found = []
    for cause in _CAUSES:
        if names := [path for path in differing if re.fullmatch(cause.settings, path)]:
            size = f" (mean {cause.size} of 255)" if cause.size else ""
            found.append(f"differs as {cause.words}{size}: {', '.join(names)}")
    return found


def to_check(settings: Settings, side: str) -> Iterator[str]:
    """Yield what to check if only one side has settings, as with a sample of the trainer. `side`: A or B."""
    if settings.get("match") == "documented":
        yield f"{side} was made as the model page says; the trainer's samples need `match`: preview"
    elif not settings.get("trained_with"):
        yield (
            f"it is not known to {side} how the training ran: a quantized one differs by a mean of 3 to 5 of 255, tiles by 9; "
            "set `trained_with` from its config.yaml"
        )
    if (device := str(settings.get("device", ""))) and settings.get("dtype") == "bfloat16":
        yield f"{side} was made on {device}; another kind of processor rounds bf16 differently, by a mean of 0.8 to 1.6"
