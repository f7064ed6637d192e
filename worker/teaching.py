"""Warnings that teach: what would bring a video closer to what the user wants, and what a setting leaves unused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pipelines.catalog import MAX_TOKENS, MODELS, LoraMode
from pipelines.lora.file import Adapter, LoraFile
from pipelines.recipes import Recipe, era_of, preview, version_of
from pipelines.trained import Quantization
from worker.decide import Shot
from worker.report import Plan
from worker.run import Run

NumbersOf = Callable[[Recipe], dict[str, Any]]
"""Returns the values of a recipe on the loaded model; see `Schedulers.numbers_of`."""


def teaching_warnings(
    run: Run, files: Sequence[LoraFile], numbers_of: NumbersOf, dtype: str, kept: Quantization | None
) -> list[str]:
    """Return hints that bring the video closer to the trainer's samples. `kept`: how the worker's weights are quantized."""
    of_trigger = _trigger_warnings(files, run.shots)
    if run.request.draft:  # it is not meant to look like the samples
        return of_trigger
    return [*_era_warnings(run, files, numbers_of), *_training_warnings(run, files, dtype, kept), *of_trigger]


def extra_warnings(
    run: Run, adapters: Sequence[Adapter], plan: Plan, mode_of: Callable[[Adapter, LoraMode], LoraMode]
) -> Iterator[str]:
    """What extra LoRAs change for the others, and what they mean in `preview`."""
    extra = [adapter for adapter in adapters if adapter.is_extra]
    if not extra:
        return
    if run.match == "preview":
        yield (
            "match preview: the trainer made its samples without `extra_loras`, so these frames are not those samples; "
            "all else is as in the preview"
        )
    for how, stack in () if run.request.draft else plan.values():  # it says itself how its LoRAs are applied
        also = [adapter for adapter, _ in stack if how == "merge" != mode_of(adapter, run.mode)]
        fields = dict(zip(map(id, adapters), run.request.lora_fields, strict=True))
        if also:
            yield (
                f"{', '.join(fields[id(adapter)] for adapter in also)}: merged into the weights too, since another LoRA of the "
                "same transformer must be merged"
            )
    yield from _trigger_warnings([adapter.file for adapter in extra], run.shots)


def length_warnings(shots: Sequence[Shot], tokens_of: Callable[[str], int]) -> Iterator[str]:
    """Yield a warning for each text that is longer than the text encoder reads."""
    for shot in (shot for shot in shots if not shot.video_index):
        for name, text in (("prompt", shot.sampling.prompt), ("neg", shot.sampling.negative_prompt)):
            if len(text) > MAX_TOKENS // 4 and (tokens := tokens_of(text)) > MAX_TOKENS:
                said = f"the {name} has {tokens} tokens, and only the first {MAX_TOKENS} are read; shorten it"
                yield f"prompts[{shot.prompt_index}]: {said}"


def idle_gpu_warnings(shots: Sequence[Shot], gpus: int) -> Iterator[str]:
    """Yield a warning for a video that leaves one of two GPUs without work. Four split the one pass."""
    for without_guidance, group in groupby(shots, lambda shot: shot.sampling.guidance_scale <= 1):
        in_a_row = list(group)
        if gpus == 2 and without_guidance and len(in_a_row) == 1 and not in_a_row[0].recipe.is_draft:
            said = (
                "with guidance_scale 1 or less, a step has one pass; one of the worker's GPUs makes this video, and the other"
            )
            yield f"prompts[{in_a_row[0].prompt_index}]: {said} is idle; two such videos in a row are made side by side"


_SIXTEEN_BITS = {"F16", "BF16"}


def _training_warnings(run: Run, files: Sequence[LoraFile], dtype: str, kept: Quantization | None) -> Iterator[str]:
    """Yield what in the training changes its samples, and how closely they can be matched, as in docs/preview-match.md.

    `kept`: how the worker's weights are quantized.
    """
    trained = run.training.trained
    if run.match == "preview" and kept and (kept != run.quantization or trained.recovery_adapter):
        how = str(run.quantization) if run.quantization else "none of its weights"
        yield (
            f"this worker keeps its weights quantized (QUANTIZE: {kept}), and the training quantized {how}, so the video "
            "matches the samples only roughly; use a worker without QUANTIZE"
        )
    if run.training.warning:
        yield run.training.warning
    if run.match != "preview":
        if trained.kinds:
            how = f"the training ran with {', '.join(trained.kinds)} ({run.training.why}), which changed its samples"
            yield f"{how}; set `match` to preview to get those"
        return
    if not trained.as_words():
        yield (
            "match preview: it is unknown how the training ran, and quantization or low_vram change its samples; set "
            "`trained_with` from its config.yaml, or put that file beside the LoRA"
        )
        return
    if any(_SIXTEEN_BITS & set(file.dtypes.values()) for file in files):
        size = "0.02" if dtype == "float32" else "0.5 to 4.3"
        yield (
            f"the LoRA was saved in 16 bits, so the video differs from the samples by {size} of 255 on average; "
            "`save.dtype: float32` in the training removes this"
        )
    if trained.draws_noise_in_bf16(MODELS[run.request.model]):
        yield (
            "with low_vram the trainer draws the noise of this model in bf16, and this worker in float32, so the video differs "
            "from the samples by 0.9 to 1.3 of 255 on average"
        )
    if trained.computes_in == "float16":
        size = "0.2 to 1.0" if dtype == "float32" else "1.5 to 2.2"
        remedy = "" if dtype == "float32" else "; a worker with DTYPE=float32 comes nearer"
        yield (
            f"the training ran in float16, and this worker computes in {dtype}, so the video differs from the samples by "
            f"{size} of 255 on average{remedy}"
        )
    elif trained.computes_in not in (None, dtype):
        yield (
            f"the training ran in {trained.computes_in} and this worker computes in {dtype}, so the video differs from the "
            f"samples as bf16 differs from float32; use a worker with DTYPE={trained.computes_in}"
        )
    elif trained.merges and dtype != "float32":
        yield (
            "an unquantized training in 16 bits drifts each time it makes samples: the first round can be matched exactly, and "
            "later ones with a difference of 0.7 to 1.5 of 255 on average"
        )


def _era_warnings(run: Run, files: Sequence[LoraFile], numbers_of: NumbersOf) -> list[str]:
    """Warn, with `documented`, that the trainer sampled differently, and with `preview`, that its version is a guess."""
    known = any(version_of(file) for file in files)
    era, why = era_of(files)
    if run.match == "preview":
        return [] if known else [f"match preview: {why}; if the samples look different, set `sampler`"]
    theirs = preview(MODELS[run.request.model], era, why)
    differences = {name: None for shot in run.shots for name in _differences(run, shot, theirs, numbers_of)} if known else {}
    if not differences:
        return []
    return [f"{why}, which showed its samples with {', '.join(differences)}; set `match` to preview to get those"]


def _differences(run: Run, shot: Shot, theirs: Recipe, numbers_of: NumbersOf) -> Iterator[str]:
    ours, others = numbers_of(shot.recipe), numbers_of(theirs)
    for name in others:
        if others[name] != ours[name]:
            yield f"{name} {others[name]} instead of {ours[name]}"
    prompt = run.request.prompts[shot.prompt_index]
    width, height = theirs.effective_size(prompt.width, prompt.height)
    if (width, height) != (shot.sampling.width, shot.sampling.height):
        yield f"size {width}x{height} instead of {shot.sampling.width}x{shot.sampling.height}"


def _trigger_warnings(files: Sequence[LoraFile], shots: Sequence[Shot]) -> list[str]:
    """Warn when a LoRA's trigger word is not in the prompt: without it, the LoRA does little."""
    warnings = []
    for word in sorted({file.trigger_word for file in files if file.trigger_word}):
        without = [
            f"prompts[{shot.prompt_index}]"
            for shot in shots
            if not shot.video_index and word.lower() not in shot.sampling.prompt.lower()
        ]
        if without:
            warnings.append(
                f"{', '.join(without)}: the LoRA's trigger word `{word}` is not in the prompt; write it, or [trigger] and set "
                "trigger_word"
            )
    return warnings
