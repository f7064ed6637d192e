"""Numbers, verdicts and sheets for two videos, on files that the worker's encoders wrote."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.causes import likely_causes, to_check
from tools.compare import differing, main
from tools.frames import read_clip
from tools.metrics import block_means, correlation, distance, luma, psnr_of, ssim
from tools.sheet import gain_for
from worker.video import VIDEO, encode

COUNT, HEIGHT, WIDTH = 5, 96, 160
SETTINGS = {"match": "preview", "seed": 42, "shift": 5.0, "loras": [{"sha256": "ab", "network_multiplier": 1.0}]}


def scene(shift: int = 0, count: int = COUNT, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A ball over hills under a sky, with grain; it moves. uint8 [count, height, width, 3]."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width]
    grain = np.random.default_rng(1).normal(0, 3, (height, width, 1))
    sky = np.stack([120 + y / 2, 150 + y / 2, 210 - y / 4], axis=-1)
    hills = np.stack([60 + 20 * np.sin(x / 9), 110 + 20 * np.sin(x / 9), 50 + 0 * x], axis=-1)
    picture = np.where((y > 60 + 10 * np.sin((x + shift) / 20))[..., None], hills, sky)
    ball = ((x - 40 - shift - 6 * t) ** 2 + (y - 40) ** 2 < 400)[..., None]
    return np.clip(np.where(ball, [210, 80, 60], picture) + grain, 0, 255).round().astype(np.uint8)


FRAMES = scene()


def written(folder: Path, output_format: str, frames: np.ndarray = FRAMES, name: str = "a", comment: str = "") -> Path:
    target = folder / f"{name}{VIDEO[output_format].suffix}"
    encode([frames], target, VIDEO[output_format], 16, len(frames), comment)
    return target


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status != 2, err
    return status, json.loads(out)


# the numbers


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The definition of Wang et al. 2004, window by window."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq, cov = ((window * d).sum() for d in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq)))
            c1, c2 = 6.5025, 58.5225
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_is_the_published_formula():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 255, (24, 30))
    b = np.clip(a + rng.normal(0, 40, a.shape), 0, 255)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    assert ssim(a, 255 - a) == pytest.approx(slow_ssim(a, 255 - a), abs=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (100, 110), (0, 0)])
def test_ssim_of_flat_frames_is_that_of_their_means(low, high):
    flat = (2 * low * high + 6.5025) / (low**2 + high**2 + 6.5025)
    assert ssim(np.full((16, 16), float(low)), np.full((16, 16), float(high))) == pytest.approx(flat)


def test_ssim_is_1_for_equal_frames_and_the_same_both_ways():
    a, b = luma(FRAMES[0]), luma(FRAMES[3])
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert ssim(a, b) < 0.98


@pytest.mark.parametrize(("levels", "psnr"), [(1, 48.1308), (2, 42.1102), (255, 0.0)])
def test_psnr_of_an_even_difference(levels, psnr):
    a = np.zeros((16, 16, 3), np.uint8)
    assert distance(a, a + np.uint8(levels)).psnr == pytest.approx(psnr, abs=1e-3)
    assert math.isinf(psnr_of(0))


def test_block_means_and_likeness_look_at_where_bright_and_dark_are():
    assert block_means(FRAMES[0]).shape == (HEIGHT // 8, WIDTH // 8, 3)
    coarse = luma(block_means(FRAMES[0]))
    assert correlation(coarse, coarse / 2 + 20) == pytest.approx(1)
    assert correlation(coarse, 255 - coarse) == pytest.approx(-1)
    assert correlation(coarse, np.full_like(coarse, 9)) == 0


# the verdict


def test_the_same_file_is_identical(tmp_path, capsys):
    file = written(tmp_path, "mp4")
    status, found = report(capsys, file, file)
    assert (status, found["verdict"]["code"], found["psnr"], found["ssim"]) == (0, "identical", None, 1.0)
    assert [frame["psnr"] for frame in found["frames"]] == [None] * COUNT


@pytest.mark.parametrize(("one", "other"), [("mp4", "png"), ("webp", "png"), ("mp4", "webp"), ("gif", "png"), ("gif", "mp4")])
def test_one_video_in_two_formats_is_equal_within_encoding_noise(one, other, tmp_path, capsys):
    status, found = report(capsys, written(tmp_path, one), written(tmp_path, other))
    assert (status, found["verdict"]["code"]) == (0, "encoding_noise")


@pytest.mark.parametrize("output_format", ["mp4", "webp", "gif"])
def test_encoding_noise_is_measured_on_the_videos_themselves(output_format, tmp_path, capsys):
    """Saturated waves, which codecs change more than ten times as much as calm pictures."""
    t, y, x = np.mgrid[0:COUNT, 0:HEIGHT, 0:WIDTH]
    waves = np.stack([np.sin(x / 7 + t), np.sin(y / 5 + t), np.cos((x + y) / 9)], axis=-1)
    frames = np.round(127.5 + 120 * waves).astype(np.uint8)
    _, found = report(capsys, written(tmp_path, output_format, frames), written(tmp_path, "png", frames))
    assert found["verdict"]["code"] == "encoding_noise"


def test_frames_of_odd_sizes_are_compared_too(tmp_path, capsys):
    odd = FRAMES[:, :95, :159]
    Image.fromarray(odd[0]).save(tmp_path / "a.png")
    Image.fromarray(odd[0]).save(tmp_path / "b.jpg", quality=90)
    assert report(capsys, tmp_path / "a.png", tmp_path / "b.jpg")[1]["verdict"]["code"] == "encoding_noise"
    small = read_clip(tmp_path / "b.jpg").frames[:, :11, :11]
    Image.fromarray(small[0]).save(tmp_path / "small.png")
    report(capsys, tmp_path / "small.png", written(tmp_path, "mp4"))


def test_rounding_is_noise_even_without_loss(tmp_path, capsys):
    nearly = FRAMES + np.random.default_rng(2).integers(0, 2, FRAMES.shape, np.uint8) * (FRAMES < 255)
    _, found = report(capsys, written(tmp_path, "png"), written(tmp_path, "png", nearly.astype(np.uint8), "b"))
    assert (found["verdict"]["code"], found["max_difference"]) == ("encoding_noise", 1)


@pytest.mark.parametrize(
    "redrawn",
    [
        pytest.param(scene(shift=5), id="moved by 3%"),
        pytest.param(np.clip((FRAMES.astype(int) - 128) * 1.2 + 128, 0, 255).astype(np.uint8), id="more contrast"),
        pytest.param(np.clip(FRAMES + 6, 0, 255).astype(np.uint8), id="brighter"),
    ],
)
def test_the_same_scene_drawn_in_another_way_is_recognised(redrawn, tmp_path, capsys):
    status, found = report(capsys, written(tmp_path, "mp4"), written(tmp_path, "mp4", redrawn, "b"))
    assert (status, found["verdict"]["code"]) == (1, "same_scene")


def test_one_odd_frame_is_enough(tmp_path, capsys):
    odd = FRAMES.copy()
    odd[3] = scene(shift=5)[3]
    assert report(capsys, written(tmp_path, "mp4"), written(tmp_path, "mp4", odd, "b"))[0] == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(FRAMES[:, ::-1].copy(), id="upside down"),
        pytest.param(255 - FRAMES, id="negative"),
        pytest.param(np.zeros_like(FRAMES), id="black"),
        pytest.param(np.random.default_rng(3).integers(0, 256, FRAMES.shape, np.uint8), id="noise"),
    ],
)
def test_another_picture_is_different(other, tmp_path, capsys):
    status, found = report(capsys, written(tmp_path, "mp4"), written(tmp_path, "png", other, "b"))
    assert (status, found["verdict"]["code"]) == (1, "different")


def test_black_and_white_are_different(tmp_path, capsys):
    black = np.zeros_like(FRAMES)
    _, found = report(capsys, written(tmp_path, "png", black), written(tmp_path, "png", black + 255, "b"))
    assert found["verdict"]["code"] == "different"


def test_other_sizes_and_counts_are_reported_and_the_common_part_is_compared(tmp_path, capsys):
    a, b = written(tmp_path, "png"), written(tmp_path, "png", FRAMES[:3, :80, :144], "b")
    status, found = report(capsys, a, b)
    assert (status, found["equal"], found["verdict"]["code"], len(found["frames"])) == (1, False, "identical", 3)
    assert found["uncommon"] == [
        "A is 160x96 and B is 144x80 pixels; compared: the 144x80 at the top left",
        "A has 5 frames and B has 3; compared: the first 3",
    ]
    main([str(a), str(b)])
    assert capsys.readouterr().out.rstrip().endswith("(in the part that both have)")


# what can be read


def test_mp4_is_decoded_with_its_own_colours(tmp_path):
    frames = read_clip(written(tmp_path, "mp4")).frames
    assert distance(frames[0], FRAMES[0]).coarse < 1.5


def test_every_kind_of_source_gives_the_same_frames(tmp_path):
    archive = written(tmp_path, "png")
    folder = tmp_path / "frames"
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    (folder / "notes.txt").write_text("no image")
    for source in (archive, folder):
        clip = read_clip(source)
        assert (clip.kind, clip.fps) == ("png", None)
        assert np.array_equal(clip.frames, FRAMES)
    assert np.array_equal(read_clip(folder / "00002.png").frames, FRAMES[2:3])


def test_the_content_of_a_file_decides_its_format(tmp_path):
    misnamed = written(tmp_path, "webp").rename(tmp_path / "preview.jpg")
    clip = read_clip(misnamed)
    assert (clip.kind, len(clip.frames), round(clip.fps or 0)) == ("webp", COUNT, 16)


def test_images_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    assert read_clip(tmp_path).frames[:, 0, 0, 0].tolist() == [1, 9, 10]


@pytest.mark.parametrize("output_format", ["webp", "gif"])
def test_equal_frames_that_are_stored_as_one_are_counted_as_shown(output_format, tmp_path):
    still = FRAMES[[0, 1, 1, 1, 2]]
    assert len(read_clip(written(tmp_path, output_format, still)).frames) == 5


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04cut", b"\0\0\0 ftypisom cut"])
def test_a_file_that_cannot_be_read_is_one_line_on_stderr(content, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(content)
    assert main([str(bad), str(bad)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_files_empty_folders_and_tiny_frames_are_bad_input(tmp_path, capsys):
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    (tmp_path / "empty").mkdir()
    for name, words in (("none.mp4", "No such file"), ("empty", "no image"), ("small.png", "11x11")):
        assert main([str(tmp_path / name), str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


# the settings


def test_settings_of_two_mp4s_are_compared(tmp_path, capsys):
    other = SETTINGS | {"shift": 3.0, "loras": [{"sha256": "ab", "network_multiplier": 0.8}], "dtype": "float32"}
    a = written(tmp_path, "mp4", comment=json.dumps(SETTINGS | {"prompt_index": 0}))
    b = written(tmp_path, "mp4", name="b", comment=json.dumps(other | {"prompt_index": 1}))
    _, found = report(capsys, a, b)
    assert found["settings"] == {
        "shift": {"a": 5.0, "b": 3.0},
        "loras[0].network_multiplier": {"a": 1.0, "b": 0.8},
        "dtype": {"a": None, "b": "float32"},
    }
    main([str(a), str(b)])
    assert "loras[0].network_multiplier  1.0  0.8" in capsys.readouterr().out


@pytest.mark.parametrize("wrapped", [False, True])
def test_settings_are_taken_from_a_result_too(wrapped, tmp_path, capsys):
    common = {name: value for name, value in SETTINGS.items() if name != "seed"}
    result = {"outputs": {}, "settings": common | {"prompts": [{"seed": 42}, {"seed": 43}]}}
    (tmp_path / "r.json").write_text(json.dumps({"id": "x", "output": result} if wrapped else result))
    a, b = written(tmp_path, "mp4", comment=json.dumps(SETTINGS)), written(tmp_path, "webp")
    assert report(capsys, a, b)[1]["settings"] is None
    assert report(capsys, a, b, "--settings-b", tmp_path / "r.json")[1]["settings"] == {}
    _, found = report(capsys, a, b, "--settings-b", tmp_path / "r.json", "--prompt", 1)
    assert found["settings"] == {"seed": {"a": 42, "b": 43}}
    assert main([str(a), str(b), "--settings-b", str(tmp_path / "r.json"), "--prompt", "2"]) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"error": "no"}'])
def test_a_result_without_settings_is_bad_input(text, tmp_path, capsys):
    (tmp_path / "r.json").write_text(text)
    file = written(tmp_path, "webp")
    assert main([str(file), str(file), "--settings-a", str(tmp_path / "r.json")]) == 2
    assert "r.json" in capsys.readouterr().err


def test_equal_settings_differ_in_nothing():
    assert differing(SETTINGS, json.loads(json.dumps(SETTINGS))) == {}


# the contact sheet


def test_the_sheet_shows_a_b_and_their_amplified_difference(tmp_path, capsys):
    changed = FRAMES.copy()
    changed[:, :, :80] = np.clip(changed[:, :, :80].astype(int) + 3, 0, 255)
    sheet = tmp_path / "sheet.png"
    report(capsys, written(tmp_path, "png"), written(tmp_path, "png", changed, "b"), "--sheet", sheet, "--rows", 3)
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (20 + 92 + 3 * 250 - 10 + 20, 40 + 132 + 3 * 400 + 20, 3)
    first_row = pixels[112:352]
    a, b, difference = (first_row[:, 152 + 410 * column : 552 + 410 * column] for column in range(3))
    assert (b[:, :180] - a[:, :180]).mean() == pytest.approx(3, abs=0.2)
    assert difference[:, 220:].max() == 0
    assert difference[:, :180].mean() == pytest.approx(3 * 64, abs=5)


def test_the_difference_is_amplified_without_clipping():
    assert gain_for([np.full((8, 8, 3), 3)]) == 64
    assert gain_for([np.full((8, 8, 3), 100)]) == 2
    assert gain_for([np.zeros((8, 8, 3))]) == 1


def test_a_jpeg_sample_of_the_trainer_is_equal_within_encoding_noise(tmp_path, capsys):
    """Which it saves for one frame, in Pillow's own quality."""
    frame = scene()[0]
    Image.fromarray(frame).save(tmp_path / "sample.jpg")
    Image.fromarray(frame).save(tmp_path / "mine.png")
    assert main([str(tmp_path / "sample.jpg"), str(tmp_path / "mine.png")]) == 0
    assert "equal within encoding noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"seed": 2}, "differs as another seed does (mean 54 to 56 of 255): seed"),
        (
            {"trained_with": {"quantize": True}},
            "differs as a quantized training does (mean 3 to 5 of 255): trained_with.quantize",
        ),
        ({"quantize": "uint4"}, "differs as a quantized training does (mean 3 to 5 of 255): quantize"),
        ({"decodes_in_tiles": True}, "differs as tiles do (mean 9 of 255): decodes_in_tiles"),
        ({"loras": [{"sha256": "b"}]}, "differs as another LoRA, or another step of it, does: loras[0].sha256"),
        ({"dtype": "b"}, "differs as another machine or library does (mean 0.8 to 1.6, in bf16, of 255): dtype"),
    ],
)
def test_the_cause_of_a_difference_is_named_from_the_settings(changed, cause):
    base = {"seed": 1, "decodes_in_tiles": False, "loras": [{"sha256": "a"}], "versions": {"torch": "1"}, "trained_with": None}
    base |= {"quantize": None}
    found = likely_causes(differing(base, base | changed))
    assert cause in found


def test_several_causes_come_in_the_order_of_their_size():
    found = likely_causes(differing({"dtype": "a", "seed": 1}, {"dtype": "b", "seed": 2}))
    assert [line.split(" does")[0] for line in found] == ["differs as another seed", "differs as another machine or library"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"match": "documented"}, "B was made as the model page says; the trainer's samples need `match`: preview"),
        ({"match": "preview", "trained_with": None}, "it is not known to B how the training ran"),
    ],
)
def test_beside_a_sample_without_settings_it_says_what_to_look_at(settings, says):
    assert says in next(to_check(settings, "B"))
