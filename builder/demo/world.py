"""A toy world, drawn by a program: a coloured boat, ball or kite moves over a sea, a field or through a night.

    python -m builder.demo.world SHEET.png     a sheet of clips with their captions

A `Clip` says everything that a film shows; `draw` makes the film, and `captions.py` puts it into words. What a caption does not
say (place, size, speed, horizon, sun) varies widely: that is what is left to the seed.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

Object = Literal["boat", "ball", "kite"]
Colour = Literal["red", "green", "blue", "yellow", "purple"]
Direction = Literal["left", "right", "up", "down"]
Ground = Literal["sea", "field", "night"]
Rgb = tuple[float, float, float]

OBJECTS: tuple[Object, ...] = ("boat", "ball", "kite")
DIRECTIONS: tuple[Direction, ...] = ("left", "right", "up", "down")
GROUNDS: tuple[Ground, ...] = ("sea", "field", "night")
COLOURS: dict[Colour, Rgb] = {
    "red": (0.88, 0.10, 0.10),
    "green": (0.05, 0.58, 0.18),
    "blue": (0.10, 0.22, 0.95),
    "yellow": (1.00, 0.84, 0.08),
    "purple": (0.66, 0.16, 0.76),
}
WHITE: Rgb = (0.97, 0.97, 0.97)
OUTLINE: Rgb = (0.10, 0.10, 0.12)
BACKDROPS: dict[Ground, tuple[Rgb, Rgb, Rgb]] = {
    "sea": ((0.42, 0.70, 0.96), (0.80, 0.91, 0.99), (0.08, 0.38, 0.58)),
    "field": ((0.56, 0.80, 0.98), (0.90, 0.96, 0.99), (0.50, 0.74, 0.34)),
    "night": ((0.03, 0.03, 0.14), (0.13, 0.12, 0.34), (0.08, 0.12, 0.10)),
}
"""The top of the sky, the sky at the horizon, and what lies below it."""

HELD_OUT: tuple[tuple[Object, Colour, Direction, Ground], ...] = (
    ("boat", "green", "left", "sea"),
    ("boat", "yellow", "right", "night"),
    ("boat", "blue", "up", "field"),
    ("boat", "purple", "down", "sea"),
    ("ball", "red", "left", "night"),
    ("ball", "yellow", "up", "sea"),
    ("ball", "blue", "right", "field"),
    ("ball", "purple", "down", "night"),
    ("kite", "green", "up", "night"),
    ("kite", "red", "right", "sea"),
    ("kite", "blue", "left", "field"),
    ("kite", "yellow", "down", "field"),
)
"""The combinations, of 180, that the training never shows. Their prompts measure what the transformer has learned."""

LARGEST_VALUE = 0.95
"""The largest absolute value of a pixel, so that a decoder need not saturate to show it."""


@dataclass(frozen=True)
class Clip:
    """What one film shows. Places are fractions of the frame's width and height, y down."""

    object: Object
    colour: Colour
    direction: Direction
    ground: Ground
    radius: float
    """Half of the object's width, as a fraction of the square root of the frame's area."""
    start: tuple[float, float]
    end: tuple[float, float]
    horizon: float
    light: tuple[float, float]
    """Where the sun or the moon stands."""
    wave: float
    """Phase of the waves and hills, in radians."""
    faces_left: bool
    striped: bool = False
    """Whether a boat has one large square sail with a broad red stripe: the concept that a LoRA of text-to-video adds."""
    night_falls: bool = False
    """Whether the background turns from that of the first frame into a night: the concept of a LoRA of image-to-video."""

    @property
    def travel(self) -> float:
        """The distance from start to end, as a fraction of the frame's side."""
        return math.hypot(self.end[0] - self.start[0], self.end[1] - self.start[1])


