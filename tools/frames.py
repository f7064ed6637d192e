"""Reads the frames of a video, an animation, a zip or folder of images, or one image."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from tools.cli import BadInput

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3], RGB."""

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Clip:
    """The frames of one source."""

    name: str
    kind: str
    """`mp4`, `webp`, `gif`, `png`, …; for a zip or folder, the kind of its images."""
    frames: Frames
    fps: float | None
    """None for images."""
    settings: dict[str, Any] | None
    """The settings that the worker wrote into an MP4's comment, or None."""

    @property
    def size(self) -> str:
        return f"{self.frames.shape[2]}x{self.frames.shape[1]}"

    def __str__(self) -> str:
        count = len(self.frames)
        fps = f", {self.fps:.4g} fps" if self.fps else ""
        return f"{self.name}: {self.kind}, {self.size}, {count} frame{'s' * (count != 1)}{fps}"


def read_clip(path: Path) -> Clip:
    """Read all frames of a file or folder; its content decides the format. Raises BadInput, OSError."""
    if path.is_dir():
        return _read_folder(path)
    with path.open("rb") as file:
        head = file.read(12)
        if not head:
            raise BadInput(f"{path}: the file is empty")
        if head[:4] == b"PK\x03\x04":
            return _read_zip(path)
        file.seek(0)
        if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3":
            return _read_video(path)
        return _read_image(path, file)


def _read_video(path: Path) -> Clip:
    """Decode MP4, MOV, MKV or WebM to RGB, as BT.709 in limited range, which the worker writes."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput(f"{path}: the file has no video")
            rate = container.streams.video[0].average_rate
            frames = [rgb(frame) for frame in container.decode(video=0)]
            comment = container.metadata.get("comment", "")
    except av.error.FFmpegError as error:
        raise BadInput(f"{path}: the video is damaged or cut short ({error.strerror})") from error
    kind = "mp4" if path.suffix.lower() in (".mp4", ".m4v", ".mov", "") else path.suffix.lower()[1:]
    return Clip(path.name, kind, _stacked(frames, path), float(rate) if rate else None, _settings_in(comment))


def rgb(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    picture = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    )
    return np.asarray(picture.to_ndarray(), np.uint8)


def _settings_in(comment: str) -> dict[str, Any] | None:
    try:
        settings = json.loads(comment)
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def _read_image(path: Path, file: BinaryIO) -> Clip:
    kind, frames, durations = _pillow_frames(path, file)
    if len(frames) == 1:
        return Clip(path.name, kind, _stacked(frames, path), None, None)
    shortest = min(durations)
    if not shortest:
        return Clip(path.name, kind, _stacked(frames, path), None, None)
    # Encoders store equal frames in a row as one frame that is shown longer.
    shown = [frame for frame, duration in zip(frames, durations, strict=True) for _ in range(round(duration / shortest))]
    return Clip(path.name, kind, _stacked(shown, path), 1000 / shortest, None)


def _pillow_frames(path: Path | str, file: Any) -> tuple[str, list[npt.NDArray[np.uint8]], list[int]]:
    """Return (format, frames, milliseconds for which each is shown)."""
    frames, durations = [], []
    try:
        with Image.open(file) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                frames.append(np.asarray(image.convert("RGB")))
                durations.append(int(image.info.get("duration", 0)))
            return str(image.format).lower(), frames, durations
    except Exception as error:  # Pillow's parsers raise many types for damaged files
        raise BadInput(
            f"{path}: neither a video nor an image that can be read; give an MP4, WebP, GIF, PNG, zip or folder"
        ) from error


def _read_folder(path: Path) -> Clip:
    files = [file for file in path.iterdir() if file.is_file() and _is_image(file.name)]
    return _read_stills(path, [(file.name, file.open) for file in files])


def _read_zip(path: Path) -> Clip:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if _is_image(name)]
            return _read_stills(path, [(name, lambda _mode, name=name: archive.open(name)) for name in names])
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}: the zip is damaged or cut short") from error


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _IMAGE_SUFFIXES and not Path(name).name.startswith(".") and "__MACOSX" not in name


def _read_stills(path: Path, openers: list[tuple[str, Any]]) -> Clip:
    """Return one frame per image, ordered by the numbers in their names."""
    frames, kinds = [], set()
    for name, opener in sorted(openers, key=lambda item: _by_number(item[0])):
        with opener("rb") as file:
            kind, [frame, *_], _ = _pillow_frames(f"{path}/{name}", file)
        frames.append(frame)
        kinds.add(kind)
    kind = kinds.pop() if len(kinds) == 1 else "mixed images"
    return Clip(path.name, kind, _stacked(frames, path), None, None)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts 2.png before 10.png."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _stacked(frames: list[npt.NDArray[np.uint8]], path: Path) -> Frames:
    if not frames:
        raise BadInput(f"{path}: it contains no image")
    if sizes := sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames})[1:]:
        raise BadInput(f"{path}: its frames have different sizes ({frames[0].shape[1]}x{frames[0].shape[0]} and {sizes[-1]})")
    return np.stack(frames)


def pairs(a: Frames, b: Frames) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """Yield pairs of frames with equal numbers, cropped to the width and height that both have, from the top left."""
    height, width = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    for left, right in zip(a, b, strict=False):
        yield left[:height, :width], right[:height, :width]
