import base64
import io
import re
import struct
import zlib
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from worker.errors import Code, WorkerError
from worker.image_decode import MAX_PIXELS, Allowance, decode
from worker.images import load_control_image

RED, BLUE, HALF_RED = (255, 0, 0), (0, 0, 255), (128, 0, 0)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture() -> Image.Image:
    """24x16, red on the left and blue on the right."""
    image = Image.new("RGB", (24, 16), RED)
    image.paste(BLUE, (12, 0, 24, 16))
    return image


PNG = encoded(picture()) + bytes(range(256))  # what follows the image does no harm, and is every base64 character
PNG += b"\0" * (1 - len(PNG) % 3)  # a length that needs padding
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture
def load(stop):
    def load(source: str, max_bytes: int = 1_000_000) -> Image.Image:
        return load_control_image(source, "documented", ["prompts[0].ctrl_img"], Allowance(), max_bytes, stop, private=True)

    return load


def is_picture(image: Image.Image) -> bool:
    return image.mode == "RGB" and image.tobytes() == picture().tobytes()


# Where it comes from


def test_a_url_is_downloaded(load, web):
    assert is_picture(load(web.gives("/i.png", PNG)))


@pytest.mark.parametrize(
    "source",
    [
        BASE64,
        f"  {BASE64}\n",
        base64.encodebytes(PNG).decode(),
        base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
        base64.urlsafe_b64encode(PNG).decode(),
        BASE64.rstrip("="),
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/PNG;BASE64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:image/png; base64, {BASE64}",
        f"data:image/png;base64;charset=utf-8,{BASE64}",
        f"data:image/png;charset=x;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}",
        f"data:image/png;base64,{quote(BASE64, safe='')}",
        f"data:image/png,{quote_from_bytes(PNG, safe='')}",
    ],
    ids=[
        *["base64", "spaces around", "lines", "windows lines", "url-safe", "no padding"],
        *[
            "data url",
            "capitals",
            "no type",
            "data spaces",
            "charset behind",
            "data url-safe",
            "data percent base64",
            "data percent",
        ],
    ],
)
def test_every_way_to_write_an_image_as_text_gives_the_same_image(load, source):
    assert {"+", "/", "="} < set(BASE64)
    assert is_picture(load(source))


@given(st.binary(min_size=1, max_size=60))
def test_padding_is_never_needed(data):
    """Whatever the length, the bytes are found again: here behind an image, where they do no harm."""
    text = base64.b64encode(PNG + data).decode().rstrip("=")
    assert is_picture(load_control_image(text, "documented", [], Allowance(), 1_000_000, None))  # type: ignore[arg-type]


# What comes out


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_lossless_formats_keep_their_pixels(format):
    assert is_picture(decode(encoded(picture(), format, **({"lossless": True} if format == "WEBP" else {}))))


def test_a_jpeg_is_decoded():
    image = decode(encoded(picture(), "JPEG", quality=95))
    assert np.abs(np.asarray(image, int)[:, 4] - RED).max() < 8


@pytest.mark.parametrize("format", ["AVIF", "PPM", "TGA", "MPO"])
def test_rarer_formats_are_decoded(format):
    image = picture().resize((32, 32), Image.Resampling.NEAREST)
    decoded = np.asarray(decode(encoded(image, format, quality=95, sizes=[(32, 32)])), int)
    assert np.abs(decoded[:, 6] - RED).max() < 8 and np.abs(decoded[:, 25] - BLUE).max() < 8


@pytest.mark.parametrize(
    ("orientation", "size", "red_side"),
    [
        (1, (24, 16), "left"),
        (2, (24, 16), "right"),
        (3, (24, 16), "right"),
        (4, (24, 16), "left"),
        (5, (16, 24), "top"),
        (6, (16, 24), "top"),
        (7, (16, 24), "bottom"),
        (8, (16, 24), "bottom"),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_photo_is_turned_upright(orientation, size, red_side, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(picture(), format, exif=exif))
    assert image.size == size
    place = {"left": (2, 8), "right": (21, 8), "top": (8, 2), "bottom": (8, 21)}[red_side]
    assert image.getpixel(place)[0] > 200  # type: ignore[index]


@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no tags", b""])
def test_a_photo_with_a_broken_exif_is_taken_as_it_is_stored(broken):
    photo = encoded(picture(), "JPEG", quality=95)
    photo = photo[:2] + b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken + photo[2:]
    assert decode(photo).tobytes() == decode(encoded(picture(), "JPEG", quality=95)).tobytes()


@pytest.mark.parametrize(
    ("mode", "color", "made"),
    [("RGBA", (255, 0, 0, 128), HALF_RED), ("RGBA", (255, 255, 255, 0), (0, 0, 0)), ("LA", (200, 128), (100, 100, 100))],
)
def test_transparency_is_flattened_on_black(mode, color, made):
    assert decode(encoded(Image.new(mode, (4, 4), color))).getpixel((0, 0)) == made


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_the_transparent_color_of_a_palette_is_flattened_on_black(format):
    image = picture().quantize(2)
    transparent = image.getpixel((0, 0))
    flat = decode(encoded(image, format, transparency=transparent))
    assert (flat.getpixel((0, 0)), flat.getpixel((20, 0))) == ((0, 0, 0), BLUE)


def test_a_transparent_color_without_a_palette_is_flattened_on_black():
    flat = decode(encoded(picture(), transparency=RED))
    assert (flat.getpixel((0, 0)), flat.getpixel((20, 0))) == ((0, 0, 0), BLUE)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    red, blue = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(red, format, save_all=True, append_images=[blue, red], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert decode(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize(
    ("image", "made"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (picture().quantize(2), RED),
    ],
    ids=["CMYK", "gray", "bilevel", "palette"],
)
def test_every_color_mode_becomes_rgb(image, made):
    decoded = decode(encoded(image, "TIFF"))
    assert (decoded.mode, decoded.getpixel((0, 0))) == ("RGB", made)


def test_a_cmyk_jpeg_is_not_inverted():
    assert decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8)) == RED


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("gray", "made"), [(0, 0), (257, 1), (0x8080, 128), (0xFFFF, 255)])
def test_sixteen_bits_of_gray_are_scaled_to_eight(format, gray, made):
    image = decode(encoded(Image.fromarray(np.full((8, 8), gray, np.uint16)), format))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (made, made, made))