def sample(rng: random.Random, **fixed: object) -> Clip:
    """Return a random clip. `fixed` sets fields of the clip, for example `object="boat"`."""
    kind = fixed.get("object", rng.choice(OBJECTS))
    direction = fixed.get("direction", rng.choice(DIRECTIONS))
    ground = fixed.get("ground", rng.choice(GROUNDS))
    horizon = rng.uniform(0.42, 0.68)
    travel = rng.uniform(0.3, 0.6)
    near = rng.uniform(0.18, 0.82 - travel)
    sideways = direction in ("left", "right")
    across = rng.uniform(0.34, 0.68)
    if kind == "boat" and ground == "sea" and sideways:
        across = horizon + rng.uniform(-0.08, 0.1)  # it floats
    first, last = (near + travel, near) if direction in ("left", "up") else (near, near + travel)
    values: dict[str, object] = {
        "object": kind,
        "colour": rng.choice(tuple(COLOURS)),
        "direction": direction,
        "ground": ground,
        "radius": rng.uniform(0.16, 0.27),
        "start": (first, across) if sideways else (across, first),
        "end": (last, across) if sideways else (across, last),
        "horizon": horizon,
        "light": (rng.choice((rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.9))), rng.uniform(0.12, 0.24)),
        "wave": rng.uniform(0, 2 * math.pi),
        "faces_left": direction == "left" if sideways else rng.random() < 0.5,
    }
    return Clip(**(values | fixed))  # type: ignore[arg-type]


def sample_seen(rng: random.Random, **fixed: object) -> Clip:
    """Return a random clip that is not held out."""
    while True:
        clip = sample(rng, **fixed)
        if (clip.object, clip.colour, clip.direction, clip.ground) not in HELD_OUT:
            return clip


def draw(clip: Clip, height: int, width: int, frames: int) -> Tensor:
    """Return the film [3, frames, height, width], float32 in -1…1, with smooth edges."""
    y = (torch.arange(height) + 0.5).view(1, height, 1)
    x = (torch.arange(width) + 0.5).view(1, 1, width)
    unit = clip.radius * math.sqrt(height * width)
    at = torch.linspace(0, 1, frames).view(frames, 1, 1)
    centre_x = (clip.start[0] + (clip.end[0] - clip.start[0]) * at) * width
    centre_y = (clip.start[1] + (clip.end[1] - clip.start[1]) * at) * height
    u, v = (x - centre_x) / unit, (y - centre_y) / unit
    if clip.faces_left:
        u = -u
    film = background(clip, height, width).unsqueeze(1).expand(3, frames, height, width)
    if clip.night_falls:
        film = torch.lerp(film, background(replace(clip, ground="night"), height, width).unsqueeze(1), at)
    for distance, colour in _parts(clip, u, v):
        film = _paint(film, distance * unit - max(1.2, 0.06 * unit), OUTLINE)
        film = _paint(film, distance * unit, colour)
    if clip.object == "ball":
        shine: Rgb = tuple(0.3 * c + 0.7 for c in COLOURS[clip.colour])  # type: ignore[assignment]
        film = _paint(film, (torch.hypot(u + 0.3, v + 0.3) - 0.22) * unit, shine)
    if clip.object == "boat" and clip.striped:
        film = _paint(film, _rectangle(u, v, *STRIPE) * unit, COLOURS["red"])
    return ((film * 2 - 1) * LARGEST_VALUE).contiguous()


def _paint(picture: Tensor, distance: Tensor, colour: Rgb) -> Tensor:
    """Return the picture [3, …] with `colour` where `distance`, in pixels, is below zero."""
    cover = (0.5 - distance).clamp(0, 1)
    paint = torch.tensor(colour).view(3, *[1] * (picture.ndim - 1))
    return picture + (paint - picture) * cover


def background(clip: Clip, height: int, width: int) -> Tensor:
    """Return what stands behind the object, [3, height, width] in 0…1."""
    y = (torch.arange(height) + 0.5).view(height, 1).expand(height, width)
    x = (torch.arange(width) + 0.5).view(1, width)
    horizon = torch.full((1, width), clip.horizon * height)
    far, near, low = BACKDROPS[clip.ground]
    depth = (y / horizon).clamp(0, 1)
    picture = torch.tensor(far).view(3, 1, 1) * (1 - depth) + torch.tensor(near).view(3, 1, 1) * depth
    if clip.ground != "sea":
        radius = 0.09 * math.sqrt(height * width)
        distance = torch.hypot(x - clip.light[0] * width, y - clip.light[1] * height) - radius
        picture = _paint(picture, distance, (1.0, 0.93, 0.55) if clip.ground == "field" else (0.90, 0.90, 0.82))
        horizon = horizon + 0.05 * height * torch.sin(x / width * 2 * math.pi + clip.wave)
    picture = _paint(picture, horizon - y, low)
    if clip.ground == "sea":
        ripple = torch.sin((y - horizon) * 24 / height + 1.5 * torch.sin(x / width * 9 + clip.wave))
        picture = picture + 0.04 * ripple * (y > horizon)
    return picture


