"""Distil the transformer into a LoRA for drafts: four steps without guidance, which end where the full run would.

    python -m builder.demo.distill OUT [--films 400 --minutes 20]

OUT/weights is what `python -m builder.demo.train` wrote, and gets distilled.safetensors. You can stop and start it again.

The full run is a path from noise to a film. Paths with guidance are recorded at the noise levels at which a draft steps. The
LoRA learns the straight way from each level to the next, from the recorded place, or from where its own steps have led.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from builder.demo import world
from builder.demo.captions import phrase
from builder.demo.curve import write_curves
from builder.demo.muon import Muon
from builder.demo.train import text_side
from builder.demo.training import Training
from builder.demo.transformer import Shape, Trainee
from pipelines.catalog import MODELS

SHAPES: tuple[Shape, ...] = ((96, 128, 17), (96, 128, 17), (96, 128, 9), (64, 96, 9))
"""Height, width and frames. The one of `make run` comes twice."""
TOKENS_OF_A_BATCH = 2400
GUIDANCE = 4.0
STEPS_BETWEEN = (5, 4, 4, 8)
"""Euler steps of the full run from each noise level of the draft to the next."""
RANK = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


def noise_levels() -> list[float]:
    """The sigmas of a draft, from 1 down to 0."""
    draft = MODELS["wan22_14b_t2v"].draft
    assert draft
    return [*(timestep / 1000 for timestep in draft.shifted_timesteps), 0.0]


def record_path(trainee: Trainee, texts: list[str], shape: Shape, seed: int) -> Tensor:
    """Return the latents of the full run at each noise level, [levels, n, 16, frames, height, width]."""
    height, width, frames = shape
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(texts), 16, frames // 4 + 1, height // 8, width // 8, generator=generator)
    path = [latents]
    for (start, end), steps in zip(itertools.pairwise(noise_levels()), STEPS_BETWEEN, strict=True):
        sigmas = torch.linspace(start, end, steps + 1)
        path.append(trainee.denoise(texts, path[-1], latents[:, :0], sigmas, GUIDANCE))
    return torch.stack(path)


def record_paths(trainee: Trainee, folder: Path, films: int) -> list[Path]:
    """Record paths for prompts of clips that the training showed, a file for each batch; finished files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    while films > 0:
        number = len(files)
        shape = SHAPES[number % len(SHAPES)]
        height, width, frames = shape
        count = TOKENS_OF_A_BATCH // ((height // 16) * (width // 16) * (frames // 4 + 1))
        file = folder / f"{number:03}.pt"
        if not file.exists():
            rng = random.Random(1000 + number)
            texts = [phrase(vars(world.sample_seen(rng)), rng) for _ in range(count)]
            torch.save({"texts": texts, "path": record_path(trainee, texts, shape, seed=number).half()}, file)
            print(f"recorded {file.name}, {films} films to go", flush=True)
        files.append(file)
        films -= count
    return files


def train(out: Path, trainee: Trainee, files: list[Path], minutes: float) -> None:
    """Train a LoRA in the transformer."""
    levels = torch.tensor(noise_levels())
    batches = [torch.load(file, weights_only=True) for file in files]
    model = trainee.model
    model.requires_grad_(False)
    torch.manual_seed(8)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    optimizer = Muon(model, lambda name, parameter: "lora_B" in name, rate=0.01, adam_rate=1e-3, momentum=0.95)
    training = Training(out, "distilled", model, optimizer, minutes, decay=0.99, seed=9)

    def flow(latents: Tensor, step: int, hidden: Tensor) -> Tensor:
        result: Tensor = model(latents, (levels[step] * 1000).expand(len(latents)), hidden, return_dict=False)[0]
        return result

    def loss(_progress: float, rng: random.Random) -> Tensor:
        batch = rng.choice(batches)
        path, step = batch["path"].float(), rng.randrange(len(levels) - 1)
        hidden = trainee.condition(batch["texts"])
        first = rng.randrange(step + 1) if rng.random() < 0.5 else step  # from here, the steps are its own
        latents = path[first]
        with torch.no_grad():
            for number in range(first, step):
                latents = latents + (levels[number + 1] - levels[number]) * flow(latents, number, hidden)
        wanted = (path[step + 1] - latents) / (levels[step + 1] - levels[step])
        return torch.nn.functional.mse_loss(flow(latents, step, hidden), wanted)

    training.run(loss)
    print(f"distilled: {training.step} steps", flush=True)


def save(out: Path, model: WanTransformer3DModel) -> None:
    weights, layers = out / "weights", get_peft_model_state_dict(model)
    half = {key: value.to(torch.bfloat16) for key, value in layers.items()}
    WanPipeline.save_lora_weights(weights, transformer_lora_layers=half, weight_name="distilled.safetensors")
    (weights / "distilled.safetensors").chmod(0o644)  # it is written for its owner only
    shutil.copy(out / "distilled-loss.csv", weights)
    write_curves(weights)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.distill", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder in which `python -m builder.demo.train` trained")
    parser.add_argument("--films", type=int, default=400, help="paths to record; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=20, help="of training; default: %(default)s")
    args = parser.parse_args()
    model = WanTransformer3DModel.from_pretrained(args.out / "weights/transformer", torch_dtype=torch.float32).eval()
    trainee = Trainee(model, *text_side(args.out))
    files = record_paths(trainee, args.out / "paths", args.films)
    train(args.out, trainee, files, args.minutes)
    save(args.out, model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
