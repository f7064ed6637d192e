"""The documented request, and how a job's `input` becomes one.

The pydantic models are the schema; `docs/request.schema.json` is generated from them. `parse` returns a Request or raises
one error that lists every problem. It looks at nothing but the input: no file, no network, no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.catalog import (
    DEFAULT_FPS,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_NUM_FRAMES,
    DEFAULT_SEED,
    DEFAULT_SIZE,
    DEFAULT_STEPS,
    MODELS,
    DistilledLora,
    ImageFit,
    Match,
    ModelSpec,
    Sampler,
)
from pipelines.recipes import Recipe, Sampling
from pipelines.trained import QTYPES, TrainedWith
from worker.errors import Code, Problem, WorkerError
from worker.findings import path_of, problems_of

if TYPE_CHECKING:
    from PIL import Image

OutputFormat = Literal["mp4", "webp", "gif", "png"]

MAX_SEED = 2**64 - 1
"""The largest seed that torch takes."""

MAX_PROMPT = 10_000
"""Characters. The text encoder reads 512 tokens; cleaning a text of megabytes would keep the GPU waiting."""

MAX_WORD = 500
"""Characters of a trigger word, which a prompt can name a thousand times, and of a token."""

MAX_PATH = 8_192
"""Characters; presigned URLs have up to some thousand."""

MAX_PROMPTS = 1000
"""Each has some 5 kB in the result, with three signed URLs, and RunPod takes some megabytes."""

MAX_VALUES = 20_000
"""Values of an input, all objects and lists counted. Checking them takes a tenth of a second."""

MAX_PROBLEMS = 100
"""How many problems an error lists; an answer of megabytes would not arrive."""

MAX_EXTRA_LORAS = 8

MAX_VIDEOS = 16
"""A prompt makes at most so many videos."""

MAX_GIF_PIXELS = 1_000_000_000
"""Width times height times frames: Pillow holds a byte for each until it writes a GIF. 953 frames of 1024x1024."""


def _is_whole(value: Any) -> bool:
    """Whether a number is a float without a fraction, as clients in many languages write integers."""
    return isinstance(value, float) and value.is_integer()


class _Strict(BaseModel):
    """No unknown fields, null means "not given", and no coercion: `"25"` and `true` are not integers; 24.0 is, as in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        optional = {name for name, info in cls.model_fields.items() if not info.is_required()}
        given = {name: item for name, item in value.items() if item is not None or name not in optional}
        return given | {name: int(item) for name, item in given.items() if name in cls._integers() and _is_whole(item)}

    @classmethod
    def _integers(cls) -> set[str]:
        return {name for name, info in cls.model_fields.items() if info.annotation in (int, int | None)}


class Lora(_Strict):
    """One LoRA file."""

    path: str = Field(
        max_length=MAX_PATH,
        repr=False,
        json_schema_extra={"minLength": 1},
        description="File below LORA_DIR (`job/name.safetensors`), or an http(s) URL; a Hugging Face `/blob/` URL is "
        "taken as `/resolve/`.",
        examples=["my_lora_job/my_lora.safetensors"],
    )
    transformer: Literal["high", "low"] | None = Field(
        default=None, description="Side of a Wan 2.2 14B LoRA; only these models take it.", examples=["high"]
    )
    network_multiplier: float = Field(default=1.0, ge=-2, le=2, description="LoRA scale.", examples=[1.0])


class ExtraLora(_Strict):
    """One more LoRA, beside those of `loras`."""

    path: str = Lora.model_fields["path"]  # type: ignore[assignment]
    transformer: Literal["high", "low", "both"] | None = Field(
        default=None, description="Which side of a Wan 2.2 14B model it is for; only these models take it.", examples=["both"]
    )
    network_multiplier: float = Lora.model_fields["network_multiplier"]  # type: ignore[assignment]


