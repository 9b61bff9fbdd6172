"""What becomes of a client's base64: pictures as RGB, recordings as mono samples, everything else a named error."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from feature_extraction_server.core import media
from feature_extraction_server.core.errors import InvalidInput, TooLarge
from feature_extraction_server.core.image_limits import excess_of_picture
from feature_extraction_server.core.media import Audio, decode_audio, decode_base64, decode_image
from tests.conftest import encode_image
from tests.media_files import RATE_HZ, encode, png, png_chunk, recording, wav

MAX_PIXELS = 1_000_000
RED = Image.new("RGB", (40, 30), "red")
PNG = encode_image(RED)


def decoded(image: Image.Image, format: str = "PNG", **options: Any) -> Image.Image:
    return decode_image(encode_image(image, format, **options), "image", MAX_PIXELS)


def pixel(image: Image.Image) -> tuple[int, ...]:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


@pytest.fixture
def n_spread(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that has an element for each time that the process was let use all cores."""
    calls: list[None] = []
    monkeypatch.setattr(media, "spread", lambda: calls.append(None))
    return calls


# base64


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(PNG, id="standard"),
        pytest.param(PNG.rstrip("="), id="without padding"),
        pytest.param(PNG.replace("+", "-").replace("/", "_"), id="URL-safe"),
        pytest.param(PNG.replace("+", "-").replace("/", "_").rstrip("="), id="URL-safe without padding"),
        pytest.param("\n".join(PNG[i : i + 76] for i in range(0, len(PNG), 76)), id="line breaks"),
        pytest.param("\r\n".join(PNG[i : i + 64] for i in range(0, len(PNG), 64)) + "\r\n", id="CRLF line breaks"),
        pytest.param(f"  \t{PNG}\n", id="white space around"),
        pytest.param(f"data:image/png;base64,{PNG}", id="data URL"),
        pytest.param(f"DATA:IMAGE/PNG;BASE64,{PNG}", id="data URL in capitals"),
        pytest.param(f"data:;base64,{PNG}", id="data URL without a type"),
        pytest.param(f"data:image/png;name=red.png;base64,{PNG}", id="data URL with a parameter"),
        pytest.param(f"data:image/png;base64,{PNG.rstrip('=')}", id="data URL without padding"),
        pytest.param(f"\n data:image/png;base64,\n{PNG}", id="data URL with white space"),
        pytest.param(
            "data:image/png;base64," + PNG.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
            id="data URL with percent-encoding",
        ),
        pytest.param(f"data:application/octet-stream;base64,{PNG}", id="data URL of another type"),
    ],
)
def test_base64_is_read_in_all_its_spellings(text: str) -> None:
    assert decode_base64(text, "image") == base64.b64decode(PNG)


def test_both_alphabets_encode_the_same_bytes() -> None:
    data = bytes(range(256)) * 3

    assert decode_base64(base64.urlsafe_b64encode(data).decode(), "image") == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "image is empty", id="empty"),
        pytest.param("====", "image is empty", id="padding alone"),
        pytest.param("data:image/png;base64,", "image is empty", id="data URL without data"),
        pytest.param("no base64!", "image is not valid base64", id="another character"),
        pytest.param("AAAAA", "image is not valid base64", id="one character too many"),
        pytest.param("AA=A", "image is not valid base64", id="padding inside"),
        pytest.param("ÄÖÜ", "image is not valid base64", id="not ASCII"),
        pytest.param("data:image/png,abc", "image is a data URL that does not", id="data URL without base64"),
        pytest.param("data:image/png;base64", "image is a data URL that does not", id="data URL without a comma"),
        pytest.param("data:image/png;base64,%ff%fe", "image is not valid base64", id="percent-encoded rubbish"),
        pytest.param("https://example.org/a.png", "image is not valid base64", id="a web address"),
    ],
)
def test_what_is_not_base64_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        decode_base64(text, "image")

    assert caught.value.field == "image"


def test_hostile_data_url_is_refused_in_linear_time() -> None:
    with pytest.raises(InvalidInput):
        decode_base64("data:" + ";a" * 500_000, "image")


# Pictures

FORMATS = ["AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"]
FORMATS += ["TIFF", "WEBP"]


@pytest.mark.parametrize(("size", "n"), [((511, 512), 0), ((512, 512), 1)])
def test_large_pictures_are_decoded_with_all_cores_for_all_threads(
    size: tuple[int, int], n: int, n_spread: list[None]
) -> None:
    decoded(Image.new("RGB", size))

    assert len(n_spread) == n


