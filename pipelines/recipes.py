"""How a video is sampled: the numbers that the model pages and the trainer disagree on, as data. No torch in this file.

`documented` is what the model pages say. `preview` is what ai-toolkit itself used for the samples it showed while it
trained, which changed with its version: until 0.9.3 UniPC, from then on its FlowMatch Euler scheduler with another shift,
both with a boundary of 0.875 for image-to-video too. Source: ai-toolkit at 0.12.26 and its history (commit ab1ee4df).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pipelines.catalog import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_NUM_FRAMES,
    DEFAULT_SEED,
    DEFAULT_SIZE,
    DEFAULT_STEPS,
    ImageFit,
    Match,
    ModelSpec,
    Sampler,
)
from pipelines.lora.file import LoraFile
from pipelines.trained import NOT_SAID, TrainedWith

if TYPE_CHECKING:
    from PIL import Image

Era = Literal["unipc", "flowmatch"]

FLOWMATCH_SINCE = (0, 9, 3)
"""The first version whose samples are made with FlowMatch Euler."""
TORCH_RESIZE_SINCE = (0, 9, 1)
"""The first version with transformers 5, whose image processor resizes tensors."""


@dataclass(frozen=True)
class Sampling:
    """One video as the user wants it, under the names of diffusers' pipelines. Sizes are in pixels.

    Every field down to `guidance_scale` is an argument of the pipelines' `__call__`.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = DEFAULT_SIZE
    height: int = DEFAULT_SIZE
    num_frames: int = DEFAULT_NUM_FRAMES
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    seed: int = DEFAULT_SEED
    guidance_scale_2: float | None = None
    """On the low-noise transformer of a MoE model; None: as `guidance_scale`."""
    image_fit: ImageFit = "stretch"
    control_image: Image.Image | None = None
    last_image: Image.Image | None = None
    """The frame to end on; see `ModelSpec.takes_last_image`."""


