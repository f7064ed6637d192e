"""Encodes frames into a file: mp4, webp, gif, a zip of png, or a single png.

The frames are a stream of uint8 arrays [n, height, width, 3]. They are encoded as they arrive.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from worker.request import OutputFormat

Frame = npt.NDArray[np.uint8]
"""[height, width, 3] RGB; the chunks of a stream are [n, height, width, 3]."""


@dataclass(frozen=True)
class Encoding:
    """How to write and name one kind of file."""

    suffix: str
    content_type: str
    write: Callable[[Iterator[Frame], Path, int, int, str], None]
    """(frames, target, frames per second, number of frames, comment)"""


def encode(chunks: Iterable[Frame], target: Path, encoding: Encoding, fps: int, num_frames: int, comment: str = "") -> None:
    """Write the `num_frames` frames of the stream to `target`, with the comment if the format has a field for it."""
    encoding.write(itertools.chain.from_iterable(chunks), target, fps, num_frames, comment)


_X264 = {"crf": "18", "x264-params": "mbtree=0"}


def _write_mp4(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str, preset: str = "medium") -> None:
    """Write H.264, yuv420p, BT.709, with the index at the front. x264's authors call crf 17 or 18 visually lossless.

    Macroblock-tree is off: with it, x264 writes a different file from the same frames in every run.
    """
    first = next(frames)
    height, width = first.shape[:2]
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options=_X264 | {"preset": preset})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = 1, 1  # both BT.709 in H.273's numbering
        reformatter = VideoReformatter()  # one for all frames: each new one builds its tables again
        for frame in itertools.chain([first], frames):
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
                format="yuv420p",
                src_colorspace=Colorspace.ITU709,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


class _Animation(Image.Image):
    """A stream of frames as one animated image. Pillow reads one frame at a time, so that only one is in memory."""

    def __init__(self, frames: Iterator[Frame], num_frames: int) -> None:
        super().__init__()
        self.n_frames = num_frames
        self._frames = frames
        self._number = -1
        self.seek(0)

    def seek(self, number: int) -> None:
        """Go to the frame `number`, which must be the next one. Pillow seeks the first at the end, which is ignored."""
        if number > self._number:
            frame = Image.fromarray(next(self._frames))
            self.im, self._mode, self._size = frame.im, frame.mode, frame.size  # as all plugins of Pillow do
            self._number = number


def _write_webp(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """Write animated WebP as the trainer saves its samples: quality 80, whole milliseconds per frame."""
    animation = _Animation(frames, num_frames)
    animation.save(target, format="WEBP", save_all=True, duration=1000 // fps, loop=0, quality=80)


def _write_gif(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """Write a GIF of at most 50 fps: it counts in hundredths of a second, and players show 0.01 s as 0.1 s.

    Pillow holds one byte per pixel of all frames until it writes them; MAX_GIF_PIXELS of `parse` limits that.
    """
    first, rest = Image.fromarray(next(frames)), (Image.fromarray(frame) for frame in frames)
    first.save(target, format="GIF", append_images=rest, save_all=True, duration=max(1000 // fps, 20), loop=0)


def _write_png_zip(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """Write 00000.png, 00001.png, … into a zip, uncompressed, since PNG is compressed already."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for number, frame in enumerate(frames):
            with archive.open(zipfile.ZipInfo(f"{number:05}.png"), "w") as file:
                Image.fromarray(frame).save(file, format="PNG", compress_level=3)


def _write_png(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    Image.fromarray(next(frames)).save(target, format="PNG")


IMAGE = Encoding(".png", "image/png", _write_png)
"""For a prompt with one frame, whatever the output format."""

VIDEO: dict[OutputFormat, Encoding] = {
    "mp4": Encoding(".mp4", "video/mp4", _write_mp4),
    "webp": Encoding(".webp", "image/webp", _write_webp),
    "gif": Encoding(".gif", "image/gif", _write_gif),
    "png": Encoding(".zip", "application/zip", _write_png_zip),
}

QUICK_MP4 = Encoding(".mp4", "video/mp4", partial(_write_mp4, preset="veryfast"))
"""For a video that a person waits for on their own computer."""