class Prompt(_Strict):
    """One video to make."""

    prompt: str = Field(
        max_length=MAX_PROMPT, description="What to show; `[trigger]` is replaced by the trigger word.", examples=["a boat"]
    )
    trigger_word: str | None = Field(
        default=None, max_length=MAX_WORD, description="Overrides the request's.", examples=["sks"]
    )
    neg: str = Field(default="", max_length=MAX_PROMPT, description="Negative prompt.", examples=[""])
    width: int = Field(
        default=DEFAULT_SIZE,
        ge=64,
        le=4096,
        description="Pixels; floored to a multiple of the model's.",
        examples=[832],
    )
    height: int = Field(
        default=DEFAULT_SIZE,
        ge=64,
        le=4096,
        description="Pixels; floored to a multiple of the model's.",
        examples=[480],
    )
    sample_steps: int = Field(default=DEFAULT_STEPS, ge=1, le=150, description="Denoising steps.", examples=[25])
    guidance_scale: float = Field(
        default=DEFAULT_GUIDANCE_SCALE, ge=0, le=20, description="Above 1: classifier-free guidance.", examples=[4.0]
    )
    guidance_scale_2: float | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Wan 2.2 14B: the guidance of the low-noise transformer. Default: `guidance_scale`.",
        examples=[3.0],
    )
    shift: float | None = Field(
        default=None,
        ge=0.1,
        le=100,
        description="Shift of the noise schedule; more of it gives more steps to high noise. Default: the scheduler's own.",
        examples=[5.0],
    )
    seed: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_SEED,
        description=f"-1: random, the drawn seed is in the result. Default: {DEFAULT_SEED} plus the prompt's index.",
        examples=[42],
    )
    num_videos: int = Field(
        default=1,
        ge=1,
        le=MAX_VIDEOS,
        description="How many videos of this prompt, with the seeds `seed`, `seed` + 1, …",
        examples=[4],
    )
    num_frames: int = Field(
        default=DEFAULT_NUM_FRAMES, ge=1, le=1000, description="Brought to 4n+1; 1 gives a PNG image.", examples=[41]
    )
    fps: int = Field(default=DEFAULT_FPS, ge=1, le=120, description="Frames per second of the file.", examples=[16])
    ctrl_img: str | None = Field(
        default=None,
        repr=False,
        description="Control image (first frame): http(s) URL, base64 or data URL.",
        examples=["https://example.com/first_frame.png"],
    )
    ctrl_img_1: str | None = Field(
        default=None, repr=False, description="The same as `ctrl_img`.", examples=["https://example.com/first_frame.png"]
    )
    last_img: str | None = Field(
        default=None,
        repr=False,
        description="The frame to end on, as `ctrl_img` is the one to start with; for "
        f"{' and '.join(f'`{spec.id}`' for spec in MODELS.values() if spec.takes_last_image)} alone.",
        examples=["https://example.com/last_frame.png"],
    )
    image_fit: ImageFit = Field(
        default="stretch",
        description="How `ctrl_img` and `last_img` are brought to the video's size: `stretch` as the model page says, `crop` "
        "to the middle, `pad` with black.",
        examples=["crop"],
    )
    sampler: Sampler | None = Field(
        default=None,
        description="`unipc`: the documented scheduler, and the default there. `flowmatch`: FlowMatch Euler with the trainer's "
        "shift. In `preview` it replaces the trainer's own.",
        examples=["unipc"],
    )

    @property
    def control_image(self) -> tuple[str, str] | None:
        """(field, source) of the one control image, whichever name it came under; a blank text counts as none."""
        for name, source in (("ctrl_img", self.ctrl_img), ("ctrl_img_1", self.ctrl_img_1)):
            if source and not source.isspace():
                return name, source.strip()
        return None

    @property
    def last_image(self) -> tuple[str, str] | None:
        """(field, source) of the last image; a blank text counts as none."""
        return ("last_img", self.last_img.strip()) if self.last_img and not self.last_img.isspace() else None


class TrainingSettings(_Strict):
    """How the LoRA's training ran, in the words of its config.yaml."""

    quantize: bool | None = Field(default=None, description="`model.quantize`.", examples=[True])
    quantize_te: bool | None = Field(
        default=None, description="`model.quantize_te`; as `quantize` where it is not given.", examples=[True]
    )
    qtype: str | None = Field(
        default=None,
        max_length=MAX_PATH,
        description=f"`model.qtype`: {', '.join(QTYPES)}; with an accuracy recovery adapter `uint4|ORG/REPO/FILE`, or a file "
        "below LORA_DIR or a URL after the bar. Default: qfloat8.",
        examples=["qfloat8"],
    )
    low_vram: bool | None = Field(default=None, description="`model.low_vram`.", examples=[True])
    vae_tiling: bool | None = Field(default=None, description="`model.model_kwargs.vae_tiling`.", examples=[False])
    dtype: str | None = Field(default=None, max_length=MAX_WORD, description="`train.dtype`.", examples=["bf16"])
    save_dtype: str | None = Field(default=None, max_length=MAX_WORD, description="`save.dtype`.", examples=["float32"])
    multipliers: Literal["equal", "mixed"] | None = Field(
        default=None,
        description="`mixed`: the training's samples have different network_multipliers, so the trainer did not merge.",
        examples=["equal"],
    )

    def as_trained_with(self) -> TrainedWith:
        return TrainedWith(**self.model_dump())