@dataclass(frozen=True)
class Recipe:
    """Everything about sampling that is not the user's to choose."""

    match: Match
    solver: Literal["checkpoint", "unipc", "flowmatch"]
    """`checkpoint`: the scheduler that the checkpoint brings along."""
    shift: float | None
    """flow_shift of UniPC, shift of FlowMatch Euler; None: as the checkpoint's own scheduler says."""
    boundary_ratio: float | None
    """None: as the checkpoint says, or there is one transformer."""
    size_divisor: int
    drops_incomplete_frames: bool
    trainer_dtypes: bool
    """Cast what diffusers keeps in float32 (time embedder, modulation tables, norm2, RoPE) to the model's dtype."""
    why: str
    """Why this solver, in words for the result."""
    text_attention: Literal["sdpa", "eager"] = "sdpa"
    """The attention of the text encoder. The trainer's transformers knows only `eager`."""
    decodes_in_tiles: bool = False
    image_resize: Literal["pil", "torch"] = "pil"
    """What brings the control image to the size of the image encoder."""
    timesteps: tuple[int, ...] | None = None
    """The steps of a draft, of 1000 and before the shift. They replace the number of steps, and there is no guidance."""
    era: Era | None = None
    """The trainer's, in `preview`, also where an explicit sampler took the place of its solver."""
    era_why: str | None = None

    @property
    def is_draft(self) -> bool:
        return self.timesteps is not None

    def with_shift(self, shift: float | None) -> Recipe:
        """The recipe with another shift of the noise schedule; None: its own. A draft keeps its own."""
        return self if shift is None or self.is_draft else replace(self, shift=shift)

    def fit(self, sampling: Sampling) -> Sampling:
        """`sampling` with the size, the frame count and the steps that are made; the control image is left as it is."""
        width, height = self.effective_size(sampling.width, sampling.height)
        made = replace(sampling, width=width, height=height, num_frames=self.effective_frames(sampling.num_frames))
        if self.timesteps is None:
            return made
        return replace(made, num_inference_steps=len(self.timesteps), guidance_scale=1.0, guidance_scale_2=None)

    def effective_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels, each floored to a multiple of `size_divisor`."""
        return width - width % self.size_divisor, height - height % self.size_divisor

    def effective_frames(self, num_frames: int) -> int:
        """The frame count that is made: 4n+1, since the VAE packs four frames into one latent frame after the first.

        diffusers keeps a count of the form 4n+1 and turns any other into `num_frames // 4 * 4 + 1` (40 becomes 41);
        ai-toolkit's 14B I2V and 5B code always takes `(num_frames - 1) // 4 * 4 + 1` (40 becomes 37).
        """
        if self.drops_incomplete_frames:
            return (num_frames - 1) // 4 * 4 + 1
        return num_frames if num_frames % 4 == 1 else num_frames // 4 * 4 + 1


def documented(spec: ModelSpec, sampler: Sampler | None = None) -> Recipe:
    """What the model page of `spec` says; `sampler` flowmatch swaps the scheduler alone."""
    if sampler == "flowmatch":
        solver, shift, why = "flowmatch", spec.trainer_shift, "sampler is flowmatch"
    elif spec.flow_shift is None:
        solver, shift, why = "checkpoint", None, "the model page says: as the checkpoint"
    else:
        solver, shift, why = "unipc", spec.flow_shift, "the model page says so"
    return Recipe(
        match="documented",
        solver=solver,  # type: ignore[arg-type]
        shift=shift,
        boundary_ratio=spec.boundary_ratio,
        size_divisor=spec.size_divisor,
        drops_incomplete_frames=spec.drops_incomplete_frames,
        trainer_dtypes=False,
        why=why,
    )


def draft_of(spec: ModelSpec) -> Recipe:
    """The few-step recipe of `spec`, which must have one; sizes and frame counts are those of the model page."""
    assert spec.draft is not None
    return replace(
        documented(spec),
        solver="flowmatch",
        shift=spec.draft.shift,
        boundary_ratio=spec.draft.boundary_ratio,
        timesteps=spec.draft.timesteps,
        why="a draft takes the steps of its distilled LoRA",
    )


def preview(
    spec: ModelSpec,
    era: Era,
    why: str,
    sampler: Sampler | None = None,
    trained: TrainedWith = NOT_SAID,
    version: tuple[int, ...] | None = None,
) -> Recipe:
    """What ai-toolkit samples with in `era`; an explicit `sampler` takes the place of the era's.

    `version`: the trainer's; None for the newest.
    """
    solver: Era = sampler or era
    return Recipe(
        match="preview",
        solver=solver,
        shift=spec.trainer_shift if solver == "flowmatch" else spec.trainer_unipc_shift,
        boundary_ratio=0.875 if spec.moe else None,
        size_divisor=spec.trainer_size_divisor,
        drops_incomplete_frames=spec.drops_incomplete_frames or trained.drops_incomplete_frames(spec),
        trainer_dtypes=True,
        why=f"sampler is {sampler}" if sampler else why,
        text_attention="eager",
        decodes_in_tiles=trained.decodes_in_tiles(spec),
        image_resize="torch" if version is None or version >= TORCH_RESIZE_SINCE else "pil",
        era=era,
        era_why=why,
    )


def era_of(files: Sequence[LoraFile]) -> tuple[Era, str]:
    """(era, why) of the trainer that made these LoRAs, from the newest version in their metadata."""
    versions = [version for file in files if (version := version_of(file))]
    if not versions:
        return "flowmatch", "no ai-toolkit version in the LoRA, so the newest era was taken"
    newest = max(versions)
    era: Era = "flowmatch" if newest >= FLOWMATCH_SINCE else "unipc"
    return era, f"the LoRA was made by ai-toolkit {'.'.join(map(str, newest))}"


def version_of(file: LoraFile) -> tuple[int, ...] | None:
    """ai-toolkit's version as numbers, or None."""
    match = re.match(r"\d{1,6}(\.\d{1,6})*", file.trainer_version)
    return tuple(int(part) for part in match[0].split(".")) if match else None
