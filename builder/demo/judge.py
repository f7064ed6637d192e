"""Say what a film of the toy world shows, by simple measures of its pixels.

The judge tells the object, its colour and direction, the background, and whether a sail is striped and whether night falls. An
answer is None if the film shows nothing clear, so that noise does not count as a boat. The judge sees only the film, never the
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from builder.demo.world import BACKDROPS, COLOURS, LARGEST_VALUE, OBJECTS, Colour, Direction, Ground, Object

COLOUR_TOLERANCE = 0.42
"""The largest distance between a pixel and its colour, in RGB of -1…1."""
SMALLEST_AREA = 0.006
"""The area of the object's coloured part, as a share of the frame."""
SHORTEST_WAY = 0.1
"""The shortest movement that counts, as a share of the frame's side."""


@dataclass(frozen=True)
class Verdict:
    object: Object | None
    colour: Colour | None
    direction: Direction | None
    ground: Ground | None
    striped: bool = False
    night_falls: bool = False
    """Whether the background, that of the first frame, is a night in the last one."""

    def __str__(self) -> str:
        what = f"{self.colour or 'colourless'} {self.object or 'something'}{' with a striped sail' if self.striped else ''}"
        where = {"sea": " over the sea", "field": " over a field", "night": " at night", None: ""}[self.ground]
        return f"a {what} that moves {self.direction or 'nowhere'}{where}{', and night falls' if self.night_falls else ''}"


def judge(film: Tensor) -> Verdict:
    """Judge a film [3, frames, height, width] in -1…1."""
    palette = torch.tensor(list(COLOURS.values())) * 2 * LARGEST_VALUE - LARGEST_VALUE
    distance = (film[None] - palette.view(-1, 3, 1, 1, 1)).norm(dim=1)  # [colours, frames, height, width]
    is_colour = (distance.argmin(0) == torch.arange(len(palette)).view(-1, 1, 1, 1)) & (distance < COLOUR_TOLERANCE)
    best = int(is_colour.sum((1, 2, 3)).argmax())
    mask = is_colour[best]
    first, last = ground_of(film[:, :1]), ground_of(film[:, -1:])
    night_falls = first in ("sea", "field") and last == "night"
    ground = first if night_falls else ground_of(film)
    if mask.float().mean() < SMALLEST_AREA:
        return Verdict(None, None, None, ground, night_falls=night_falls)
    kinds = [shape_of(frame, picture) for frame, picture in zip(mask, film.unbind(1), strict=True)]
    kind = next((kind for kind in OBJECTS if kinds.count(kind) > len(kinds) / 2), None)
    stripes = mask | is_colour[list(COLOURS).index("red")]
    frames = zip(mask, stripes, film.unbind(1), strict=True)
    striped = kind == "boat" and sum(has_stripe(*frame) for frame in frames) > len(kinds) / 2
    return Verdict(kind, list(COLOURS)[best], direction_of(mask), ground, striped, night_falls)


def direction_of(mask: Tensor) -> Direction | None:
    """Return where the object [frames, height, width] moves between the first and the last frame that show it."""
    _, height, width = mask.shape
    seen = [frame.nonzero().float().mean(0) for frame in mask if frame.float().mean() > SMALLEST_AREA / 3]
    if len(seen) < 2:
        return None
    down, right = ((seen[-1] - seen[0]) / torch.tensor([height, width])).tolist()
    if max(abs(down), abs(right)) < SHORTEST_WAY:
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def ground_of(film: Tensor) -> Ground | None:
    """Return the ground whose colour the lowest rows have, in the middle of all frames."""
    rows = film[:, :, -max(4, film.shape[2] // 12) :].flatten(1).median(dim=1).values
    distance = {
        name: (rows - (torch.tensor(rgb) * 2 - 1) * LARGEST_VALUE).norm().item() for name, (_, _, rgb) in BACKDROPS.items()
    }
    nearest = min(distance, key=lambda name: distance[name])
    return nearest if distance[nearest] < 0.5 else None


def shape_of(mask: Tensor, picture: Tensor) -> Object | None:
    """Return what a frame shows. `mask` [height, width]: where the object's colour is; `picture` [3, height, width].

    The colour of a boat is a wide hull below a sail with white in it; a ball fills its box as a circle does; a kite is widest
    above its middle and ends in a thin tail.
    """
    rows, columns = mask.sum(1), mask.sum(0)
    if mask.sum() < 12:
        return None
    top, bottom, left, right = _trimmed(rows), _trimmed(rows.flip(0)), _trimmed(columns), _trimmed(columns.flip(0))
    box = mask[top : mask.shape[0] - bottom, left : mask.shape[1] - right].float()
    if min(box.shape) < 3:
        return None
    height, width = box.shape
    if _white_above(mask, picture) > 0.12:
        return "boat"
    wide = box.sum(1)
    third = max(1, height // 3)
    head, foot = wide[:third].mean(), wide[-third:].mean()
    if height / width > 1.2 and foot < 0.62 * wide.max() and foot < head:
        return "kite"
    if 0.72 < height / width < 1.4 and box.mean() > 0.66:
        return "ball"
    if width / height > 1.7:
        return "boat"
    return "kite" if foot < 0.5 * wide.max() and box.mean() < 0.66 and height > width else None


def _trimmed(counts: Tensor) -> int:
    """Return how many entries at the start hold less than 2 % of all: stray pixels at the edges."""
    return int((counts.cumsum(0) < 0.02 * counts.sum()).sum())


def _sail_box(mask: Tensor) -> tuple[slice, slice]:
    """Return where a sail would stand above the lowest part of the mask, the hull."""
    rows = mask.sum(1)
    bottom = mask.shape[0] - _trimmed(rows.flip(0))
    widest = max(1, int(rows.max()))
    columns = mask[max(0, bottom - widest // 4) : bottom].sum(0)
    left, right = _trimmed(columns), mask.shape[1] - _trimmed(columns.flip(0))
    span = right - left
    hull_top = bottom - round(0.26 * span)
    return slice(max(0, hull_top - round(0.5 * span)), max(0, hull_top)), slice(left + span // 6, right - span // 6)


def _white_above(mask: Tensor, picture: Tensor) -> float:
    """Return how much of the place of a sail is white."""
    box = _sail_box(mask)
    region = picture[(slice(None), *box)]
    if region.numel() == 0:
        return 0.0
    return _is_white(region).float().mean().item()


def _is_white(picture: Tensor) -> Tensor:
    return (picture.amin(0) > 0.5) & (picture.amax(0) - picture.amin(0) < 0.25)


def has_stripe(mask: Tensor, stripes: Tensor, picture: Tensor) -> bool:
    """Return whether the place of the sail has a coloured row above a white one.

    `stripes` [height, width]: where the picture is red, or has the boat's colour, which the LoRA often takes instead.
    """
    box = _sail_box(mask)
    if stripes[box].numel() == 0:
        return False
    coloured = stripes[box].float().mean(1) > 0.4
    white = _is_white(picture[(slice(None), *box)]).float().mean(1) > 0.4
    return bool((coloured.cumsum(0) * white).any())
