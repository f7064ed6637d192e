"""The documented request, as pydantic models. They are the schema: `docs/request.schema.json` is generated from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    Sampler,
)
from pipelines.trained import QTYPES, TrainedWith

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

MAX_EXTRA_LORAS = 8

MAX_VIDEOS = 16
"""A prompt makes at most so many videos."""


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
        default=None,
        description="Side of a Wan 2.2 14B model that the LoRA is for; only these models take it.",
        examples=["both"],
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
        default=DEFAULT_NUM_FRAMES, ge=1, le=1000, description="Frames; rounded to 4n+1. 1 gives a PNG image.", examples=[41]
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
        description="Last frame, where `ctrl_img` is the first; only for "
        f"{' and '.join(f'`{spec.id}`' for spec in MODELS.values() if spec.takes_last_image)}.",
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
        description="`unipc`: UniPC, the documented scheduler. `flowmatch`: FlowMatch Euler with the trainer's shift. Default: "
        "as `match` says.",
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
    quantize_te: bool | None = Field(default=None, description="`model.quantize_te`. Default: as `quantize`.", examples=[True])
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
        description="How the training ran, for `match` preview. Default: what the config.yaml beside a LoRA below LORA_DIR "
        "says.",
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


def is_url(text: str) -> bool:
    """Whether a path or image is meant as a URL to fetch."""
    return text.lower().startswith(("http://", "https://"))


def is_hub(host: str) -> bool:
    """Whether a host is the Hugging Face Hub."""
    return host in ("huggingface.co", "hf.co") or host.endswith((".huggingface.co", ".hf.co"))