class Request(_Strict):
    """`input` of a job for worker-wan-lora."""

    model: str = Field(description="Model id; the one this worker serves.", examples=["wan22_14b_t2v"])
    loras: list[Lora] = Field(
        json_schema_extra={"minItems": 1},
        description="One item without `transformer`; for Wan 2.2 14B one or two with `transformer` high or low.",
    )
    extra_loras: list[ExtraLora] = Field(
        default=[],
        max_length=MAX_EXTRA_LORAS,
        description="More LoRAs on top of `loras`, applied in their order.",
        examples=[[{"path": "style/style.safetensors", "network_multiplier": 0.5}]],
    )
    draft: bool = Field(
        default=False,
        description="A quick look: 4 steps without guidance, with a distilled LoRA on top; for "
        f"{', '.join(f'`{spec.id}`' for spec in MODELS.values() if spec.draft)}.",
        examples=[True],
    )
    trigger_word: str | None = Field(
        default=None, max_length=MAX_WORD, description="Replaces `[trigger]` in every prompt.", examples=["sks"]
    )
    hf_token: str | None = Field(
        default=None,
        max_length=MAX_WORD,
        repr=False,
        description="Bearer token for LoRAs on the Hugging Face Hub.",
        examples=["hf_…"],
    )
    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS, description="One video each.")
    match: Match | None = Field(
        default=None,
        description="`documented` (default): as the model page says. `preview`: as the trainer made its samples for this LoRA.",
        examples=["preview"],
    )
    trained_with: TrainingSettings | None = Field(
        default=None,
        description="How the training ran, for `match` preview; read from a config.yaml beside a LoRA below LORA_DIR where it "
        "is not given.",
        examples=[{"quantize": True, "low_vram": True}],
    )
    output_format: OutputFormat = Field(default="mp4", description="`png` gives a zip of lossless frames.", examples=["mp4"])
    contact_sheet: bool = Field(
        default=False, description="Also a JPEG for each video with up to 16 of its frames.", examples=[True]
    )

    @property
    def lora_fields(self) -> list[str]:
        """The field of each LoRA: those of `loras`, of `extra_loras`, and of the draft."""
        fields = [f"loras[{index}]" for index in range(len(self.loras))]
        fields += [f"extra_loras[{index}]" for index in range(len(self.extra_loras))]
        return fields + ["draft"] * len(self.distilled_loras)

    @property
    def distilled_loras(self) -> tuple[DistilledLora, ...]:
        """Those that the draft needs; none for a request that is no draft."""
        recipe = MODELS[self.model].draft
        return recipe.loras if self.draft and recipe else ()


OBJECTS: Mapping[str, type[BaseModel]] = {
    "": Request,
    "prompts[].": Prompt,
    "loras[].": Lora,
    "extra_loras[].": ExtraLora,
    "trained_with.": TrainingSettings,
}
"""The objects of a request, by the prefix of their fields."""


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
    if recipe.is_draft and (unused := _unused_in_a_draft(prompt)):
        steps = f"a draft takes its own {made.num_inference_steps} steps, without guidance"
        warnings.append(f"prompts[{index}]: no effect of {', '.join(f'`{name}`' for name in unused)}: {steps}")
    for name, image in (("control image", control_image), ("last image", last_image)):
        if image and prompt.image_fit == "stretch" and _is_stretched(image.size, (made.width, made.height)):
            sizes = "the {} has {}x{} pixels and is stretched to {}x{}".format(name, *image.size, made.width, made.height)
            warnings.append(f"prompts[{index}]: {sizes}; crop it, set `image_fit`, or ask for a video of its aspect")
    seed = DEFAULT_SEED + index if prompt.seed is None else prompt.seed
    made = replace(made, prompt=text, seed=draw_seed(index) if seed == -1 else seed)
    return Shot(index, recipe, made, prompt.fps, tuple(warnings), index)


def _unused_in_a_draft(prompt: Prompt) -> list[str]:
    """The fields with other values than the defaults that a draft does not look at."""
    names = ("neg", "sample_steps", "guidance_scale", "guidance_scale_2", "shift", "sampler")
    return [name for name in names if getattr(prompt, name) != Prompt.model_fields[name].default]


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


