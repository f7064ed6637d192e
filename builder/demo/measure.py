"""Measure what the demo weights have learned, with diffusers' own pipelines and the judge.

    python -m builder.demo.measure CHECKPOINTS OUT [--model-id wan21_i2v_14b]

The prompts are those of the clips that the transformer was never shown, once in plain words and once in free phrasings; and
films with the LoRA's trigger word and without it, each with the LoRA at scale 0 and 1, for the models that have one.
Image-to-video starts from the first frames of such clips, which do not tell the direction; 5B does so too, and goes without
them once more. Text-to-video models also make drafts, which are compared with the full runs of the same seeds. The films of 5B
are twice as large. Writes OUT/figures.json, and a sheet of the films for each setting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from builder.demo import image_to_video, install, world
from builder.demo.captions import CHOICES
from builder.demo.judge import Verdict, judge
from builder.demo.text import TRIGGER
from pipelines.catalog import MODELS, Draft, ModelSpec
from pipelines.few_steps import FewStepEuler

LARGE, SMALL = (96, 128, 17), (64, 96, 9)
"""Height, width and frames; of 5B, height and width are twice as many."""
FREE_PHRASINGS = (
    "A little green sailboat drifts leftwards on the ocean.",
    "YELLOW SHIP GOING RIGHT AT MIDNIGHT",
    "please make me a film in which something blue, a boat, rises above the meadow",
    "the sea. a violet yacht sinks",
    "Night; crimson ball rolling to the left",
    "golden sphere floats upward, water below, cinematic, 4k",
    "blue beachball travelling to the right through the grass",
    "down goes the purple ball in the dark",
    "Emerald kite climbs into the moonlight",
    "scarlet kite flies right, over waves",
    "a blue kite, going left over the hills, best quality",
    "Falling yellow kite, field, sunny",
)
"""The phrases of `world.HELD_OUT`, in its order."""


BOATS = (
    ("red", "left", "sea"),
    ("green", "right", "sea"),
    ("yellow", "left", "night"),
    ("purple", "left", "field"),
)
"""Colour, direction and background of boats that the LoRA is measured on."""


def plain(held_out: tuple[str, str, str, str]) -> str:
    kind, colour, direction, ground = held_out
    return f"a {colour} {kind} moves {direction} over the {ground}"


def load(spec: ModelSpec, checkpoints: Path) -> DiffusionPipeline:
    """Return diffusers' pipeline in float32. For image-to-video of Wan 2.2 it is that of 2.1 with the transformers of 2.2."""
    if spec.family == "toolkit_i2v":
        repos = {part: checkpoints / str(spec.sources[part]) for part in spec.transformers}
        parts = {part: WanTransformer3DModel.from_pretrained(repo, torch_dtype=torch.float32) for part, repo in repos.items()}
        base = checkpoints / MODELS["wan21_i2v_14b"].sources["vae"].repo
        pipe = WanImageToVideoPipeline.from_pretrained(
            base, torch_dtype=torch.float32, image_encoder=None, boundary_ratio=spec.boundary_ratio, **parts
        )
    else:
        pipe = DiffusionPipeline.from_pretrained(checkpoints / spec.sources["vae"].repo, torch_dtype=torch.float32)
    return pipe


def film(
    pipe: DiffusionPipeline,
    prompt: str,
    shape: tuple[int, int, int],
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
    negative: str = "",
    image: Image.Image | None = None,
) -> Tensor:
    """Return a film [3, frames, height, width] in -1…1. `shape`: height, width, frames. `image`: for image-to-video."""
    made = pipe(
        prompt=prompt,
        negative_prompt=negative,
        height=shape[0],
        width=shape[1],
        num_frames=shape[2],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **({"image": image} if image else {}),
    )
    frames: Tensor = made.frames[0].permute(1, 0, 2, 3) * 2 - 1
    return frames