@pytest.mark.parametrize("format", FORMATS)
def test_every_common_format_is_read(format: str) -> None:
    image = decoded(Image.new("RGB", (32, 32), (250, 0, 0)), format)

    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert np.allclose(np.asarray(image), (250, 0, 0), atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("blue", (0, 0, 8, 8))
    upright.paste("red", (24, 0, 32, 8))
    stored = {
        1: upright,
        2: ImageOps.mirror(upright),
        3: upright.rotate(180),
        4: ImageOps.flip(upright),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation

    image = decoded(stored, "PNG", exif=exif)

    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"Exif\0\0rubbish", id="rubbish"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", id="truncated"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0", id="orientation 99"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01A\0\0\0\0\0\0\0", id="orientation a text"),
    ],
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    image = decoded(RED, "JPEG", exif=exif)

    assert image.size == (40, 30)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), (255, 255, 255), id="RGBA"),
        pytest.param(encode_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))), (127, 127, 127), id="half transparent"),
        pytest.param(encode_image(Image.new("RGBA", (2, 2), (9, 8, 7, 255))), (9, 8, 7), id="RGBA, opaque"),
        pytest.param(encode_image(Image.new("LA", (2, 2), (0, 0))), (255, 255, 255), id="grey with alpha"),
        pytest.param(encode_image(Image.new("P", (2, 2)), transparency=0), (255, 255, 255), id="palette, one colour"),
        pytest.param(
            encode_image(Image.new("P", (2, 2)), transparency=b"\x80"), (127, 127, 127), id="palette, alpha values"
        ),
        pytest.param(encode_image(Image.new("P", (2, 2)), "GIF", transparency=0), (255, 255, 255), id="GIF"),
        pytest.param(
            encode_image(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)),
            (255, 255, 255),
            id="RGB, a transparent colour",
        ),
        pytest.param(encode_image(Image.new("L", (2, 2), 7), transparency=7), (255, 255, 255), id="grey, one value"),
        pytest.param(
            encode_image(Image.new("I;16", (2, 2), 7), transparency=7), (255, 255, 255), id="16 bit, one value"
        ),
        pytest.param(encode_image(Image.new("I;16", (2, 2), 32896), transparency=7), (128,) * 3, id="16 bit, another"),
        pytest.param(encode_image(Image.new("1", (2, 2), 0), transparency=0), (255, 255, 255), id="1 bit, one value"),
    ],
)
def test_transparency_lies_over_white(data: str, expected: tuple[int, ...]) -> None:
    image = decode_image(data, "image", MAX_PIXELS)

    assert image.mode == "RGB"
    assert pixel(image) == pytest.approx(expected, abs=1)


def tiff(order: str, tags: dict[int, tuple[int, ...]], pixels: bytes) -> bytes:
    """A TIFF of one grey pixel, in an order of bytes (``<`` or ``>``), with other tags than the usual ones.

    A tag's value is one number or two.
    """
    usual = {256: (1,), 257: (1,), 258: (8,), 262: (1,), 273: (8,), 277: (1,), 278: (1,), 279: (len(pixels),)}
    entries = b""
    for tag, value in sorted((usual | tags).items()):
        kind = "H" if len(value) == 2 else "I"
        entries += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(value))
        entries += struct.pack(f"{order}{len(value)}{kind}", *value)
    listed = struct.pack(f"{order}H", len(usual | tags)) + entries + bytes(4)
    return struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(pixels)) + pixels + listed


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "n_bits", "sample_format", "value", "expected"),
    [
        pytest.param("f", 32, 3, 0.5, 128, id="float"),
        pytest.param("i", 32, 2, 2**30, 128, id="32 bit"),
        pytest.param("h", 16, 2, 2**14, 64, id="16 bit, signed"),
        pytest.param("H", 16, 1, 2**15, 128, id="16 bit"),
    ],
)
def test_a_grey_tiff_of_either_order_of_bytes_keeps_its_brightness(
    order: str, kind: str, n_bits: int, sample_format: int, value: float, expected: int
) -> None:
    data = tiff(order, {258: (n_bits,), 339: (sample_format,)}, struct.pack(f"{order}{kind}", value))

    image = decode_image(encode(data), "image", MAX_PIXELS)

    assert pixel(image) == pytest.approx((expected,) * 3, abs=1)