def parse(raw: Any, served: ModelSpec) -> Request:
    """Check a job's `input` against the schema and against the rules of the model it names.

    Raises WorkerError: INVALID_INPUT, MODEL_NOT_FOUND, MODEL_NOT_SERVED, LORA_FILE_REQUIRED, SINGLE_LORA_ONLY,
    MOE_FORMAT_REQUIRED, MOE_FORMAT_NOT_SUPPORTED, SINGLE_MOE_CONFIG_ONLY, CONTROL_IMAGE_REQUIRED.
    """
    if not isinstance(raw, dict):
        raise WorkerError(Code.INVALID_INPUT, "`input` must be an object with the fields model, loras and prompts")
    _raise_if_any(_raw_problems(raw))
    # Nothing is said of a model that does not exist but that: its rules are not known.
    spec = MODELS.get(raw["model"]) if isinstance(raw.get("model"), str) else served
    request, found = None, iter(list[Problem]())
    try:
        request = Request.model_validate(raw)
    except ValidationError as error:
        found = problems_of(error, OBJECTS)
    # That there is no `loras` at all has a code of its own, from `_lora_problems`.
    of_schema = (problem for problem in found if problem.field != "loras" or raw.get("loras") is not None)
    of_loras = chain(_lora_problems(raw, spec), _extra_lora_problems(raw, spec)) if spec else ()
    of_prompts = chain(_draft_problems(raw, spec), _prompt_problems(raw, spec)) if spec else ()
    _raise_if_any(chain(_model_problems(raw, served), of_schema, of_loras, of_prompts))
    assert request
    _raise_if_any(chain(_gif_problems(request), _training_problems(request), _count_problems(request)))
    return request


def _training_problems(request: Request) -> Iterator[Problem]:
    given = request.trained_with
    if given and given.qtype is not None and given.as_trained_with().format not in QTYPES:
        text = f"must be one of {', '.join(QTYPES)}, as in the training's config; other formats are not rebuilt here"
        yield Problem(Code.INVALID_INPUT, "trained_with.qtype", text)


def _count_problems(request: Request) -> Iterator[Problem]:
    if (videos := sum(prompt.num_videos for prompt in request.prompts)) > MAX_PROMPTS:
        text = f"the prompts ask for {videos} videos, and a job makes {MAX_PROMPTS} at most; send several jobs"
        yield Problem(Code.INVALID_INPUT, "prompts", text)
    for index, prompt in enumerate(request.prompts):
        if prompt.seed is not None and prompt.seed + prompt.num_videos - 1 > MAX_SEED:
            text = f"the last of {prompt.num_videos} videos would have a seed above {MAX_SEED}; start lower"
            yield Problem(Code.INVALID_INPUT, f"prompts[{index}].seed", text)


def _gif_problems(request: Request) -> Iterator[Problem]:
    for index, prompt in enumerate(request.prompts if request.output_format == "gif" else []):
        pixels = prompt.width * prompt.height * prompt.num_frames
        if pixels > MAX_GIF_PIXELS:
            text = (
                f"a gif of {prompt.num_frames} frames of {prompt.width}x{prompt.height} has {pixels / 1e6:.0f} million pixels, "
                f"and {MAX_GIF_PIXELS / 1e6:.0f} million fit into the worker's memory; ask for fewer frames, or for mp4 or webp"
            )
            yield Problem(Code.INVALID_INPUT, f"prompts[{index}].num_frames", text)


def _raise_if_any(problems: Iterator[Problem]) -> None:
    """Raises WorkerError with the first MAX_PROBLEMS of them."""
    told = list(islice(problems, MAX_PROBLEMS))
    if next(problems, None):
        told[-1] = Problem(told[-1].code, "", f"there are more than {MAX_PROBLEMS} problems; correct these first")
    if told:
        raise WorkerError.of(told)


def _model_problems(raw: Mapping[str, Any], served: ModelSpec) -> Iterator[Problem]:
    model = raw.get("model")
    if not isinstance(model, str) or model == served.id:
        return
    if model in MODELS:
        text = f"this worker serves {served.id}, not {model}; send the request to an endpoint of {model}"
        yield Problem(Code.MODEL_NOT_SERVED, "model", text)
    else:
        named = f"{model!r} is" if re.fullmatch(r"[\w.-]{1,32}", model, re.ASCII) else "this is"
        close = get_close_matches(model.lower(), MODELS, n=1)
        meant = f"; did you mean `{close[0]}`? The" if close else "; the"
        text = f"{named} not a model id{meant} known ones are {', '.join(MODELS)}"
        yield Problem(Code.MODEL_NOT_FOUND, "model", text)