def test_sixteen_bits_of_gray_in_a_pgm_are_scaled_to_eight():
    image = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    assert decode(encoded(image, "PPM")).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("end", [b"", b"\xff"], ids=["no end", "half an end"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_a_jpeg_that_lacks_nothing_but_its_end_is_taken(end, options):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, "JPEG", **options)
    whole = file.getvalue()
    assert decode(whole.removesuffix(b"\xff\xd9") + end) == decode(whole)


# What is refused


def failure(load, source: str, **options) -> str:
    with pytest.raises(WorkerError) as caught:
        load(source, **options)
    [problem] = caught.value.problems
    assert (problem.code, problem.field) == (Code.CONTROL_IMAGE_INVALID, "prompts[0].ctrl_img")
    return problem.text


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
NOISE = encoded(Image.effect_noise((64, 64), 80).convert("RGB"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"<!DOCTYPE html><html></html>", "web page or SVG", id="html"),
        pytest.param(b"\n <html>", "web page or SVG", id="html after a line"),
        pytest.param(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "web page or SVG", id="svg"),
        pytest.param(b'<?xml version="1.0"?><svg/>', "web page or SVG", id="xml"),
        pytest.param(NOISE[: len(NOISE) // 2], "cut short", id="half a png"),
        pytest.param(NOISE[:20], "cut short", id="head of a png"),
        pytest.param(JPEG[: len(JPEG) // 2], "cut short", id="half a jpeg"),
        pytest.param(JPEG[:-6], "cut short", id="a jpeg without its last pixels"),
        pytest.param(b"\0" * 100, "not an image that can be read", id="zeros"),
        pytest.param(b"just a text", "not an image that can be read", id="text"),
        pytest.param(b"\0\0\0\x20ftypisom" + b"\0" * 60, "it is a video, which is not read here; save it as PNG", id="mp4"),
        pytest.param(b"\x1a\x45\xdf\xa3" + b"\0" * 60, "it is a video", id="webm"),
        pytest.param(b"\0\0\0\x18ftypheic" + b"\0" * 60, "it is a HEIC photo", id="heic"),
        pytest.param(b"\0\0\0\x18ftypmif1" + b"\0" * 60, "it is a HEIC photo", id="heif"),
        pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n", "it is a JPEG XL image", id="jpeg xl"),
        pytest.param(b"%PDF-1.7\n", "it is a PDF", id="pdf"),
    ],
)
def test_what_is_no_image_says_what_it_is(load, data, says):
    assert says in failure(load, as_text(data))


@pytest.mark.parametrize("source", ["data:image/png;base64,", "data:,", "  "])
def test_no_bytes_are_no_image(load, source):
    assert failure(load, source) == "it is empty; send a PNG, JPEG or WebP image"


def test_a_url_of_an_empty_file_is_no_image(load, web):
    assert "it is empty" in failure(load, web.gives("/i.png", b""))


def test_an_image_that_several_prompts_name_is_told_for_each(stop):
    fields = ["prompts[0].ctrl_img", "prompts[2].ctrl_img_1"]
    with pytest.raises(WorkerError) as caught:
        load_control_image("****", "documented", fields, Allowance(), 1_000_000, stop)
    assert [problem.field for problem in caught.value.problems] == fields


def test_an_svg_in_a_data_url_is_told_as_such(load):
    assert "SVG" in failure(load, "data:image/svg+xml,%3Csvg%20xmlns='http://www.w3.org/2000/svg'/%3E")


@pytest.mark.parametrize("source", ["first_frame.png", "/images/i.png", "ftp://example.com/i.png", "bild_ä", "****", "abcde"])
def test_text_that_is_no_base64_says_what_is_taken(load, source):
    text = failure(load, source)
    assert text == "it is neither an http(s) URL nor base64 nor a data URL; send one of them"


def test_a_data_url_without_a_comma_is_told(load):
    assert "no comma" in failure(load, "data:image/png;base64")


@pytest.mark.parametrize(
    ("path", "says"),
    [("/missing?sig=S3cr3t", "answered 404"), ("/page?sig=S3cr3t", "web page"), ("/large?sig=S3cr3t", "larger")],
)
def test_a_url_that_gives_no_image_says_why_and_not_from_where(load, web, path, says):
    web.gives("/page?sig=S3cr3t", b"<html>")
    web.gives("/large?sig=S3cr3t", b"x" * 2000)
    text = failure(load, web.url(path), max_bytes=1000)
    assert says in text
    assert "S3cr3t" not in text and "127.0.0.1" not in text


def test_an_address_that_is_not_public_is_told_with_the_rule(web, stop):
    with pytest.raises(WorkerError, match=r"^CONTROL_IMAGE_INVALID: `f`: .* the address is not public; use a public one"):
        load_control_image(web.gives("/i.png", PNG), "documented", ["f"], Allowance(), 1_000_000, stop)
    assert not web.requests


def test_too_many_pixels_are_refused_with_their_number(load):
    data = encoded(Image.new("1", (8001, 8000)))
    assert 8001 * 8000 > MAX_PIXELS > 4096 * 4096
    assert failure(load, as_text(data)) == "the image has 8001x8000 pixels, more than 64 million; shrink it"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_decompression_bomb_is_refused_by_its_header(load):
    header = chunk(b"IHDR", struct.pack(">II", 50_000, 50_000) + b"\1\0\0\0\0")
    data = PNG[:8] + header + chunk(b"IDAT", zlib.compress(b"\0"))
    assert failure(load, as_text(data)) == "the image has too many pixels, more than 64 million; shrink it"


def test_a_broken_file_of_a_rarer_format_is_no_image(load):
    data = encoded(picture(), "AVIF")
    content = data.index(b"mdat") + 4
    assert "not an image" in failure(load, as_text(data[:content] + bytes(len(data) - content)))


@pytest.mark.parametrize("format", ["DDS", "EPS", "ICO", "PCX", "SGI"])
def test_a_format_that_is_not_on_the_list_is_no_image(load, format):
    data = encoded(picture(), format)
    assert Image.open(io.BytesIO(data)).format == format
    assert re.search("not an image|is not read here", failure(load, as_text(data)))


@pytest.mark.parametrize("after", [b"", b"\xff\xda" * 1000], ids=["as it is", "with a film behind it"])
def test_a_progressive_jpeg_is_decoded(after):
    photo = encoded(picture(), "JPEG", quality=95, progressive=True)
    assert photo.count(b"\xff\xda") > 1
    assert decode(photo + after).tobytes() == decode(photo).tobytes()


@pytest.mark.parametrize("format", ["BMP", "PPM"])
def test_what_pillow_would_decode_in_python_is_refused_with_the_remedy(format):
    image = {
        "BMP": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 1078, 40, 4, 4, 1, 8, 1, 4, 0, 0, 256, 0)
        + bytes(1024)
        + b"\0\1",
        "PPM": b"P3\n2 2\n255\n" + b"1 2 3 " * 4,
    }
    with pytest.raises(ValueError, match="takes too long to decode; save it anew as PNG"):
        decode(image[format])


def test_an_eps_is_not_given_to_ghostscript(load, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append("gs"))
    assert "PostScript" in failure(load, as_text(encoded(picture(), "EPS")))
    assert not started


@pytest.mark.parametrize("data", [b"P6\n4\0 4\n255\n" + bytes(48), PNG[:8] + chunk(b"IHDR", b"12345")], ids=["ppm", "png"])
def test_a_broken_header_is_told_in_the_same_words_as_any_broken_image(load, data):
    assert "not an image" in failure(load, as_text(data))


@given(st.data())
def test_a_damaged_image_gives_an_image_or_a_text(data):
    damaged = bytearray(data.draw(st.sampled_from([PNG, JPEG, encoded(picture(), "WEBP"), encoded(picture(), "GIF")])))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        outcome = decode(bytes(damaged)).mode
    except ValueError as error:
        outcome = str(error)
    assert outcome == "RGB" or " " in outcome


# As the trainer's samples see it


def test_in_preview_an_image_is_taken_as_it_is_stored():
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encoded(picture(), "PNG", exif=exif)
    assert decode(rotated, "preview").tobytes() == picture().tobytes() != decode(rotated).tobytes()
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(red, "PNG"), "preview").getpixel((0, 0)) == (255, 0, 0)
    assert decode(encoded(red, "PNG")).getpixel((0, 0)) == (0, 0, 0)


def test_the_images_of_a_job_have_so_many_pixels_together():
    allowance = Allowance(2 * picture().width * picture().height)
    for _ in range(2):
        decode(PNG, allowance=allowance)
    with pytest.raises(ValueError, match="the job's images have more than 256 million pixels together"):
        decode(PNG, allowance=allowance)