def test_a_grey_tiff_with_premultiplied_alpha_lies_over_white() -> None:
    grey, alpha = 64, 128
    # Two samples a pixel, of which the second is alpha, by which the first was multiplied.
    tags = {258: (8, 8), 277: (2,), 338: (1,)}
    data = tiff("<", tags, bytes([grey, alpha]))

    image = decode_image(encode(data), "image", MAX_PIXELS)

    assert pixel(image) == pytest.approx((grey + 255 - alpha,) * 3, abs=1)


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        pytest.param(Image.new("I;16", (2, 2), 0), "PNG", 0, id="16 bit, black"),
        pytest.param(Image.new("I;16", (2, 2), 32896), "PNG", 128, id="16 bit, middle"),
        pytest.param(Image.new("I;16", (2, 2), 65535), "PNG", 255, id="16 bit, white"),
        pytest.param(Image.new("I;16", (2, 2), 32896), "TIFF", 128, id="16 bit TIFF"),
        pytest.param(Image.frombytes("I;16B", (1, 1), b"\x80\x80"), "TIFF", 128, id="16 bit, big-endian"),
        pytest.param(Image.new("I", (2, 2), 2**30), "TIFF", 128, id="32 bit"),
        pytest.param(Image.new("F", (2, 2), 0.5), "TIFF", 128, id="numbers up to 1"),
        pytest.param(Image.new("F", (2, 2), 77.0), "TIFF", 77, id="numbers up to 255"),
        pytest.param(Image.new("F", (2, 2), 32896.0), "TIFF", 128, id="numbers up to 65535"),
        pytest.param(Image.new("F", (2, 2), -1.0), "TIFF", 0, id="negative numbers"),
        pytest.param(Image.new("L", (2, 2), 77), "PNG", 77, id="8 bit"),
        pytest.param(Image.new("1", (2, 2), 1), "PNG", 255, id="1 bit, white"),
        pytest.param(Image.new("1", (2, 2), 0), "PNG", 0, id="1 bit, black"),
    ],
)
def test_grey_keeps_its_brightness(image: Image.Image, format: str, expected: int) -> None:
    result = decoded(image, format)

    assert result.mode == "RGB"
    assert pixel(result) == pytest.approx((expected,) * 3, abs=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(np.array([np.nan, 0.5, 1], np.float32), [0, 128, 255], id="not a number first"),
        pytest.param(np.array([0.5, np.nan, 1], np.float32), [128, 0, 255], id="not a number"),
        pytest.param(np.array([np.inf, 0.5, 1], np.float32), [0, 128, 255], id="infinite"),
        pytest.param(np.array([-np.inf, 77, 255], np.float32), [0, 77, 255], id="infinite and negative"),
        pytest.param(np.array([np.nan, np.nan, np.nan], np.float32), [0, 0, 0], id="no number at all"),
        pytest.param(np.array([-9999, 0.5, 1], np.float32), [0, 128, 255], id="negative"),
        pytest.param(np.array([-3.4e38, 0.5, 1], np.float32), [0, 128, 255], id="as negative as can be"),
        pytest.param(np.array([-1, 32896, 65535], np.int32), [0, 128, 255], id="16 bit, signed"),
        pytest.param(np.array([-(2**31), 2**30, 2**31 - 1], np.int32), [0, 128, 255], id="32 bit, signed"),
    ],
)
def test_a_few_odd_values_leave_the_others_their_brightness(values: Any, expected: list[int]) -> None:
    result = decoded(Image.fromarray(values[None]), "TIFF")

    assert np.allclose(np.asarray(result)[0, :, 0], expected, atol=1)


def test_floats_are_scaled_alike_in_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_BLOCK_VALUES", 2 * 4)
    values = np.arange(5 * 4, dtype=np.float32).reshape(5, 4)

    result = decoded(Image.fromarray(values * 100), "TIFF")

    assert np.allclose(np.asarray(result)[:, :, 0], values * 100 * 255 / 65535, atol=1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png(1, 1, 2, 0, b"\0\x40"), (85, 85, 85), id="grey of 2 bits"),
        pytest.param(png(1, 1, 4, 0, b"\0\x80"), (136, 136, 136), id="grey of 4 bits"),
        pytest.param(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 0, 32896)), (255, 0, 128), id="RGB of 16"),
        pytest.param(png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 32896, 65535)), (128, 128, 128), id="grey, alpha, 16"),
        pytest.param(png(1, 1, 4, 3, b"\0\0", png_chunk(b"PLTE", b"\x10\x20\x30")), (16, 32, 48), id="palette of 4"),
    ],
)
def test_png_of_every_depth_is_read(data: bytes, expected: tuple[int, ...]) -> None:
    assert pixel(decode_image(encode(data), "image", MAX_PIXELS)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(format: str) -> None:
    image = decoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)

    assert pixel(image) == pytest.approx((255, 0, 0), abs=4)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), "blue")]

    image = decoded(Image.new("RGB", (16, 16), "red"), format, save_all=True, append_images=frames)

    assert np.allclose(np.asarray(image), (255, 0, 0), atol=2)


def test_animated_webp_keeps_transparency_over_white() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))

    image = decoded(clear, "WEBP", save_all=True, append_images=[Image.new("RGBA", (16, 16), "blue")])

    assert pixel(image) == (255, 255, 255)


def test_image_of_as_many_pixels_as_allowed_is_read() -> None:
    image = decode_image(PNG, "image", 40 * 30)

    assert image.size == (40, 30)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode_image(RED), id="one pixel too many"),
        pytest.param(encode(png(60_000, 60_000, 8, 2, b"\0")), id="header claims 60000 x 60000"),
        pytest.param(encode_image(Image.new("RGB", (3000, 3000))), id="large and highly compressible"),
        pytest.param(
            encode(
                struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, 10**6, 22)
                + png(3000, 3000, 8, 0, bytes(3001 * 3000))
            ),
            id="large picture in an icon",
        ),
        pytest.param(encode_image(Image.new("L", (3000, 3000)), "GIF"), id="GIF"),
    ],
)
def test_too_many_pixels_are_refused_before_they_are_decoded(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 40 * 30 - 1
    load = ImageFile.ImageFile.load

    def load_if_small(image: ImageFile.ImageFile) -> Any:
        if image.width * image.height > limit:
            pytest.fail(f"{image.size} was decoded")
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_if_small)

    with pytest.raises(TooLarge, match="MAX_IMAGE_PIXELS") as caught:
        decode_image(data, "image", limit)

    assert caught.value.field == "image"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
