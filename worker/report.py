"""What a result says beside its URLs: the settings that decided the frames, and warnings that teach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines import Adapter, WanModel
from pipelines.catalog import LoraMode, Match
from pipelines.lora_file import LoraFile
from pipelines.recipes import documented, era_of, preview, version_of
from worker.request import Shot


def settings_of(adapters: Sequence[Adapter], match: Match, mode: LoraMode, model: WanModel) -> dict[str, Any]:
    """What decides the frames and is the same for all prompts of a job."""
    loras = [
        {
            "transformer": adapter.side,
            "network_multiplier": adapter.scale,
            "applied_by": mode,
            "sha256": adapter.file.sha256,
            "trainer_version": adapter.file.trainer_version or None,
            "step": adapter.file.training_step,
        }
        for adapter in adapters
    ]
    return {**model.facts, "match": match, "loras": loras}


def prompt_settings(shot: Shot, model: WanModel) -> dict[str, Any]:
    """What decides the frames of one prompt, in effective numbers."""
    return {
        "prompt_index": shot.index,
        "prompt": shot.prompt,
        "neg": shot.neg,
        "width": shot.width,
        "height": shot.height,
        "num_frames": shot.num_frames,
        "fps": shot.fps,
        "sample_steps": shot.sample_steps,
        "guidance_scale": shot.guidance_scale,
        "seed": shot.seed,
        **model.numbers_of(shot.recipe),
        "era": shot.recipe.solver if shot.recipe.match == "preview" else None,
        "scheduler_because": shot.recipe.why,
        "trainer_dtypes": shot.recipe.trainer_dtypes,
    }


def era_warnings(match: Match, files: Sequence[LoraFile], shots: Sequence[Shot], model: WanModel) -> list[str]:
    """In `documented`: that the trainer's samples looked otherwise. In `preview`: that its version is a guess."""
    known = any(version_of(file) for file in files)
    era, why = era_of(files)
    if match == "preview":
        return [] if known else [f"match preview: {why}; if the samples look different, set `sampler`"]
    if not known:
        return []
    ours, theirs = (model.numbers_of(recipe) for recipe in (documented(model.spec), preview(model.spec, era, why)))
    differences = ", ".join(f"{name} {theirs[name]} instead of {ours[name]}" for name in theirs if theirs[name] != ours[name])
    if not differences or all(model.numbers_of(shot.recipe) == theirs for shot in shots):
        return []
    return [f"{why}, which showed its samples with {differences}; set `match` to preview to get those"]


def trigger_warnings(files: Sequence[LoraFile], shots: Sequence[Shot]) -> list[str]:
    """A LoRA that was trained with a trigger word does little without it."""
    warnings = []
    for word in sorted({file.trigger_word for file in files if file.trigger_word}):
        without = [f"prompts[{shot.index}]" for shot in shots if word.lower() not in shot.prompt.lower()]
        if without:
            warnings.append(
                f"{', '.join(without)}: the LoRA's trigger word `{word}` is not in the prompt; write it, or [trigger] and set "
                "trigger_word"
            )
    return warnings
