"""Compare two videos: their distance in numbers, in words and as a picture, and the settings that differ.

    python -m tools.compare preview.webp mine.mp4 --sheet sheet.png

It compares finished videos. `tools.requests_from_config` makes requests for those of a training config.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.causes import Differing, Settings, likely_causes, to_check
from tools.cli import DIFFERS, FITS, BadInput, one_line_errors
from tools.frames import Clip, pairs, read_clip
from tools.metrics import WINDOW, FrameDistance, Verdict, distance, overall_psnr, verdict
from tools.noise import noise_between
from tools.sheet import Row, comparison_sheet

_EPILOG = """\
A and B: MP4, animated WebP, GIF, a zip of PNGs, a folder of images, or one image.

PSNR is over R, G and B. SSIM (Wang et al. 2004) is over the BT.709 luma, with a Gaussian window of 11x11 and sigma 1.5.
MP4 is decoded as BT.709. If sizes or frame counts differ, the part that both have is compared, from the top left and from
the first frame. The trainer's previews are WebP at quality 80: a request with "output_format": "webp" is encoded in the
same way, and "png" loses nothing.

Settings are compared if both sides have them. The worker's MP4s contain theirs; for other files give the job's result JSON.

exit status: 0 equal, or equal within encoding noise; 1 not equal, or one has more frames or pixels; 2 bad input

example:
  python -m tools.compare samples/1718000000__000001000_0.webp 0.webp --settings-b result.json --sheet sheet.png
"""


@dataclass(frozen=True)
class Comparison:
    """Two clips and their differences."""

    a: Clip
    b: Clip
    frames: list[FrameDistance]
    verdict: Verdict
    uncommon: list[str]
    """Differences in size and frame count, in words."""
    settings: dict[str, tuple[Any, Any]] | None
    """Path of each setting that differs → its values in A and B; None if one side has no settings."""
    causes: list[str]
    """The likely causes of the difference, in words; none for equal videos."""

    @property
    def equal(self) -> bool:
        return self.verdict.equal and not self.uncommon


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    a, b = read_clip(args.a), read_clip(args.b)
    settings_a = _settings_in_file(args.settings_a, args.prompt) if args.settings_a else a.settings
    settings_b = _settings_in_file(args.settings_b, args.prompt) if args.settings_b else b.settings
    found = compare(a, b, settings_a, settings_b)
    print(json.dumps(as_json(found), indent=2) if args.json else as_text(found))
    if args.sheet:
        comparison_sheet(args.sheet, (a, b), _rows(found, args.rows), found.verdict.text.partition(":")[0])
        print(f"sheet: {args.sheet}", file=sys.stderr)
    return FITS if found.equal else DIFFERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description="Compare two videos frame by frame, and say whether they are the same.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="a video, an image, or a zip or folder of images")
    parser.add_argument("b", metavar="B", type=Path, help="the video to compare it with")
    parser.add_argument("--sheet", metavar="OUT.png", type=Path, help="write a picture of A, B and their difference")
    parser.add_argument("--rows", metavar="N", type=int, default=5, help="frames in the sheet, evenly spaced (default: 5)")
    for side in "ab":
        parser.add_argument(
            f"--settings-{side}",
            metavar="RESULT.json",
            type=Path,
            help=f"{side.upper()}'s settings from a job's result",
        )
    parser.add_argument("--prompt", metavar="N", type=int, default=0, help="index of the prompt in a result JSON (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def compare(a: Clip, b: Clip, settings_a: dict[str, Any] | None = None, settings_b: dict[str, Any] | None = None) -> Comparison:
    """Compare the part that both videos have. Raises BadInput if the frames are smaller than SSIM's window."""
    if min(*a.frames.shape[1:3], *b.frames.shape[1:3]) < WINDOW:
        raise BadInput(f"the frames are {a.size} and {b.size} pixels; SSIM needs at least {WINDOW}x{WINDOW}")
    frames = [distance(left, right) for left, right in pairs(a.frames, b.frames)]
    settings = differing(settings_a, settings_b) if settings_a is not None and settings_b is not None else None
    found = verdict(frames, noise_between(a, b))
    causes = [] if found.equal else list(_causes(settings, settings_a, settings_b))
    return Comparison(a, b, frames, found, list(_uncommon(a, b)), settings, causes)


def _causes(settings: Differing | None, settings_a: Settings | None, settings_b: Settings | None) -> Iterator[str]:
    if settings is not None:
        yield from likely_causes(settings)
    for side, one in (("A", settings_a), ("B", settings_b)):
        if settings is None and one is not None:
            yield from to_check(one, side)


def _uncommon(a: Clip, b: Clip) -> Iterator[str]:
    if a.size != b.size:
        common = f"{min(a.frames.shape[2], b.frames.shape[2])}x{min(a.frames.shape[1], b.frames.shape[1])}"
        yield f"A is {a.size} and B is {b.size} pixels; compared: the {common} at the top left"
    if len(a.frames) != len(b.frames):
        common_count = min(len(a.frames), len(b.frames))
        yield f"A has {len(a.frames)} frames and B has {len(b.frames)}; compared: the first {common_count}"


def _settings_in_file(path: Path, prompt: int) -> dict[str, Any]:
    """Call `settings_in` for a JSON file. Raises BadInput, OSError."""
    try:
        return settings_in(json.loads(path.read_text(encoding="utf-8-sig")), prompt)
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error})") from error
    except BadInput as error:
        raise BadInput(f"{path} {error}") from error