@pytest.mark.parametrize("part", [0.95, 0.5, 0.1])
def test_truncated_image_is_refused(format: str, part: float) -> None:
    whole = base64.b64decode(encode_image(Image.effect_noise((64, 64), 50).convert("RGB"), format))

    with pytest.raises(InvalidInput, match=r"^image\[3\] is (a damaged image|not an image)") as caught:
        decode_image(encode(whole[: int(len(whole) * part)]), "image[3]", MAX_PIXELS)

    assert caught.value.field == "image[3]"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"hello", "image is not an image of a known format", id="a text"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "image is a damaged image|not an image", id="signature alone"),
        pytest.param(b"%PDF-1.7\n", "image is not an image of a known format", id="PDF"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is not an image of a known", id="SVG"),
        pytest.param(png(0, 0, 8, 2, b""), "image is a damaged image|not an image", id="no pixels"),
        pytest.param(png(2, 2, 8, 2, b"\0"), "image is a damaged image", id="pixels missing"),
    ],
)
def test_what_is_not_an_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        decode_image(encode(data), "image", MAX_PIXELS)


def test_postscript_is_refused_without_running_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("an interpreter was run"))

    with pytest.raises(InvalidInput, match="EPS"):
        decoded(RED, "EPS")


def iptc(file: bytes, size: tuple[int, int], *, layers: int) -> bytes:
    """A picture in IPTC's format: a file of any other, and what is said of it."""

    def tag(record: int, number: int, data: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(data)) + data

    width, height = (struct.pack(">I", side) for side in size)
    uncompressed = tag(3, 120, struct.pack(">I", 5))
    said = (
        tag(3, 60, bytes([layers, layers > 1]))
        + tag(3, 65, b"\x01")
        + tag(3, 20, width)
        + tag(3, 30, height)
        + uncompressed
    )
    return said + struct.pack(">BBBBBI", 0x1C, 8, 10, 128 + 4, 0, len(file)) + file + bytes(5)


@pytest.mark.parametrize(
    ("format", "layers"), [pytest.param("PNG", 3, id="smaller than said"), pytest.param("EPS", 1, id="PostScript")]
)
def test_what_holds_another_file_and_says_what_it_likes_of_it_is_refused(
    format: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("an interpreter was run"))
    held = base64.b64decode(encode_image(Image.new("L", (8, 8)), format))

    with pytest.raises(InvalidInput, match="IPTC"):
        decode_image(encode(iptc(held, (200, 200), layers=layers)), "image", MAX_PIXELS)


def test_a_picture_that_is_smaller_than_its_file_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_another(image: Image.Image) -> None:
        image.im = Image.new("RGB", (2, 2)).im

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_another)

    with pytest.raises(InvalidInput, match="holds another picture"):
        decode_image(PNG, "image", MAX_PIXELS)


# What decoding would take besides pixels


def with_segments(n: int) -> bytes:
    """A JPEG with so many segments of Exif data."""
    jpeg = base64.b64decode(encode_image(RED, "JPEG"))
    return jpeg[:2] + b"\xff\xe1\x00\x09Exif\0\0\0" * n + jpeg[2:]


def with_scans(n: int) -> bytes:
    """A progressive JPEG with so many more scans, which change nothing."""
    jpeg = base64.b64decode(encode_image(Image.effect_noise((300, 300), 50), "JPEG", progressive=True))
    return jpeg[:-2] + bytes.fromhex("ffda0008010100013f10") * n + jpeg[-2:]


