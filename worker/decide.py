"""What a request comes to: the videos that will be made, with every number decided."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from pipelines.catalog import DEFAULT_SEED, Sampler
from pipelines.recipes import Recipe, Sampling
from worker.request import Prompt, Request

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Shot:
    """A prompt with everything decided: the video that will be made, and how."""

    index: int
    """Among all videos of the job."""
    recipe: Recipe
    sampling: Sampling
    """Fitted to the recipe: its size and frame count are those of the video."""
    fps: int
    warnings: tuple[str, ...]
    prompt_index: int
    """The prompt's place in the request."""
    video_index: int | None = None
    """Among the videos of its prompt; None where it is the only one."""

    @property
    def field(self) -> str:
        """What a message calls it."""
        seed = "" if self.video_index is None else f" (seed {self.sampling.seed})"
        return f"prompts[{self.prompt_index}]{seed}"

    def identity(self) -> dict[str, int]:
        """What names the video in the result."""
        number = {} if self.video_index is None else {"video_index": self.video_index}
        return {"prompt_index": self.prompt_index, **number}


FIELD_OF = {field.name: field.name for field in fields(Sampling) if not field.name.endswith("_image")} | {
    "negative_prompt": "neg",
    "num_inference_steps": "sample_steps",
}
"""A field of Sampling, in diffusers' terms, to the prompt's field."""


def shots_of(
    request: Request,
    recipe_for: Callable[[Sampler | None], Recipe],
    draw_seed: Callable[[int], int],
    images: Mapping[str, Image.Image] = {},
) -> list[Shot]:
    """Decide on trigger words, sizes, frame counts and seeds.

    `draw_seed` gives the random seed of a prompt by its index. `images`: the control images by their source.
    """
    shots: list[Shot] = []
    for index, prompt in enumerate(request.prompts):
        first = _shot(request, index, recipe_for(prompt.sampler).with_shift(prompt.shift), draw_seed, images)
        shots += [
            replace(
                first,
                index=len(shots) + number,
                sampling=replace(first.sampling, seed=first.sampling.seed + number),
                warnings=() if number else first.warnings,
                video_index=number if prompt.num_videos > 1 else None,
            )
            for number in range(prompt.num_videos)
        ]
    return shots


def _shot(
    request: Request, index: int, recipe: Recipe, draw_seed: Callable[[int], int], images: Mapping[str, Image.Image]
) -> Shot:
    prompt = request.prompts[index]
    control_image, last_image = (images.get(image[1]) if image else None for image in (prompt.control_image, prompt.last_image))
    asked = Sampling(
        **{term: getattr(prompt, name) for term, name in FIELD_OF.items()}, control_image=control_image, last_image=last_image
    )
    made = recipe.fit(asked)
    warnings = []
    if (made.width, made.height) != (asked.width, asked.height):
        warnings.append(
            f"prompts[{index}]: {asked.width}x{asked.height} became {made.width}x{made.height}, "
            f"since {request.model} makes multiples of {recipe.size_divisor}"
        )
    if made.num_frames != asked.num_frames:
        warnings.append(f"prompts[{index}]: {asked.num_frames} frames became {made.num_frames}, since Wan makes 4n+1 frames")
    trigger_word = (prompt.trigger_word or request.trigger_word or "").strip()
    text = prompt.prompt.replace("[trigger]", trigger_word) if trigger_word else prompt.prompt
    warnings += [f"prompts[{index}]: {warning}" for warning in _text_warnings(text, prompt.neg, trigger_word)]
    for names, why in _without_effect(prompt, recipe, made):
        if names:
            named = ", ".join(f"`{name}`" for name in names)
            warnings.append(f"prompts[{index}]: {named} {'has' if len(names) == 1 else 'have'} no effect: {why}")
    for name, image in (("control image", control_image), ("last image", last_image)):
        if image and prompt.image_fit == "stretch" and _is_stretched(image.size, (made.width, made.height)):
            sizes = "the {} has {}x{} pixels and is stretched to {}x{}".format(name, *image.size, made.width, made.height)
            warnings.append(f"prompts[{index}]: {sizes}; crop it, set `image_fit`, or ask for a video of its aspect")
    seed = DEFAULT_SEED + index if prompt.seed is None else prompt.seed
    made = replace(made, prompt=text, seed=draw_seed(index) if seed == -1 else seed)
    return Shot(index, recipe, made, prompt.fps, tuple(warnings), index)


def _without_effect(prompt: Prompt, recipe: Recipe, made: Sampling) -> Iterator[tuple[list[str], str]]:
    """The fields with other values than the defaults that this video does not depend on, and why."""

    def changed(*names: str) -> list[str]:
        return [name for name in names if getattr(prompt, name) != Prompt.model_fields[name].default]

    if recipe.is_draft:
        unused = changed("neg", "sample_steps", "guidance_scale", "guidance_scale_2", "shift", "sampler")
        yield unused, f"a draft takes its own {made.num_inference_steps} steps, without guidance"
    elif made.guidance_scale <= 1:
        yield changed("neg"), f"with `guidance_scale` {made.guidance_scale:g} there is no guidance"
    if not (prompt.control_image or prompt.last_image):
        yield changed("image_fit"), "the prompt has no image"


_FLAG = re.compile(r"(?:^|\s)--(n|w|h|d|seed|l|cfg|s|steps|m|network_multiplier|frames|num_frames|fps|ctrl_img)\s")
"""The flags that ai-toolkit reads in a sample's prompt."""
_PLACEHOLDER = re.compile(r"\[(trigger|name)\]", re.IGNORECASE)
_STRETCHED = 1.02
"""How far the aspects of the control image and the video may be apart without a warning."""


def _text_warnings(prompt: str, neg: str, trigger_word: str) -> Iterator[str]:
    """What the text encoder would read as words, and is not meant so."""
    for name, text in (("prompt", prompt), ("neg", neg)):
        if found := _PLACEHOLDER.search(text):
            if found[0] == "[trigger]" and name == "prompt" and not trigger_word:
                yield "the prompt has [trigger], but there is no trigger_word to put in its place"
            else:
                yield f"the {name} has {found[0]}, which is not replaced; only [trigger] in the prompt is"
        if flag := _FLAG.search(text):
            yield f"the {name} has the trainer's flag --{flag[1]}, which is read as text; set the fields of the request instead"


def _is_stretched(image: tuple[int, int], video: tuple[int, int]) -> bool:
    stretch = (image[0] / image[1]) / (video[0] / video[1])
    return not 1 / _STRETCHED <= stretch <= _STRETCHED
