import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.worker.test_video import FRAMES, HEIGHT, WIDTH, moving_pattern, psnr
from worker.pictures import Camera, Picture, contact_sheet, poster, scaled

COUNTS = st.integers(1, 250).map(lambda n: 4 * n + 1)
SIZES = st.integers(64, 4096)


def taken(folder, picture: Picture, chunks) -> np.ndarray:
    camera = Camera([picture])
    for _ in camera.watch(chunks):
        pass
    camera.save(picture, folder / "picture.jpg")
    with Image.open(folder / "picture.jpg") as image:
        assert (image.format, image.size) == ("JPEG", picture.size)
        return np.asarray(image)


def test_a_poster_is_the_first_frame_at_full_size(tmp_path):
    picture = poster(WIDTH, HEIGHT)
    assert picture.size == (WIDTH, HEIGHT)
    assert psnr(taken(tmp_path, picture, [FRAMES]), FRAMES[0]) > 37  # 47.0 measured; 20.9 beside the second frame


def test_a_contact_sheet_shows_each_of_its_frames_in_its_tile_row_by_row(tmp_path):
    video = moving_pattern(17, 384, 640)
    picture = contact_sheet(640, 384, 17)
    sheet = taken(tmp_path, picture, [video])
    assert picture.frames == (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16)
    assert picture.tile == (320, 192)
    for row in range(4):
        for column in range(4):
            left, top = column * 324, row * 196
            tile = sheet[top : top + 192, left : left + 320]
            assert psnr(tile, np.asarray(scaled(video[picture.frames[4 * row + column]], (320, 192)))) > 35  # 38.6 measured
    assert sheet[192:196].max() < 80 and sheet[:, 320:324].max() < 80  # the gaps, but for what JPEG makes of edges


@given(width=SIZES, height=SIZES, count=COUNTS)
def test_a_contact_sheet_goes_evenly_from_the_first_frame_to_the_last_and_has_no_hole(width, height, count):
    picture = contact_sheet(width, height, count)
    assert len(picture.frames) == picture.columns**2 <= min(16, count)
    assert (picture.frames[0], picture.frames[-1]) == (0, count - 1)
    steps = np.diff(picture.frames)
    assert steps.min() >= 1 and np.ptp(steps) <= 1


@given(width=SIZES, height=SIZES, count=COUNTS)
def test_no_tile_is_enlarged_or_out_of_shape_and_no_sheet_is_endless(width, height, count):
    picture = contact_sheet(width, height, count)
    tile_width, tile_height = picture.tile
    assert tile_width <= min(width, 320) and tile_height <= min(height, 640)
    assert abs(tile_height - tile_width * height / width) <= max(1, height / width)
    assert picture.size[0] <= 1292 and picture.size[1] <= 2572


@pytest.mark.parametrize("sizes", [(1,) * 17, (4, 4, 9), (16, 1), (3, 0, 14)], ids=str)
def test_frames_in_chunks_of_any_split_give_the_same_picture(tmp_path, sizes):
    ends = np.cumsum(sizes)
    chunks = [FRAMES[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    picture = contact_sheet(WIDTH, HEIGHT, len(FRAMES))
    assert np.array_equal(taken(tmp_path, picture, chunks), taken(tmp_path, picture, [FRAMES]))


def test_frames_pass_untouched_and_none_is_kept():
    seen: list[weakref.ref] = []

    def chunks():
        for number in range(0, 17, 4):
            chunk = FRAMES[number : number + 4].copy()
            seen.append(weakref.ref(chunk))
            yield chunk
            del chunk

    passed = 0
    for chunk in Camera([poster(WIDTH, HEIGHT), contact_sheet(WIDTH, HEIGHT, 17)]).watch(chunks()):
        assert np.array_equal(chunk, FRAMES[passed : passed + len(chunk)])
        passed += len(chunk)
        del chunk
        gc.collect()
        assert sum(reference() is not None for reference in seen) <= 1  # the generator's own
    assert passed == 17


def test_an_error_of_a_picture_does_not_reach_the_video_and_is_told_when_it_is_saved(tmp_path):
    camera = Camera([poster(0, HEIGHT)])
    assert sum(len(chunk) for chunk in camera.watch([FRAMES])) == 17
    with pytest.raises(ValueError):
        camera.save(poster(0, HEIGHT), tmp_path / "picture.jpg")
    assert list(tmp_path.iterdir()) == []