def with_empty_segments(n: int) -> bytes:
    jpeg = base64.b64decode(encode_image(RED, "JPEG"))
    return jpeg[:2] + b"\xff\xe5\0\2\xff\xfe\0\2" * (n // 2) + jpeg[2:]


def with_long_frames(n: int) -> bytes:
    """A JPEG with so many more headers of frames, each of as many components as have room in it."""
    jpeg = base64.b64decode(encode_image(RED, "JPEG"))
    n_components = 21_842
    frame = struct.pack(">HHBHHB", 0xFFC0, 8 + 3 * n_components, 8, 30, 40, 3) + b"\1\x11\0" * n_components
    return jpeg[:2] + frame * n + jpeg[2:]


def jpeg_2000(
    n_tiles: int = 1, n_components: int = 1, *, side: int = 1, headers: bytes = b"", before_all: bytes = b""
) -> bytes:
    """A row of square tiles in JPEG 2000, of which only the headers are there."""

    def box(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(data), name) + data

    header = box(b"ihdr", struct.pack(">IIHBBBB", side, n_tiles * side, 3, 7, 7, 0, 0))
    header += box(b"colr", b"\1\0\0\0\0\0\x10")
    size = struct.pack(">H8IH", 0, n_tiles * side, side, 0, 0, side, side, 0, 0, n_components)
    size += b"\7\1\1" * n_components
    codestream = (
        b"\xff\x4f" + before_all + b"\xff\x51" + struct.pack(">H", 2 + len(size)) + size + headers + b"\xff\xd9"
    )
    return (
        box(b"jP  ", b"\r\n\x87\n")
        + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
        + box(b"jp2h", header)
        + box(b"free", b"")
        + box(b"jp2c", codestream)
    )


def style(
    *, component: int | None = None, n_layers: int = 1, block: tuple[int, int] = (6, 6), precincts: bytes | None = None
) -> bytes:
    """The header that says how all components of a JPEG 2000 are divided, or one; sides are powers of 2."""
    sides = b"\xff" if precincts is None else precincts
    divided = struct.pack(">BBBBB", len(sides) - 1, block[0] - 2, block[1] - 2, 0, 1) + (precincts or b"")
    has_precincts = precincts is not None
    if component is None:
        return struct.pack(">HHBBHB", 0xFF52, 12 + len(precincts or b""), has_precincts, 0, n_layers, 0) + divided
    return struct.pack(">HHBB", 0xFF53, 9 + len(precincts or b""), component, has_precincts) + divided


SMALL_PRECINCTS = style(precincts=b"\0")
TILE_PART = struct.pack(">HHHIBB", 0xFF90, 10, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(with_empty_segments(300_000), "10000 segments of metadata", id="empty segments"),
        pytest.param(with_long_frames(20), "10000 segments of metadata", id="long frames"),
        pytest.param(jpeg_2000(side=1000, headers=SMALL_PRECINCTS), "200000 precincts", id="precincts"),
        pytest.param(jpeg_2000(side=2000, headers=style(block=(2, 2))), "200000 precincts, code-blocks", id="blocks"),
        pytest.param(jpeg_2000(1000, side=100, headers=SMALL_PRECINCTS), "precincts", id="precincts of all tiles"),
        pytest.param(
            jpeg_2000(side=1000, headers=style(n_layers=65_535, precincts=b"\x44")), "and packets", id="layers"
        ),
        pytest.param(
            jpeg_2000(side=1000, headers=style() + style(component=0, precincts=b"\0")),
            "200000 precincts",
            id="precincts of one component",
        ),
        pytest.param(jpeg_2000(side=1000, headers=style() + SMALL_PRECINCTS), "200000 precincts", id="a second style"),
        pytest.param(
            jpeg_2000(side=1000, headers=style() + TILE_PART + SMALL_PRECINCTS), "200000 precincts", id="a tile's style"
        ),
        pytest.param(
            jpeg_2000(side=1000, headers=b"\xff\x70\x7f\xff" + SMALL_PRECINCTS),
            "200000 precincts",
            id="a style in data",
        ),
        pytest.param(
            # Its first two bytes are the number of layers of another one.
            jpeg_2000(side=1000, headers=b"\xff\x52\0\x0c\0\0" + SMALL_PRECINCTS),
            "200000 precincts",
            id="a style in another",
        ),
        pytest.param(
            jpeg_2000(headers=b"".join(style(n_layers=n) for n in range(1, 100))), "50 different", id="styles"
        ),
        pytest.param(jpeg_2000(5000, before_all=b"\xff\x30\0\0"), "4096 tiles", id="tiles after another header"),
        pytest.param(with_segments(100_000), "100 segments of Exif", id="Exif"),
        pytest.param(with_scans(300_000), "more than 222222 scans", id="scans"),
        pytest.param(jpeg_2000(1, 16_384), "4 components", id="components"),
        pytest.param(jpeg_2000(5000, 3), "4096 tiles", id="tiles"),
        pytest.param(b"P2 2 1 255\n1 " + b"#\n" * 2000 + b" 2 ", "1000 comments", id="comments"),
        pytest.param(b"P2 5000 4000 255\n1 ", "16000000 pixels", id="decoded by Python"),
    ],
)
def test_an_image_that_takes_long_or_much_for_its_pixels_is_refused_before_it_is_decoded(
    data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))

    with pytest.raises(TooLarge, match=reason) as caught:
        decode_image(encode(data), "image", 20_000_000)

    assert caught.value.field == "image"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(with_segments(3), id="Exif"),
        pytest.param(with_scans(20), id="scans"),
        pytest.param(with_segments(0) + b"\xff\xe5\0\xc8" + bytes(200) * 6000, id="large"),
        pytest.param(with_empty_segments(5000) + bytes(2_000_000), id="empty segments"),
    ],
)
def test_an_image_with_a_few_of_what_may_be_too_many_is_read(data: bytes) -> None:
    assert decode_image(encode(data), "image", MAX_PIXELS).mode == "RGB"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"codeblock_size": (32, 32)}, id="code-blocks"),
        pytest.param({"precinct_size": (128, 128)}, id="precincts"),
        pytest.param({"tile_size": (64, 64)}, id="tiles"),
        pytest.param({"quality_layers": [80, 40, 20, 10, 5, 2], "irreversible": True}, id="layers"),
    ],
)
def test_a_jpeg_2000_may_be_divided_as_it_usually_is(options: dict[str, Any]) -> None:
    picture = Image.effect_noise((256, 256), 50).convert("RGB")

    assert decoded(picture, "JPEG2000", **options).size == (256, 256)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(style(precincts=b"\xff" * 6), id="usual"),
        pytest.param(style(n_layers=50, block=(5, 5), precincts=b"\x77" * 6), id="precincts and layers"),
        pytest.param(style(block=(4, 4)), id="small blocks"),
    ],
)
@pytest.mark.parametrize(("n_tiles", "side"), [(1, 13_000), (40, 2000), (4000, 100)])
def test_a_large_jpeg_2000_may_have_as_many_parts_as_are_usual(
    headers: bytes, n_tiles: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = jpeg_2000(n_tiles, 4, side=side, headers=headers)

    assert excess_of_picture(data, Image.open(io.BytesIO(data)), 178_956_970) is None


def tiff_of(entries: list[tuple[int, int, int, int]], order: str = "<", *, is_big: bool = False) -> bytes:
    """A TIFF of one grey pixel, with 1,000 bytes at its end.

    Args:
        entries: tags besides the usual ones: number, type, how many values, and the value, or where they are from the
            end.
    """
    number = 16 if is_big else 4
    entry, header = ("HHQQ", "HHHQQ") if is_big else ("HHII", "HIH")
    usual = [(256, number, 1, 1), (257, number, 1, 1), (258, number, 1, 8), (262, number, 1, 1)]
    data_tags = (324, 325) if 322 in {tag for tag, *_ in entries} else (273, 279)
    n = len(usual) + 2 + len(entries)
    end = 2 + struct.calcsize(order + header) + n * struct.calcsize(order + entry) + struct.calcsize(order + entry[-1])
    usual += [(data_tags[0], number, 1, end), (data_tags[1], number, 1, 1000)]
    entries = [(*one[:3], end) if one[2] > 1 else one for one in entries]
    listed = b"".join(struct.pack(order + entry, *one) for one in sorted(usual + entries, key=itemgetter(0)))
    start = struct.pack(order + header, *((43, 8, 0, 16, n) if is_big else (42, 8, n)))
    last = bytes(struct.calcsize(order + entry[-1]))
    return (b"II" if order == "<" else b"MM") + start + listed + last + b"\x4d" * 1000


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("order", "is_big"), [("<", False), (">", False), ("<", True)])
def test_a_tiff_whose_tags_share_their_bytes_is_refused(order: str, is_big: bool) -> None:
    undefined = 7
    entries = [(tag, undefined, 1000, 0) for tag in range(50_000, 50_004)]

    with pytest.raises(TooLarge, match="tags that are larger than its file"):
        decode_image(encode(tiff_of(entries, order, is_big=is_big)), "image", MAX_PIXELS)
    read = decode_image(encode(tiff_of(entries[:1], order, is_big=is_big)), "image", MAX_PIXELS)
    assert pixel(read) == (77, 77, 77)


