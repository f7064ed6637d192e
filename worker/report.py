"""Builds a job's result: the outputs, the settings that decided the frames, and the warnings."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from PIL import Image

from pipelines.catalog import Draft, LoraMode, Match
from pipelines.lora.file import Adapter
from worker.decide import FIELD_OF, Shot
from worker.errors import WorkerError
from worker.pictures import Kind, Picture
from worker.run import Run
from worker.storage.base import Stored

PictureItems = dict[Kind, dict[str, Any]]
"""The pictures by their field in the result."""


@dataclass(frozen=True)
class Output:
    """A finished file: its shot, where it is stored, and its pictures, without those that could not be made."""

    shot: Shot
    stored: Stored
    pictures: PictureItems = field(default_factory=dict)


def result_of(run: Run, outcomes: Sequence[Output | WorkerError]) -> dict[str, Any]:
    """Return the documented result. `outcomes`: the file or the error of every shot, in order."""
    outputs: dict[str, list[dict[str, Any]]] = {"images": [], "videos": []}
    errors = []
    for shot, outcome in zip(run.shots, outcomes, strict=True):
        if isinstance(outcome, WorkerError):
            errors.append({**shot.identity(), "code": outcome.code.value, "message": outcome.message})
        else:
            still = outcome.shot.sampling.num_frames == 1
            if still:
                outputs["images"].append(_item(outcome, "png"))
            else:
                pictures = {kind: outcome.pictures.get(kind) for kind in get_args(Kind)}
                outputs["videos"].append(_item(outcome, run.request.output_format) | pictures)
    fields = dict.fromkeys(run.request.lora_fields)
    warnings = [f"{field}: {text}" for field in fields for text in run.lora_warnings.get(field, ())]
    warnings += run.warnings
    warnings += [warning for shot in run.shots for warning in shot.warnings]
    return {
        "model": run.request.model,
        "outputs": outputs,
        **({"errors": errors} if errors else {}),
        "warnings": warnings,
        "settings": run.settings | {"prompts": run.prompt_settings},
        "timings": run.timings | {"total": round(time.monotonic() - run.started, 3)},
    }


def _item(output: Output, format: str) -> dict[str, Any]:
    shot, stored = output.shot, output.stored
    return {
        **shot.identity(),
        "url": stored.url,
        "expires_at": stored.expires_at,
        "key": stored.key,
        "format": format,
        "width": shot.sampling.width,
        "height": shot.sampling.height,
        "num_frames": shot.sampling.num_frames,
        "fps": shot.fps,
        "seed": shot.sampling.seed,
        "bytes": stored.bytes,
    }


def picture_item(picture: Picture, stored: Stored) -> dict[str, Any]:
    """Return the entry of a poster or a contact sheet in the result."""
    width, height = picture.size
    return {
        "url": stored.url,
        "expires_at": stored.expires_at,
        "key": stored.key,
        "width": width,
        "height": height,
        "bytes": stored.bytes,
    }


_FIELDS_OF_A_DISTILLED_LORA = ("transformer", "network_multiplier", "applied_by", "sha256")
"""The fields that it shares with other LoRAs."""

Plan = Mapping[str, tuple[LoraMode, Sequence[tuple[Adapter, Any]]]]
"""How each transformer carries its LoRAs, and which; see `AppliedLoras.plan`."""


def settings_of(
    facts: dict[str, Any], adapters: Sequence[Adapter], match: Match, plan: Plan, draft: Draft | None
) -> dict[str, Any]:
    """Return what decides the frames of all prompts of a job alike. `facts`: those of the loaded model.

    An extra LoRA has an item for each transformer that it is applied to. `draft`: the model's recipe, for a job whose
    adapters have its LoRAs.
    """
    modes_of = [
        {name: how for name, (how, stack) in plan.items() if any(each is adapter for each, _ in stack)} for adapter in adapters
    ]
    loras: list[dict[str, Any]] = []
    extra: list[dict[str, Any]] = []
    distilled: list[dict[str, Any]] = []
    for adapter, modes in zip(adapters, modes_of, strict=True):
        applied = {
            "transformer": adapter.side,
            "network_multiplier": adapter.scale,
            "applied_by": modes.get("transformer_2" if adapter.side == "low" else "transformer"),
            "sha256": adapter.file.sha256,
            "trainer_version": adapter.file.trainer_version or None,
            "step": adapter.file.training_step,
        }
        if adapter.distilled:
            lora = adapter.distilled
            own = {"repo": lora.repo, "file": lora.path, "commit": lora.commit}
            distilled.append(own | {name: applied[name] for name in _FIELDS_OF_A_DISTILLED_LORA})
        elif adapter.is_extra:
            number = len({each["extra_lora"] for each in extra})
            for name, how in modes.items():
                side = None if adapter.side is None else "low" if name == "transformer_2" else "high"
                extra.append({"extra_lora": number, **applied, "transformer": side, "applied_by": how})
        else:
            loras.append(applied)
    settings = {**facts, "match": match, "loras": loras} | ({"extra_loras": extra} if extra else {})
    if distilled and draft:
        settings["draft"] = {"loras": distilled, "low_noise_from_step": draft.low_noise_from, "source": draft.source}
    return settings


_LONGEST_TEXT = 4000
"""Characters of one text in the result. The text encoder reads 512 tokens, of four to five characters in most languages."""
_ALL_TEXTS = 1_000_000
"""Characters of all prompts of a result, and of all negative prompts."""


_ONLY_WHERE_SET = {"guidance_scale_2": None, "image_fit": "stretch"}
"""Fields that the settings name only where they differ from these defaults."""


def prompt_settings(
    run: Run, shot: Shot, numbers: dict[str, Any], sum_of: Callable[[Image.Image | None], str | None]
) -> dict[str, Any]:
    """Return the effective settings that decide the frames of one prompt. `numbers`: those of its recipe on the loaded model.

    `sum_of` returns the `sum_of_pixels` of an image.

    Very long texts are shortened, so that the platform accepts the result.
    """
    longest = min(_LONGEST_TEXT, _ALL_TEXTS // len(run.shots))

    def shown(value: Any) -> Any:
        return f"{value[:longest]}…" if isinstance(value, str) and len(value) > longest else value

    return {
        **shot.identity(),
        **{
            name: shown(value)
            for term, name in FIELD_OF.items()
            if (value := getattr(shot.sampling, term)) != _ONLY_WHERE_SET.get(name, ...)
        },
        "fps": shot.fps,
        "control_image_sha256": sum_of(shot.sampling.control_image),
        **({"last_image_sha256": sum_of(shot.sampling.last_image)} if shot.sampling.last_image else {}),
        **numbers,
        "scheduler_because": shot.recipe.why,
        "era": shot.recipe.era,
        "era_because": shot.recipe.era_why,
        "trainer_dtypes": shot.recipe.trainer_dtypes,
        "text_attention": shot.recipe.text_attention,
        "decodes_in_tiles": shot.recipe.decodes_in_tiles,
    }


def sum_of_pixels(image: Image.Image) -> str:
    """Return the sha256 of the image as the model takes it, before resizing but after EXIF and transparency."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