def _lora_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    """The rules between the items and the model; what one item may look like is the schema's."""
    loras = raw.get("loras")
    if loras is None or loras == []:
        example = '{"path": "job/name.safetensors"' + (', "transformer": "high"}' if spec.moe else "}")
        yield Problem(Code.LORA_FILE_REQUIRED, "loras", f"at least one LoRA is required, such as [{example}]")
    if not isinstance(loras, list):
        return
    sides = [item.get("transformer") if isinstance(item, dict) else None for item in loras]
    for index, item in enumerate(loras):
        yield from _path_problems(f"loras[{index}].path", item)
        if spec.moe and isinstance(item, dict) and sides[index] is None:
            text = f'{spec.id} has two transformers: say which one this LoRA is for, "high" or "low"'
            yield Problem(Code.MOE_FORMAT_REQUIRED, f"loras[{index}].transformer", text)
        if not spec.moe and sides[index] is not None:
            text = f"{spec.id} has one transformer and takes a single LoRA; leave `transformer` out"
            yield Problem(Code.MOE_FORMAT_NOT_SUPPORTED, f"loras[{index}].transformer", text)
    if not spec.moe and len(loras) > 1:
        yield Problem(Code.SINGLE_LORA_ONLY, "loras", f"{spec.id} takes exactly one LoRA, not {len(loras)}; send one item")
    given = [side for side in sides if side in ("high", "low")]
    if spec.moe and (len(loras) > 2 or len(set(given)) < len(given)):
        text = f"{spec.id} takes one high and one low LoRA at most; send each side once"
        yield Problem(Code.SINGLE_MOE_CONFIG_ONLY, "loras", text)


def _extra_lora_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    extra = raw.get("extra_loras")
    for index, item in enumerate(extra[: MAX_EXTRA_LORAS + 1] if isinstance(extra, list) else []):
        yield from _path_problems(f"extra_loras[{index}].path", item)
        side = item.get("transformer") if isinstance(item, dict) else None
        where = f"extra_loras[{index}].transformer"
        if spec.moe and isinstance(item, dict) and side is None:
            text = f'{spec.id} has two transformers: say which this LoRA is for, "high", "low" or "both"'
            yield Problem(Code.MOE_FORMAT_REQUIRED, where, text)
        if not spec.moe and side is not None:
            text = f"{spec.id} has one transformer; leave `transformer` out"
            yield Problem(Code.MOE_FORMAT_NOT_SUPPORTED, where, text)


def _draft_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    if raw.get("draft") is not True:
        return
    if spec.draft is None:
        with_one = ", ".join(other.id for other in MODELS.values() if other.draft)
        text = f"there is no few-step recipe for {spec.id}; leave it out, or use one of {with_one}"
        yield Problem(Code.INVALID_INPUT, "draft", text)
    elif raw.get("match") == "preview":
        text = "a draft does not look like the samples of the training; leave out `draft`, or set `match` to documented"
        yield Problem(Code.INVALID_INPUT, "draft", text)


def _path_problems(where: str, item: Any) -> Iterator[Problem]:
    path = item.get("path") if isinstance(item, dict) else None
    if not isinstance(path, str):
        return
    if not path.strip():
        yield Problem(Code.LORA_FILE_REQUIRED, where, "the path is empty; name a file such as job/name.safetensors")
    elif is_url(path):
        try:
            url = urlsplit(path)
            host = url.hostname
        except ValueError:
            host = None
        if not host:
            yield Problem(Code.INVALID_INPUT, where, "the URL has no proper host; use https://host/name.safetensors")
        elif "/tree/" in url.path and is_hub(host):
            text = "this URL shows a folder; use the file's own URL, with /resolve/ and the file's name"
            yield Problem(Code.INVALID_INPUT, where, text)
    elif "://" in path:
        yield Problem(Code.INVALID_INPUT, where, "only http and https URLs are fetched; use one, or a file below LORA_DIR")
    elif path.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", path) or "\0" in path:
        text = "must be relative to the LoRA folder, without `..`, such as job/name.safetensors"
        yield Problem(Code.INVALID_INPUT, where, text)