def test_a_tiff_that_is_another_one_for_pillow_than_for_libtiff_is_refused() -> None:
    big = tiff_of([(50_000, 7, 1000, 0)], ">", is_big=True)
    (place,) = struct.unpack(">I", big[4:8])  # of the tags, in a smaller kind of TIFF
    data = big.ljust(place, b"\0") + tiff(">", {}, b"\x4d")[9:]

    with pytest.raises(TooLarge, match="tags that may be read in two ways"):
        decode_image(encode(data), "image", MAX_PIXELS)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_tag_of_a_tiff_that_says_to_be_larger_than_the_file_is_passed_over() -> None:
    read = decode_image(encode(tiff_of([(50_000, 7, 2**31, 0)])), "image", MAX_PIXELS)

    assert pixel(read) == (77, 77, 77)


def tile_of(kind: int, side: int) -> list[tuple[int, int, int, int]]:
    return [(322, kind, 1, side), (323, kind, 1, side)]


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(tile_of(4, 8192), id="large"),
        pytest.param(tile_of(17, 8192), id="large, by a type that Pillow does not know"),
        pytest.param(tile_of(17, 8192) + tile_of(4, 16), id="small for Pillow alone"),
    ],
)
def test_tiles_of_a_tiff_that_are_much_larger_than_the_picture_are_refused(
    entries: list[tuple[int, int, int, int]],
) -> None:
    with pytest.raises(TooLarge, match="tiles of more than 4194304 pixels"):
        decode_image(encode(tiff_of(entries, is_big=True)), "image", MAX_PIXELS)


def test_a_tile_of_a_tiff_may_be_a_little_larger_than_the_picture() -> None:
    assert pixel(decode_image(encode(tiff_of(tile_of(4, 16))), "image", MAX_PIXELS)) == (77, 77, 77)


def test_a_strip_of_a_tiff_may_end_after_the_picture() -> None:
    rows_per_strip = 278, 4, 1, 2**32 - 1

    assert pixel(decode_image(encode(tiff_of([rows_per_strip])), "image", MAX_PIXELS)) == (77, 77, 77)


