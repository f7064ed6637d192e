import gc
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from worker.video import IMAGE, VIDEO, encode

COUNT, HEIGHT, WIDTH = 17, 96, 160
ROOT = Path(__file__).parents[2]


def moving_pattern(count: int = COUNT, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth waves of every colour, uint8 [count, height, width, 3]."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width]
    phase = 2 * np.pi * t / max(count, 2)
    waves = [110 * np.sin(x / 25 + phase), 110 * np.sin(y / 20 + phase), 110 * np.cos((x + y) / 30)]
    return np.round(127.5 + np.stack(waves, axis=-1)).astype(np.uint8)


FRAMES = moving_pattern()


def written(folder: Path, output_format: str, frames=FRAMES, fps: int = 16) -> Path:
    target = folder / f"video{VIDEO[output_format].suffix}"
    encode([frames], target, VIDEO[output_format], fps, len(frames))
    return target


def of_mp4(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        return np.array([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def of_animation(file: Path) -> tuple[np.ndarray, list[int]]:
    """Frames, and how long each is shown in milliseconds."""
    frames, durations = [], []
    with Image.open(file) as image:
        for number in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.array(frames), durations


def psnr(frames: np.ndarray, original: np.ndarray = FRAMES) -> float:
    """In dB; shapes must be the same."""
    assert frames.shape == original.shape
    return float(10 * np.log10(255**2 / np.mean((frames.astype(float) - original) ** 2)))


# mp4


def test_mp4_is_h264_that_every_player_takes(tmp_path):
    with av.open(str(written(tmp_path, "mp4"))) as container:
        [stream] = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.width, stream.codec_context.height) == (WIDTH, HEIGHT)


def test_mp4_says_which_colours_it_has(tmp_path):
    with av.open(str(written(tmp_path, "mp4"))) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
        assert (context.color_primaries, context.color_trc) == (1, 1)


def test_mp4_keeps_frames_and_colours(tmp_path):
    assert psnr(of_mp4(written(tmp_path, "mp4"))) > 37  # 39.2 measured; 27.5 with the matrix of BT.601


def test_mp4_keeps_flat_colours_within_two_levels(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
    flat = np.repeat(np.array(colours, np.uint8), 16, axis=0)[None, None].repeat(64, axis=1).repeat(5, axis=0)
    middles = of_mp4(written(tmp_path, "mp4", flat))[2, 32, 8::16]
    assert np.abs(middles.astype(int) - colours).max() <= 2


@pytest.mark.parametrize("fps", [1, 16, 24, 30, 120])
def test_mp4_plays_at_the_rate_asked_for(tmp_path, fps):
    with av.open(str(written(tmp_path, "mp4", FRAMES[:9], fps))) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames) == (fps, 9)
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / fps, abs=0.001)
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([number / fps for number in range(9)], abs=0.001)


def test_mp4_can_start_to_play_before_it_is_loaded(tmp_path):
    data = written(tmp_path, "mp4").read_bytes()
    boxes, position = [], 0
    while position < len(data):
        boxes.append(data[position + 4 : position + 8])
        position += int.from_bytes(data[position : position + 4], "big")
    assert boxes.index(b"moov") < boxes.index(b"mdat")


def test_mp4_of_a_still_scene_has_all_its_frames(tmp_path):
    assert len(of_mp4(written(tmp_path, "mp4", FRAMES[:1].repeat(9, axis=0)))) == 9


LONG = json.dumps({"prompt": "ein Boot über 波 🚢\n" * 2000, "shift": 5.0}, ensure_ascii=False)


@pytest.mark.parametrize("comment", ["made by a test", 'a "quoted" = ; # \\ text', LONG], ids=["short", "signs", "long json"])
def test_mp4_keeps_its_comment(tmp_path, comment):
    encode([FRAMES], tmp_path / "video.mp4", VIDEO["mp4"], 16, len(FRAMES), comment)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.metadata["comment"] == comment
    assert psnr(of_mp4(tmp_path / "video.mp4")) > 37


def test_mp4_without_a_comment_has_none(tmp_path):
    with av.open(str(written(tmp_path, "mp4"))) as container:
        assert not container.metadata.get("comment")


@pytest.mark.parametrize("output_format", ["webp", "gif", "png"])
def test_a_comment_leaves_formats_without_a_place_for_it_as_they_are(tmp_path, output_format):
    without = written(tmp_path, output_format, FRAMES[:5]).read_bytes()
    encode([FRAMES[:5]], tmp_path / "commented", VIDEO[output_format], 16, 5, LONG)
    assert (tmp_path / "commented").read_bytes() == without


# webp, gif, png


def test_webp_keeps_frames_and_colours(tmp_path):
    frames, _ = of_animation(written(tmp_path, "webp"))
    assert psnr(frames) > 37  # 39.9 measured


@pytest.mark.parametrize("fps", [1, 16, 24, 30, 120])
def test_webp_shows_a_frame_for_whole_milliseconds_as_the_trainer_writes_it(tmp_path, fps):
    _, durations = of_animation(written(tmp_path, "webp", FRAMES[:5], fps))
    assert durations == [1000 // fps] * 5


def test_webp_is_what_pillow_writes_of_all_frames_at_once(tmp_path):
    first, *rest = (Image.fromarray(frame) for frame in FRAMES)
    first.save(tmp_path / "plain.webp", append_images=rest, save_all=True, duration=62, loop=0, quality=80)
    assert written(tmp_path, "webp").read_bytes() == (tmp_path / "plain.webp").read_bytes()


@pytest.mark.parametrize(("output_format", "bytes_per_pixel"), [("mp4", 0), ("webp", 0), ("gif", 1), ("png", 0)])
def test_frames_are_not_collected_while_they_are_written(tmp_path, output_format, bytes_per_pixel):
    """But for GIF, whose frames Pillow keeps with a palette."""

    def held() -> int:
        images = [each for each in gc.get_objects() if isinstance(each, Image.Image) and each.mode]
        return sum(image.width * image.height * len(image.getbands()) for image in images)

    before, most = held(), []

    def chunks():
        for frame in FRAMES:
            most.append(held() - before)
            yield frame[None]

    encode(chunks(), tmp_path / "video", VIDEO[output_format], 16, COUNT)
    assert len(most) == COUNT and max(most) <= (COUNT * bytes_per_pixel + 16) * HEIGHT * WIDTH


def test_gif_keeps_frames_and_roughly_colours(tmp_path):
    frames, _ = of_animation(written(tmp_path, "gif"))
    assert psnr(frames) > 26  # 28.8 measured, with 256 colours


@pytest.mark.parametrize(("fps", "shown"), [(1, 1000), (10, 100), (16, 60), (25, 40), (50, 20), (120, 20)])
def test_gif_shows_a_frame_for_hundredths_of_a_second_and_never_less_than_two(tmp_path, fps, shown):
    _, durations = of_animation(written(tmp_path, "gif", FRAMES[:5], fps))
    assert durations == [shown] * 5


@pytest.mark.parametrize("output_format", ["webp", "gif"])
def test_a_scene_that_stands_still_for_a_while_lasts_as_long_as_any(tmp_path, output_format):
    scene = FRAMES[[0, 0, 0, 0, 5, 6, 6, 6, 6]]
    _, durations = of_animation(written(tmp_path, output_format, scene, fps=10))
    assert sum(durations) == 900


@pytest.mark.parametrize("output_format", ["webp", "gif"])
def test_animations_repeat_for_ever(tmp_path, output_format):
    with Image.open(written(tmp_path, output_format)) as image:
        assert image.info["loop"] == 0


def test_png_is_a_zip_of_the_very_frames_in_order(tmp_path):
    with zipfile.ZipFile(written(tmp_path, "png")) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{number:05}.png" for number in range(COUNT)]
        frames = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert np.array_equal(frames, FRAMES)


def test_a_single_image_is_the_very_frame(tmp_path):
    encode([FRAMES[:1]], tmp_path / "image.png", IMAGE, 16, 1)
    with Image.open(tmp_path / "image.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image), FRAMES[0])


# All of them


SPLITS = pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [1, 4, 4], [8, 1], [3, 0, 6]], ids=str)
EVERY_FORMAT = pytest.mark.parametrize("output_format", VIDEO)


def in_chunks(sizes: list[int]):
    return (FRAMES[start:end] for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)))