def _prompt_problems(raw: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    prompts = raw.get("prompts")
    for index, prompt in enumerate(prompts if isinstance(prompts, list) else []):
        if not isinstance(prompt, dict):
            continue
        images = {name: prompt.get(name) for name in ("ctrl_img", "ctrl_img_1")}
        given = {name: image for name, image in images.items() if isinstance(image, str) and not image.isspace() and image}
        where = f"prompts[{index}].{next(iter(given), 'ctrl_img')}"
        if len(set(given.values())) == 2:
            text = "`ctrl_img` and `ctrl_img_1` are two different images, and this model takes one; leave one out"
            yield Problem(Code.INVALID_INPUT, where, text)
        elif (
            not given
            and spec.control_image == "required"
            and all(image is None or isinstance(image, str) for image in images.values())
        ):
            text = f"{spec.id} needs a control image: give an http(s) URL, base64 or a data URL"
            yield Problem(Code.CONTROL_IMAGE_REQUIRED, where, text)
        elif given and spec.control_image == "none":
            takers = ", ".join(other.id for other in MODELS.values() if other.control_image != "none")
            text = f"{spec.id} takes no control image; leave it out, or use one of {takers}"
            yield Problem(Code.INVALID_INPUT, where, text)
        yield from _last_image_problems(index, prompt, spec)
        yield from _guidance_problems(index, prompt, spec)


def _last_image_problems(index: int, prompt: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    last, where = prompt.get("last_img"), f"prompts[{index}].last_img"
    if not isinstance(last, str) or not last or last.isspace():
        return
    if not spec.takes_last_image:
        takers = " or ".join(other.id for other in MODELS.values() if other.takes_last_image)
        text = f"{spec.id} was not made to end on a given frame; leave it out, or use {takers}"
        yield Problem(Code.INVALID_INPUT, where, text)
    elif prompt.get("num_frames") in (1, 2, 3, 4):
        yield Problem(Code.INVALID_INPUT, where, "a video with a first and a last frame has 5 frames or more; ask for them")


def _guidance_problems(index: int, prompt: Mapping[str, Any], spec: ModelSpec) -> Iterator[Problem]:
    second, where = prompt.get("guidance_scale_2"), f"prompts[{index}].guidance_scale_2"
    if not isinstance(second, int | float) or isinstance(second, bool):
        return
    first = prompt.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
    if not spec.moe:
        text = f"{spec.id} has one transformer; leave it out, and set `guidance_scale`"
        yield Problem(Code.INVALID_INPUT, where, text)
    elif second > 1 and isinstance(first, int | float) and first <= 1:
        text = "above 1 it needs a `guidance_scale` above 1, by which the pipeline decides whether there is guidance at all"
        yield Problem(Code.INVALID_INPUT, where, text)


def _raw_problems(raw: Any) -> Iterator[Problem]:
    """What is wrong before a value is looked at: more values than MAX_VALUES, and texts and field names with lone surrogates,
    which JSON can carry and nothing behind it can.
    """
    # Each with the way to it, as (the way to its container, its key): of deep ones, a copy of the whole way would be long.
    waiting: list[tuple[Any, Any]] = [((), raw)]
    seen = 0
    while waiting:
        way, value = waiting.pop()
        if isinstance(value, str) and not _is_unicode(value):
            text = "contains invalid Unicode (an unpaired surrogate); send valid Unicode"
            yield Problem(Code.INVALID_INPUT, _path_of_way(way), text)
        elif isinstance(value, dict | list) and (seen := seen + len(value)) > MAX_VALUES:
            text = f"has too many values: the whole input may have {MAX_VALUES}; send several jobs"
            yield Problem(Code.INVALID_INPUT, _path_of_way(way), text)
            return
        elif isinstance(value, dict):
            waiting += [((way, key), item if _is_unicode(key) else key) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [((way, index), item) for index, item in enumerate(value)]


def _path_of_way(way: Any) -> str:
    location: list[int | str] = []
    while way:
        way, key = way
        location.append(key)
    return path_of(tuple(reversed(location)))


def _is_unicode(text: str) -> bool:
    return not re.search(r"[\ud800-\udfff]", text)


def is_url(text: str) -> bool:
    """Whether a path or image is meant as a URL to fetch."""
    return text.lower().startswith(("http://", "https://"))


def is_hub(host: str) -> bool:
    """Whether a host is the Hugging Face Hub."""
    return host in ("huggingface.co", "hf.co") or host.endswith((".huggingface.co", ".hf.co"))