def _parts(clip: Clip, u: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Rgb]]:
    """Yield the object's parts from back to front: the signed distance, in units of its radius, and the colour."""
    colour = COLOURS[clip.colour]
    if clip.object == "boat":
        yield _rectangle(u, v, *SQUARE_SAIL) if clip.striped else _sails(u, v), WHITE
        yield _polygon(u, v, [(-1.2, 0.3), (1.2, 0.3), (0.75, 0.9), (-0.75, 0.9)]), colour
    elif clip.object == "ball":
        yield torch.hypot(u, v) - 0.85, colour
    else:
        yield torch.maximum((u - 0.22 * torch.sin(4 * v)).abs() - 0.2, torch.maximum(0.4 - v, v - 1.75)), colour
        yield (u.abs() / 0.85 + (v + 0.45).abs() / 1.25 - 1) * 0.7, colour


SQUARE_SAIL = (-0.95, -1.25, 0.95, 0.2)
"""Left, top, right and bottom, in units of the boat's radius."""
STRIPE = (-0.95, -0.77, 0.95, -0.28)
"""The middle third of the sail: the tiny VAE shows stripes only where they are broad and level."""


def _sails(u: Tensor, v: Tensor) -> Tensor:
    """Return the distance to a large sail aft of the mast and a small one before it."""
    large = _polygon(u, v, [(-0.1, -1.25), (-0.1, 0.12), (-1.05, 0.12)])
    small = _polygon(u, v, [(0.16, -0.85), (0.9, 0.12), (0.16, 0.12)])
    return torch.minimum(large, small)


def _rectangle(u: Tensor, v: Tensor, left: float, top: float, right: float, bottom: float) -> Tensor:
    return _polygon(u, v, [(left, top), (right, top), (right, bottom), (left, bottom)])


def _polygon(u: Tensor, v: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Return the signed distance to a convex polygon (exact along its sides)."""
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners[:1], strict=True))
    sides = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        nx, ny = by - ay, ax - bx
        sign = math.copysign(1 / math.hypot(nx, ny), area)
        sides.append(((u - ax) * nx + (v - ay) * ny) * sign)
    return torch.stack(sides).amax(dim=0)


def to_pil(frame: Tensor) -> Image.Image:
    """Return a frame [3, height, width] in -1…1 as a picture."""
    return Image.fromarray(((frame.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy())


def to_image(films: list[Tensor], every: int = 1, scale: float = 1.0) -> Image.Image:
    """Return a sheet with a row of frames for each film [3, frames, height, width] in -1…1."""
    rows = [torch.cat(list(film[:, ::every].unbind(1)), dim=2) for film in films]
    widest = max(row.shape[2] for row in rows)
    sheet = torch.cat([torch.nn.functional.pad(row, (0, widest - row.shape[2], 0, 4), value=1.0) for row in rows], dim=1)
    image = to_pil(sheet)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    from builder.demo.captions import caption

    parser = argparse.ArgumentParser(prog="python -m builder.demo.world", description="Draw ten clips of the toy world.")
    parser.add_argument("picture", metavar="PICTURE.png", help="where to write them, one row each")
    args = parser.parse_args()
    rng = random.Random(0)
    clips = [sample(rng, striped=i % 4 == 3, night_falls=i % 4 == 1) for i in range(10)]
    print("\n".join(caption(clip, rng) for clip in clips))
    to_image([draw(clip, 64, 96, 9) for clip in clips], scale=2).save(args.picture)
