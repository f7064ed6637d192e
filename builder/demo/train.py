"""Train the tiny models on the toy world: two VAEs and three transformers, in four hours or so on two cores.

    python -m builder.demo.train OUT [--vae 22 --decoder 6 --transformer 40 --image-to-video 45]     minutes of each
                                     [--vae-5b 20 --decoder-5b 20 --transformer-5b 60]

With `--start WEIGHTS`, the transformers begin with finished weights, whose VAEs are copied, and those that make films from text
with RESTART of their rates.

It writes OUT/weights in the layout of diffusers, in bf16, with the loss curves, and pictures that show the progress. You can
stop and start it again at any time: finished parts are kept, and the others resume from their last save. The seeds are fixed,
but the number of steps depends on the machine, so two trainings give similar weights, not the same.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import T5TokenizerFast
from transformers import UMT5EncoderModel as TextEncoder

from builder.demo import image_to_video, text, world
from builder.demo import transformer as demo_transformer
from builder.demo import vae as demo_vae
from builder.demo.captions import phrase
from builder.demo.curve import write_curve, write_curves
from builder.demo.judge import judge
from builder.demo.muon import Muon
from builder.demo.training import Training
from builder.demo.transformer import Latents, Shape, Trainee
from builder.tiny_checkpoints import scheduler

MINUTES = {
    "vae": 22,
    "decoder": 6,
    "transformer": 40,
    "image-to-video": 45,
    "vae-5b": 20,
    "decoder-5b": 20,
    "transformer-5b": 60,
}
RESTART = 0.6
"""The share of the rates with which a training begins that starts from finished weights."""


@dataclass(frozen=True)
class Kind:
    """What differs between 5B and the other models."""

    suffix: str
    """What the names of its parts end with."""
    new_vae: Callable[[int], AutoencoderKLWan]
    channels: int | None
    """How many channels of the latents carry something; all if None."""
    size: dict[str, int]
    sample: Callable[[random.Random], world.Clip]
    known_share: float
    """The share of the batches whose first latent frame is known."""
    longest: int
    """The most frames of a clip."""

    def shapes_at(self, progress: float, pixel: int) -> tuple[Shape, ...]:
        """Return the shapes of this part of the training. `pixel`: the side of a pixel of the latents."""
        shapes = (shape for shape in demo_transformer.shapes_at(progress) if shape[2] <= self.longest)
        return tuple((height * pixel // 8, width * pixel // 8, frames) for height, width, frames in shapes)


OF_14B = Kind("", demo_vae.vae_21, None, demo_transformer.SIZE_14B, world.sample_seen, known_share=0, longest=33)
OF_5B = Kind(
    "_5b",
    demo_vae.vae_22,
    demo_vae.CHANNELS_OF_5B,
    demo_transformer.SIZE_5B,
    image_to_video.sample,
    known_share=0.25,
    longest=17,
)


def train_vae(out: Path, kind: Kind, minutes: float) -> AutoencoderKLWan:
    """Train the VAE and write it. A finished one is only loaded."""
    name = f"vae{kind.suffix}"
    folder = out / "weights" / name
    if not (folder / "config.json").exists():
        vae = kind.new_vae(0)
        muon = Muon(vae, demo_vae.is_matrix, rate=0.02, adam_rate=2e-3, momentum=0.9)
        training = Training(out, name, vae, muon, minutes, decay=0.98, seed=1)
        training.run(lambda _progress, rng: demo_vae.loss(vae, rng), lambda: picture_vae(vae, out / f"{name}.png"))
        if kind.channels:
            demo_vae.keep_main_axes(vae, kind.channels, random.Random(16))
        print(f"{name}: {training.step} steps, {demo_vae.measure(vae, random.Random(3)):.1f} dB", flush=True)
        picture_vae(vae, out / f"{name}.png")
        vae.to(torch.bfloat16).save_pretrained(folder)
    return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def polish_decoder(out: Path, kind: Kind, minutes: float, vae: AutoencoderKLWan) -> None:
    """Train the decoder further and write the VAE again. The encoder stays, and with it all that is trained on its latents."""
    decoder = torch.nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    muon = Muon(decoder, demo_vae.is_matrix, rate=0.01, adam_rate=1e-3, momentum=0.9)
    training = Training(out, f"decoder{kind.suffix}", decoder, muon, minutes, decay=0.98, seed=10)
    picture_file = out / f"{training.name}.png"
    if training.progress < 1:
        training.run(lambda _progress, rng: demo_vae.polishing_loss(vae, rng), lambda: picture_vae(vae, picture_file))
        latents = vae.config.latents_mean, vae.config.latents_std
        print(f"{training.name}: {training.step} more steps, {demo_vae.measure(vae, random.Random(3)):.1f} dB", flush=True)
        vae.register_to_config(latents_mean=latents[0], latents_std=latents[1])
        picture_vae(vae, picture_file)
        vae.to(torch.bfloat16).save_pretrained(out / f"weights/vae{kind.suffix}")
        vae.float()
    vae.requires_grad_(False)


def picture_shape(vae: AutoencoderKLWan) -> Shape:
    """Return the shape of the films that show the progress: 12x16 latent pixels, 9 frames."""
    pixel = vae.config.scale_factor_spatial
    return 12 * pixel, 16 * pixel, 9


@torch.no_grad()
def picture_vae(vae: AutoencoderKLWan, path: Path) -> None:
    """Draw three clips, each above what the VAE makes of it."""
    rng = random.Random(2)
    clips = [world.sample(rng, object="boat", striped=True), world.sample(rng), world.sample(rng)]
    films = [world.draw(clip, *picture_shape(vae)) for clip in clips]
    decoded = [demo_vae.decode(vae, vae.encode(film[None]).latent_dist.mean)[0] for film in films]
    world.to_image([film for pair in zip(films, decoded, strict=True) for film in pair], every=2, scale=2).save(path)


def text_side(out: Path) -> tuple[T5TokenizerFast, TextEncoder]:
    """Write the text encoder and its tokenizer, and return them as they are read back."""
    text.new_tokenizer().save_pretrained(out / "weights/tokenizer")
    text.new_encoder(seed=7).to(torch.bfloat16).save_pretrained(out / "weights/text_encoder")
    encoder = TextEncoder.from_pretrained(out / "weights/text_encoder", torch_dtype=torch.float32).eval().requires_grad_(False)
    return T5TokenizerFast.from_pretrained(out / "weights/tokenizer"), encoder


def train_transformer(out: Path, kind: Kind, minutes: float, vae: AutoencoderKLWan, start: Path | None) -> None:
    """Train the transformer that makes films from text and write it, unless there is one. `start`: weights to begin with."""
    name = f"transformer{kind.suffix}"
    folder = out / "weights" / name
    if (folder / "config.json").exists():
        return
    if start:
        model = WanTransformer3DModel.from_pretrained(start / name, torch_dtype=torch.float32)
    else:
        model = demo_transformer.new_transformer(4, kind.size, kind.channels)
    share = RESTART if start else 1.0
    muon = Muon(model, demo_transformer.is_matrix, rate=0.02 * share, adam_rate=2e-3 * share, momentum=0.95)
    training = Training(out, name, model, muon, minutes, decay=0.99, seed=5)
    latents = Latents(vae, random.Random(6 + training.step), kind.sample)

    def shapes_at(progress: float) -> tuple[Shape, ...]:
        return kind.shapes_at(1 if start else progress, latents.pixel)

    _train(out, training, model, latents, shapes_at, pad_until=0 if start else 0.2, known_share=kind.known_share)
    model.to(torch.bfloat16).save_pretrained(folder)


def train_image_to_video(out: Path, minutes: float, vae: AutoencoderKLWan, start: Path | None) -> None:
    """Train the image-to-video transformer, from the text-to-video one, and write what differs, where there is none yet.

    `start`: weights whose own layers of image-to-video to begin with.
    """
    weights = out / "weights"
    if (weights / image_to_video.FILE).exists() or not minutes:
        return
    model = image_to_video.new_transformer(weights)
    if start:
        model.load_state_dict(load_file(start / image_to_video.FILE), strict=False)
    image_to_video.freeze_the_rest(model)
    muon = Muon(model, demo_transformer.is_matrix, rate=0.01, adam_rate=1.5e-3, momentum=0.95)
    training = Training(out, "image_to_video", model, muon, minutes, decay=0.99, seed=11)
    rng = random.Random(12 + training.step)

    def condition(film: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return image_to_video.condition(vae, film, clean, with_last=rng.random() < image_to_video.LAST_FRAME_SHARE)

    latents = Latents(vae, rng, image_to_video.sample, condition)
    _train(out, training, model, latents, lambda _progress: demo_transformer.shapes_at(1), pad_until=0, known_share=0)
    image_to_video.save(model, weights)


def _train(
    out: Path,
    training: Training,
    model: WanTransformer3DModel,
    latents: Latents,
    shapes_at: Callable[[float], tuple[Shape, ...]],
    pad_until: float,
    known_share: float,
) -> None:
    """Train a transformer, and draw what it makes.

    `pad_until`: the share of the time until all pads count. `known_share`: how many of the batches show their first frame.
    """
    trainee = Trainee(model, *text_side(out))
    model.compile_repeated_blocks(dynamic=True)  # a third quicker, after two minutes

    def loss(progress: float, rng: random.Random) -> torch.Tensor:
        if training.step % demo_transformer.STEPS_BETWEEN_ENCODINGS == 0:
            latents.add(rng.choice(shapes_at(progress)))
        clips, clean, conditions = latents.batch(rng.choice(shapes_at(progress)))
        pad_share = min(1.0, progress / pad_until) if pad_until else 1.0
        known = int(rng.random() < known_share)
        return trainee.loss(demo_transformer.captions(clips, rng), clean, conditions, pad_share, known)

    clips = [world.sample(random.Random(40 + i)) for i in range(6)]

    def on_checkpoint() -> None:
        for known in (0, 1) if known_share else (0,):
            file = out / f"{training.name}{'-image' * known}.png"
            picture(trainee, training.average, latents, clips, file, known)

    training.run(loss, on_checkpoint)
    on_checkpoint()


def picture(
    trainee: Trainee, average: dict[str, torch.Tensor], latents: Latents, clips: list[world.Clip], path: Path, known: int
) -> None:
    """Draw a film for a phrase of each clip with the averaged weights, and print what the judge sees in them.

    The films begin with `known` latent frames of the clips.
    """
    model = trainee.model
    current = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(average)
    prompts = [phrase(vars(clip), random.Random(i)) for i, clip in enumerate(clips)]
    with torch.compiler.set_stance("force_eager"):
        films = latents.decode(trainee.sample(prompts, *latents.encode(clips, picture_shape(latents.vae)), known=known))
    model.load_state_dict(current)
    world.to_image(list(films), every=2, scale=2).save(path)
    print("\n".join(f"    {prompt}: {judge(film)}" for prompt, film in zip(prompts, films, strict=True)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.train", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the weights, the curves and what is unfinished")
    for name, minutes in MINUTES.items():
        parser.add_argument(f"--{name}", type=float, default=minutes, metavar="MINUTES", help="default: %(default)s")
    parser.add_argument("--start", type=Path, metavar="WEIGHTS", help="finished weights to begin with")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        for kind in (OF_14B, OF_5B):
            name = f"vae{kind.suffix}"
            shutil.copytree(args.start / name, args.out / "weights" / name, dirs_exist_ok=True)
    vae = train_vae(args.out, OF_14B, args.vae)
    polish_decoder(args.out, OF_14B, args.decoder, vae)
    train_transformer(args.out, OF_14B, args.transformer, vae, args.start)
    train_image_to_video(args.out, args.image_to_video, vae, args.start)
    vae = train_vae(args.out, OF_5B, args.vae_5b)
    polish_decoder(args.out, OF_5B, args.decoder_5b, vae)
    train_transformer(args.out, OF_5B, args.transformer_5b, vae, args.start)
    scheduler(flow_shift=demo_transformer.SHIFT).save_pretrained(args.out / "weights/scheduler")
    for curve in args.out.glob("*-loss.csv"):
        write_curve(curve, args.out / "weights" / curve.name, args.start)
    write_curves(args.out / "weights")
    for file in args.out.glob("weights/*/config.json"):
        config = {name: value for name, value in json.loads(file.read_text()).items() if name != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in args.out.glob("weights/**/*.safetensors"):
        file.chmod(0o644)  # they are written for their owner only
    return 0


if __name__ == "__main__":
    sys.exit(main())