def settings_in(result: Any, prompt: int, seed: int | None = None) -> dict[str, Any]:
    """Return the settings of one prompt in a job's result, flat as in the comment of an MP4. `seed` tells its videos apart.

    `result`: the result itself, RunPod's answer with it under `output`, or the settings alone. Raises BadInput.
    """
    for wrapper in ("output", "settings"):
        if isinstance(result, dict) and isinstance(result.get(wrapper), dict):
            result = result[wrapper]
    if not isinstance(result, dict) or "match" not in result:
        raise BadInput("has no `settings`; give the JSON that a job returned")
    settings = {name: value for name, value in result.items() if name != "prompts"}
    prompts = result.get("prompts")
    if not isinstance(prompts, list):
        return settings
    rows = [row for number, row in enumerate(prompts) if row.get("prompt_index", number) == prompt]
    if not rows:
        last = max((row.get("prompt_index", number) for number, row in enumerate(prompts)), default=0)
        raise BadInput(f"has the prompts 0 to {last}, and not --prompt {prompt}")
    return {**settings, **next((row for row in rows if row.get("seed") == seed), rows[0])}


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the two values of each setting that differs, by its path. A missing setting counts as None."""
    flat_a, flat_b = dict(_flat(a)), dict(_flat(b))
    paths = [path for path in (flat_a | flat_b) if path not in ("prompt_index", "video_index")]
    return {path: (flat_a.get(path), flat_b.get(path)) for path in paths if flat_a.get(path) != flat_b.get(path)}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    else:
        yield path, value


def _rows(found: Comparison, count: int) -> list[Row]:
    """Return `count` of the common frames, evenly spaced from the first to the last."""
    last = len(found.frames) - 1
    count = max(1, min(count, last + 1))
    numbers = [round(i * last / max(count - 1, 1)) for i in range(count)]
    common = list(pairs(found.a.frames, found.b.frames))
    return [Row(number, *common[number], found.frames[number]) for number in numbers]


def as_json(found: Comparison) -> dict[str, Any]:
    """Return the comparison for programs. The PSNR of equal frames is null, since JSON has no infinity."""
    settings = found.settings
    return {
        "equal": found.equal,
        "verdict": asdict(found.verdict),
        "a": _clip_json(found.a),
        "b": _clip_json(found.b),
        "uncommon": found.uncommon,
        "psnr": _finite(overall_psnr(found.frames)),
        "ssim": round(sum(pair.ssim for pair in found.frames) / len(found.frames), 6),
        "max_difference": max(pair.max_difference for pair in found.frames),
        "frames": [
            {"frame": number, "psnr": _finite(pair.psnr), "ssim": round(pair.ssim, 6), "max_difference": pair.max_difference}
            for number, pair in enumerate(found.frames)
        ],
        "mean_difference": round(_mean_difference(found), 3),
        "causes": found.causes,
        "settings": None if settings is None else {path: {"a": left, "b": right} for path, (left, right) in settings.items()},
    }


def _clip_json(clip: Clip) -> dict[str, Any]:
    count, height, width = clip.frames.shape[:3]
    return {"name": clip.name, "kind": clip.kind, "width": width, "height": height, "num_frames": count, "fps": clip.fps}


def _finite(psnr: float) -> float | None:
    return round(psnr, 3) if math.isfinite(psnr) else None


def as_text(found: Comparison) -> str:
    """Return the comparison for people; the verdict comes last."""
    lines = [f"A  {found.a}", f"B  {found.b}", *(f"!  {text}" for text in found.uncommon)]
    lines += ["", "frame      PSNR    SSIM  largest difference"]
    lines += [_line(f"{number:5d}", pair.psnr, pair.ssim, pair.max_difference) for number, pair in enumerate(found.frames)]
    mean_ssim = sum(pair.ssim for pair in found.frames) / len(found.frames)
    lines.append(_line("  all", overall_psnr(found.frames), mean_ssim, max(pair.max_difference for pair in found.frames)))
    lines.append(f"mean difference: {_mean_difference(found):.2f} of 255")
    lines += ["", *_settings_lines(found.settings), *found.causes, ""]
    lines.append(found.verdict.text + (" (in the part that both have)" if found.uncommon else ""))
    return "\n".join(lines + [f"hint: {found.verdict.advice}"] * bool(found.verdict.advice))


def _mean_difference(found: Comparison) -> float:
    return sum(pair.mean_difference for pair in found.frames) / len(found.frames)


def _line(label: str, psnr: float, ssim: float, largest: int) -> str:
    shown = f"{psnr:6.2f} dB" if math.isfinite(psnr) else "equal    "
    return f"{label}  {shown:>9}  {ssim:.4f}  {largest:3d} of 255"


def _settings_lines(settings: dict[str, tuple[Any, Any]] | None) -> list[str]:
    if settings is None:
        return [
            "settings: not known on both sides; the worker's MP4s have them, for other files use --settings-a, --settings-b"
        ]
    if not settings:
        return ["settings: no differences"]
    width = max(map(len, settings))
    shown = {path: tuple(json.dumps(value, ensure_ascii=False) for value in values) for path, values in settings.items()}
    return ["settings that differ (A, then B):", *(f"  {path:{width}}  {a}  {b}" for path, (a, b) in shown.items())]


if __name__ == "__main__":
    sys.exit(main())