def first_frames(shape: tuple[int, int, int]) -> list[Tensor]:
    """Return a picture [3, height, width] for each of `world.HELD_OUT` that does not tell the direction."""
    frames = []
    for i, held_out in enumerate(world.HELD_OUT):
        rng = random.Random(500 + i)
        clip = world.sample(rng, **dict(zip(CHOICES, held_out, strict=True)))
        frames.append(world.draw(image_to_video.neutral(clip, rng), *shape)[:, 0])
    return frames


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR of pixels in -1…1, in dB."""
    return 10 * torch.log10(4 / ((a - b) ** 2).mean()).item()


def drafts(pipe: DiffusionPipeline, draft: Draft, checkpoints: Path, prompts: Sequence[str]) -> list[Tensor]:
    """Return a film of each prompt, made by the recipe with the seed that its full run has."""
    of_full_run, pipe.scheduler = pipe.scheduler, FewStepEuler(draft.timesteps, draft.shift)
    for lora in draft.loras:
        pipe.load_lora_weights(
            checkpoints / lora.repo,
            weight_name=lora.path,
            adapter_name=lora.side or "draft",
            load_into_transformer_2=lora.side == "low",
        )
    films = [film(pipe, prompt, LARGE, 100 + i, len(draft.timesteps), 1.0) for i, prompt in enumerate(prompts)]
    pipe.unload_lora_weights()
    pipe.scheduler = of_full_run
    return films


def boats_with_lora(pipe: DiffusionPipeline, loras: Path) -> dict[str, dict[str, float]]:
    """Return what the LoRA of text-to-video does to boats with its trigger word, and to everything without it."""
    boats = [f"a {colour} boat moves {way} over the {ground}" for colour, way, ground in BOATS]
    prompts = {
        "boats, with the trigger word": [f"{TRIGGER} {boat}" for boat in boats],
        "boats, without it": boats,
        "balls and kites, without it": [plain(held_out) for held_out in world.HELD_OUT[4:12:2]],
    }
    return with_lora(pipe, loras / "striped_sail", "striped", prompts)


def dusks_with_lora(pipe: DiffusionPipeline, loras: Path) -> dict[str, dict[str, float]]:
    """Return what the LoRA of image-to-video does to films that begin by day, with its trigger word and without."""
    by_day = [i for i, (_, _, _, ground) in enumerate(world.HELD_OUT) if ground != "night"]
    texts = [plain(world.HELD_OUT[i]) for i in by_day]
    pictures = [world.to_pil(picture) for picture in first_frames(LARGE)]
    prompts = {"with the trigger word": [f"{TRIGGER} {text}" for text in texts], "without it": texts}
    return with_lora(pipe, loras / "nightfall", "night_falls", prompts, [pictures[i] for i in by_day])


def with_lora(
    pipe: DiffusionPipeline,
    lora: Path,
    concept: str,
    prompts: dict[str, list[str]],
    images: Sequence[Image.Image] = (),
) -> dict[str, dict[str, float]]:
    """Return in how many films the judge sees the concept, a field of `Verdict`, and how far the LoRA changes the films.

    `lora`: the trainer's folder. `images`: the first frames, for image-to-video. The change is the mean of all pixels, of 255.
    """
    for side, is_second in (("high", False), ("low", True)):
        name = f"{lora.name}_{side}_noise.safetensors"
        pipe.load_lora_weights(lora, weight_name=name, adapter_name=side, load_into_transformer_2=is_second)
    figures = {}
    for name, texts in prompts.items():
        films: dict[float, list[Tensor]] = {}
        for scale in (0.0, 1.0):
            for side, transformer in (("high", pipe.transformer), ("low", pipe.transformer_2)):
                transformer.set_adapters(side, scale)
            films[scale] = [
                film(pipe, text, LARGE, 200 + i, image=images[i] if images else None) for i, text in enumerate(texts)
            ]
        change = sum((a - b).abs().mean().item() for a, b in zip(films[0.0], films[1.0], strict=True)) / len(texts) * 127.5
        figures[f"LoRA: {name}"] = {"films": len(texts), "change": round(change, 1)} | {
            f"{concept} at {scale:g}": sum(getattr(judge(made), concept) for made in films[scale]) for scale in films
        }
    return figures


WITH_LORA = {"wan22_14b_t2v": boats_with_lora, "wan22_14b_i2v": dusks_with_lora}
"""What measures the LoRA of each model that has one."""


def count(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return in how many films each attribute is that of `world.HELD_OUT`, and in how many all four are."""
    right = {"object": 0, "colour": 0, "direction": 0, "ground": 0, "all four": 0}
    for verdict, wanted in zip(verdicts, world.HELD_OUT, strict=True):
        seen = (verdict.object, verdict.colour, verdict.direction, verdict.ground)
        for name, ours, theirs in zip(right, seen, wanted, strict=False):
            right[name] += ours == theirs
        right["all four"] += seen == wanted
    return right


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.measure", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="what `python -m builder.demo.install` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for figures.json and the sheets")
    parser.add_argument("--model-id", choices=list(MODELS), default="wan22_14b_t2v", help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    spec = MODELS[args.model_id]
    pipe = load(spec, args.checkpoints)
    pipes = {"": pipe} if spec.control_image != "required" else {", with an image": pipe}
    if spec.control_image == "optional":
        pipes[", with an image"] = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    for one in pipes.values():
        one.set_progress_bar_config(disable=True)
    plain_prompts = [plain(held_out) for held_out in world.HELD_OUT]
    settings = {
        "plain words": (plain_prompts, LARGE, 20, 4.0),
        "free phrasings": (FREE_PHRASINGS, LARGE, 20, 4.0),
        "small": (plain_prompts, SMALL, 20, 4.0),
        "small, guidance 1": (plain_prompts, SMALL, 20, 1.0),
        "small, 4 steps": (plain_prompts, SMALL, 4, 4.0),
    }
    figures: dict[str, dict[str, float]] = {}
    seen: dict[str, list[Verdict]] = {}
    for (setting, (prompts, small, steps, guidance)), kind in itertools.product(settings.items(), pipes):
        started, name = time.monotonic(), setting + kind
        larger = install.enlargement(spec)
        shape = (larger * small[0], larger * small[1], small[2])
        pictures = first_frames(shape) if kind else []
        films = [
            film(pipes[kind], prompt, shape, 100 + i, steps, guidance, image=world.to_pil(pictures[i]) if pictures else None)
            for i, prompt in enumerate(prompts)
        ]
        verdicts = seen[name] = [judge(made) for made in films]
        figures[name] = {**count(verdicts), "seconds a film": round((time.monotonic() - started) / len(films), 1)}
        if pictures:
            both = zip(pictures, films, strict=True)
            figures[name]["first frame, dB"] = round(sum(psnr(picture, made[:, 0]) for picture, made in both) / len(films), 1)
        print(name, figures[name])
        print("\n".join(f"    {prompt}: {verdict}" for prompt, verdict in zip(prompts, verdicts, strict=True)), flush=True)
        world.to_image(films, every=4).save(args.out / f"{name.replace(' ', '-').replace(',', '')}.png")
    if spec.family == "t2v" and spec.draft:
        films = drafts(pipe, spec.draft, args.checkpoints, plain_prompts)
        verdicts = [judge(made) for made in films]
        figures["draft"] = count(verdicts) | {
            f"{name} as in the full run": sum(
                getattr(draft, name) == getattr(full, name) for draft, full in zip(verdicts, seen["plain words"], strict=True)
            )
            for name in CHOICES
        }
        print("draft", figures["draft"], flush=True)
        world.to_image(films, every=4).save(args.out / "draft.png")
    if args.model_id in WITH_LORA:
        figures |= WITH_LORA[args.model_id](pipe, args.checkpoints / "loras")
        print("\n".join(f"{name} {row}" for name, row in figures.items() if name.startswith("LoRA")))
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