@EVERY_FORMAT
@SPLITS
def test_frames_in_chunks_of_any_split_give_the_same_bytes(tmp_path, output_format, sizes):
    whole = written(tmp_path, output_format, FRAMES[:9]).read_bytes()
    encode(in_chunks(sizes), tmp_path / "chunks", VIDEO[output_format], 16, sum(sizes))
    assert (tmp_path / "chunks").read_bytes() == whole


@EVERY_FORMAT
def test_frames_need_not_be_contiguous_in_memory(tmp_path, output_format):
    whole = written(tmp_path, output_format, FRAMES[:5]).read_bytes()
    assert written(tmp_path, output_format, channels_first(FRAMES[:5])).read_bytes() == whole


def channels_first(frames: np.ndarray) -> np.ndarray:
    """The same frames as a view of [count, 3, height, width], as a VAE leaves them."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


@EVERY_FORMAT
def test_the_same_frames_give_the_same_file(tmp_path, output_format):
    """Whatever lies in memory: x264 with macroblock-tree reads some that nobody wrote."""
    random = np.random.default_rng(0)
    count, tries = (17, 5) if output_format == "mp4" else (5, 2)  # noise takes the other formats long
    noisy = moving_pattern(count, 192, 320) // 2 + random.integers(0, 12, (count, 192, 320, 3), np.uint8)
    files = set()
    for _ in range(tries):
        in_the_way = [random.integers(0, 255, size, np.uint8) for size in random.integers(1, 300_000, 20)]
        files.add(written(tmp_path, output_format, noisy).read_bytes())
        del in_the_way
    assert len(files) == 1


def test_an_mp4_does_not_depend_on_what_lay_in_memory():
    """glibc fills what it allocates with MALLOC_PERTURB_; other libraries take no notice."""
    lines = [
        "import hashlib, pathlib, sys, tempfile",
        "from tests.worker.test_video import moving_pattern, written",
        "with tempfile.TemporaryDirectory() as folder:",
        "    file = written(pathlib.Path(folder), 'mp4', moving_pattern(9, 480, 832))",
        "    print(hashlib.sha256(file.read_bytes()).hexdigest())",
    ]
    made = set()
    for filled_with in ("1", "85", "170", "255"):
        environment = os.environ | {"MALLOC_PERTURB_": filled_with, "MALLOC_MMAP_THRESHOLD_": str(2**30)}
        made.add(subprocess.check_output([sys.executable, "-c", "\n".join(lines)], env=environment, text=True, cwd=ROOT))
    assert len(made) == 1


@EVERY_FORMAT
@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 208)])
def test_every_size_that_a_model_makes_can_be_written(tmp_path, output_format, height, width):
    assert written(tmp_path, output_format, moving_pattern(5, height, width)).stat().st_size > 100


@EVERY_FORMAT
def test_an_error_of_the_stream_is_passed_on(tmp_path, output_format):
    def breaking_off():
        yield FRAMES[:2]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        encode(breaking_off(), tmp_path / "video", VIDEO[output_format], 16, 9)


@pytest.mark.parametrize(
    ("output_format", "suffix", "content_type", "head"),
    [
        ("mp4", ".mp4", "video/mp4", b"ftyp"),
        ("webp", ".webp", "image/webp", b"WEBP"),
        ("gif", ".gif", "image/gif", b"GIF8"),
        ("png", ".zip", "application/zip", b"PK\3\4"),
    ],
)
def test_the_name_and_content_type_say_what_is_in_the_file(tmp_path, output_format, suffix, content_type, head):
    assert (VIDEO[output_format].suffix, VIDEO[output_format].content_type) == (suffix, content_type)
    assert head in written(tmp_path, output_format, FRAMES[:5]).read_bytes()[:16]
