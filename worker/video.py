"""Encode frames into a file: mp4, webp, gif, a zip of png, or a single png.

The frames are a stream of uint8 arrays [n, height, width, 3], and are encoded as they come.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from worker.request import OutputFormat

Frame = npt.NDArray[np.uint8]
"""[height, width, 3] RGB; a stream's chunks have one more dimension in front."""


@dataclass(frozen=True)
class Encoding:
    """How one kind of file is written and named."""

    suffix: str
    content_type: str
    write: Callable[[Iterator[Frame], Path, int, int, str], None]
    """(frames, target, frames per second, number of frames, comment)"""


def encode(chunks: Iterable[Frame], target: Path, encoding: Encoding, fps: int, num_frames: int, comment: str = "") -> None:
    """Write the `num_frames` frames of the stream to `target`, with the comment where the format has a place for one."""
    encoding.write(itertools.chain.from_iterable(chunks), target, fps, num_frames, comment)


_X264 = {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}


def _write_mp4(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """H.264, yuv420p, BT.709, the index in front. crf 18 is visually lossless by x264's own account (17 or 18).

    Without macroblock-tree, with which x264 makes another file of the same frames at every run.
    """
    first = next(frames)
    height, width = first.shape[:2]
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = 1, 1  # both BT.709 in H.273's numbering
        reformatter = VideoReformatter()  # one for all: a frame's own would set up its tables anew
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
    """A stream of frames as one animated image. Pillow reads it frame by frame, so that only one is in memory."""

    def __init__(self, frames: Iterator[Frame], num_frames: int) -> None:
        super().__init__()
        self.n_frames = num_frames
        self._frames = frames
        self._number = -1
        self.seek(0)

    def seek(self, number: int) -> None:
        """Go to the frame `number`, which must be the next one. Pillow goes back to the first when it has read all."""
        if number > self._number:
            frame = Image.fromarray(next(self._frames))
            self.im, self._mode, self._size = frame.im, frame.mode, frame.size  # as every plugin of Pillow sets them
            self._number = number


def _write_webp(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """Animated WebP as the trainer saves its samples: quality 80, whole milliseconds per frame."""
    animation = _Animation(frames, num_frames)
    animation.save(target, format="WEBP", save_all=True, duration=1000 // fps, loop=0, quality=80)


def _write_gif(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """GIF counts in hundredths of a second, and players take less than two for ten: 50 fps is the fastest.

    Pillow holds one byte a pixel of all frames until it writes them; MAX_GIF_PIXELS of the request bounds that.
    """
    first, rest = Image.fromarray(next(frames)), (Image.fromarray(frame) for frame in frames)
    first.save(target, format="GIF", append_images=rest, save_all=True, duration=max(1000 // fps, 20), loop=0)


def _write_png_zip(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    """00000.png, 00001.png, …; stored, since PNG is compressed already."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for number, frame in enumerate(frames):
            with archive.open(zipfile.ZipInfo(f"{number:05}.png"), "w") as file:
                Image.fromarray(frame).save(file, format="PNG", compress_level=3)


def _write_png(frames: Iterator[Frame], target: Path, fps: int, num_frames: int, comment: str) -> None:
    Image.fromarray(next(frames)).save(target, format="PNG")


IMAGE = Encoding(".png", "image/png", _write_png)
"""A prompt of one frame, whatever the output format."""

VIDEO: dict[OutputFormat, Encoding] = {
    "mp4": Encoding(".mp4", "video/mp4", _write_mp4),
    "webp": Encoding(".webp", "image/webp", _write_webp),
    "gif": Encoding(".gif", "image/gif", _write_gif),
    "png": Encoding(".zip", "application/zip", _write_png_zip),
}