def test_a_tiff_with_very_many_strips_makes_no_object_of_each() -> None:
    n = 200_000
    entries = [(256, 4, 1, 1), (257, 4, 1, 2), (258, 3, 1, 8), (262, 3, 1, 1), (273, 1, n, 200), (278, 4, 1, 1)]
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + listed + bytes(4)
    data = head.ljust(200, b"\0") + b"\x08" * n

    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            decode_image(encode(data), "image", MAX_PIXELS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 20 * n


# Recordings

TONE = (0.5 * np.sin(np.arange(RATE_HZ) * 2 * np.pi * 440 / RATE_HZ)).astype(np.float32)


def heard(data: bytes, max_seconds: float = 60) -> Audio:
    return decode_audio(encode(data), "audio", max_seconds)


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        pytest.param("WAV", "PCM_U8", 0.01, id="WAV int8"),
        pytest.param("WAV", "PCM_16", 1e-4, id="WAV int16"),
        pytest.param("WAV", "PCM_24", 1e-6, id="WAV int24"),
        pytest.param("WAV", "PCM_32", 1e-6, id="WAV int32"),
        pytest.param("WAV", "FLOAT", 0, id="WAV float32"),
        pytest.param("WAV", "DOUBLE", 1e-7, id="WAV float64"),
        pytest.param("FLAC", "PCM_16", 1e-4, id="FLAC int16"),
        pytest.param("FLAC", "PCM_24", 1e-6, id="FLAC int24"),
        pytest.param("AIFF", "PCM_16", 1e-4, id="AIFF"),
        pytest.param("OGG", "VORBIS", 0.1, id="OGG Vorbis"),
    ],
)
def test_recording_of_every_format_gives_its_samples(format: str, subtype: str, tolerance: float) -> None:
    audio = heard(recording(TONE, format, subtype))

    assert (audio.sampling_rate, audio.samples.dtype, audio.samples.shape) == (RATE_HZ, np.dtype("float32"), (RATE_HZ,))
    assert np.abs(audio.samples - TONE).max() <= tolerance


@pytest.mark.parametrize(
    ("format", "subtype", "rate"),
    [
        pytest.param("MP3", "MPEG_LAYER_III", 16000, id="MP3"),
        pytest.param("OGG", "OPUS", 16000, id="OGG Opus"),
    ],
)
def test_lossy_recording_sounds_the_same(format: str, subtype: str, rate: int) -> None:
    tone = (0.5 * np.sin(np.arange(rate) * 2 * np.pi * 440 / rate)).astype(np.float32)

    audio = heard(recording(tone, format, subtype, rate))

    spectrum = np.abs(np.fft.rfft(audio.samples))
    assert audio.seconds == pytest.approx(1, abs=0.1)
    assert spectrum.argmax() / audio.seconds == pytest.approx(440, abs=3)


def test_recordings_are_decoded_with_all_cores_for_all_threads(n_spread: list[None]) -> None:
    decode_audio(encode(recording(TONE, "WAV", "PCM_16")), "audio", 60)

    assert len(n_spread) == 1


def test_data_url_of_a_recording_is_read() -> None:
    audio = decode_audio("data:audio/wav;base64," + encode(recording(TONE, "WAV", "PCM_16")), "audio", 60)

    assert len(audio.samples) == RATE_HZ


def test_channels_are_averaged() -> None:
    left_and_right = np.stack([np.full(100, 0.75), np.full(100, -0.25)], axis=1)

    audio = heard(recording(left_and_right, "WAV", "FLOAT"))

    assert np.allclose(audio.samples, 0.25)


def test_samples_beyond_full_scale_are_clipped() -> None:
    audio = heard(recording(np.array([3, -3, 0.5]), "WAV", "FLOAT"))

    assert audio.samples.tolist() == [1, -1, 0.5]


def test_samples_may_be_written_to() -> None:
    audio = heard(recording(TONE, "WAV", "FLOAT"))

    audio.samples[0] = 1  # torch.from_numpy warns of arrays where this fails


def test_recording_as_long_as_allowed_is_read() -> None:
    assert heard(recording(TONE, "WAV", "PCM_16"), max_seconds=1).seconds == 1


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(recording(np.zeros(RATE_HZ + 1), "WAV", "PCM_16"), id="one sample too long"),
        pytest.param(recording(np.zeros(RATE_HZ * 600), "FLAC", "PCM_16"), id="ten minutes in a small file"),
        pytest.param(wav(bytes(100), rate=1), id="long by a low sampling rate"),
    ],
)
def test_longer_recording_is_refused(data: bytes) -> None:
    with pytest.raises(TooLarge, match=r"audio\[0\] is longer than 1 seconds.*MAX_AUDIO_SECONDS") as caught:
        decode_audio(encode(data), "audio[0]", 1)

    assert caught.value.field == "audio[0]"


def test_a_recording_counts_as_large_as_a_model_makes_it() -> None:
    data = encode(wav(bytes(2 * 60), rate=1))
    resampled = decode_audio(data, "audio", 60).resampled(16_000).samples.nbytes

    assert decode_audio(data, "audio", 60, max_bytes=resampled).n_bytes == resampled
    with pytest.raises(TooLarge, match="MAX_DECODED_BYTES"):
        decode_audio(data, "audio", 60, max_bytes=resampled - 1)


def test_reading_stops_at_the_limit() -> None:
    data = recording(np.zeros(RATE_HZ * 3600, np.int16), "FLAC", "PCM_16")
    encoded = encode(data)

    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode_audio(encoded, "audio", 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    whole = RATE_HZ * 3600 * 4
    assert peak < whole / 4


@pytest.mark.parametrize("channels", [1, 8])
def test_long_recording_needs_little_more_memory_than_its_samples(channels: int) -> None:
    encoded = encode(recording(np.zeros((RATE_HZ * 900, channels), np.int16), "FLAC", "PCM_16"))

    tracemalloc.start()
    try:
        audio = decode_audio(encoded, "audio", 3600)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1.5 * audio.samples.nbytes


@pytest.mark.parametrize("claimed", [8, 2**31 - 100, 2**32 - 100])
def test_header_that_lies_about_the_length_does_no_harm(claimed: int) -> None:
    audio = heard(wav(struct.pack("<8h", *range(8)), claimed=claimed))

    assert len(audio.samples) == min(8, claimed // 2)


def test_recording_of_many_channels_is_read_in_small_blocks() -> None:
    data = wav(bytes(1024 * 8192), channels=1024, bits=8)
    encoded = encode(data)

    tracemalloc.start()
    try:
        audio = decode_audio(encoded, "audio", 60)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(audio.samples) == 8192
    assert peak < 5 * len(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"hello", "is not a recording that can be read", id="a text"),
        pytest.param(base64.b64decode(PNG), "is not a recording that can be read", id="an image"),
        pytest.param(b"RIFF\0\0\0\0WAVE", "is not a recording that can be read", id="header alone"),
        pytest.param(b"ID3\3\0\0\0\0\0\0", "is not a recording that can be read", id="MP3 tag alone"),
        pytest.param(recording(TONE, "OGG", "VORBIS")[:500], "is not a recording that can be read", id="truncated OGG"),
        pytest.param(
            recording(TONE, "FLAC", "PCM_16")[:50], "is not a recording that can be read", id="truncated FLAC"
        ),
        pytest.param(wav(bytes(8), rate=0), "is not a recording that can be read", id="sampling rate 0"),
        pytest.param(wav(bytes(8), channels=0), "is not a recording that can be read", id="no channel"),
        pytest.param(wav(b""), "without a single sample", id="no samples"),
        pytest.param(wav(struct.pack("<2f", 0, np.nan), format=3, bits=32), "not finite numbers", id="NaN"),
        pytest.param(wav(struct.pack("<2f", 0, np.inf), format=3, bits=32), "not finite numbers", id="infinity"),
    ],
)
def test_what_is_not_a_recording_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        decode_audio(encode(data), "audio[1]", 60)

    assert caught.value.field == "audio[1]"
    assert "BytesIO" not in caught.value.message


def test_resampling_keeps_pitch_and_length() -> None:
    audio = Audio(TONE, RATE_HZ).resampled(16000)

    spectrum = np.abs(np.fft.rfft(audio.samples))
    assert (audio.sampling_rate, audio.seconds, audio.samples.dtype) == (16000, 1, np.dtype("float32"))
    assert spectrum.argmax() == 440
    assert np.abs(audio.samples).max() <= 1


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    audio = Audio(TONE, RATE_HZ)

    assert audio.resampled(RATE_HZ) is audio


# Drafts


def photo(width: int, height: int) -> str:
    return encode_image(Image.effect_noise((width, height), 60).convert("RGB"), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("size", "draft_size", "expected"),
    [
        pytest.param((640, 480), 240, (320, 240), id="half"),
        pytest.param((640, 480), 241, (640, 480), id="no side becomes shorter"),
        pytest.param((1600, 1600), 100, (200, 200), id="an eighth at least"),
        pytest.param((640, 480), 1000, (640, 480), id="small already"),
        pytest.param((640, 480), None, (640, 480), id="not asked for"),
    ],
)
def test_a_jpeg_is_decoded_at_the_fraction_that_is_enough(
    size: tuple[int, int], draft_size: int | None, expected: tuple[int, int]
) -> None:
    assert decode_image(photo(*size), "image", MAX_PIXELS * 3, draft_size).size == expected


def test_a_draft_is_the_picture_made_smaller() -> None:
    picture = Image.linear_gradient("L").resize((512, 512)).convert("RGB")

    draft = decode_image(encode_image(picture, "JPEG", quality=95), "image", MAX_PIXELS, 128)

    difference = np.abs(np.asarray(draft, float) - np.asarray(picture.resize((128, 128), Image.Resampling.BOX), float))
    assert difference.max() < 4


def test_only_jpegs_are_decoded_at_a_fraction() -> None:
    assert decode_image(encode_image(Image.new("RGB", (640, 480))), "image", MAX_PIXELS, 100).size == (640, 480)
