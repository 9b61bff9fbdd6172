"""What decoding a picture may take besides its pixels, which are all that Pillow and the libraries behind it bound.

Each limit stands for small files whose decoding would take gigabytes of memory, or a core for hours. Hardly any picture
comes near one. To search a file takes a twentieth of the time that decoding it does: small ones, which can hold little
of what is searched for, are not.

One thing is not bounded: the frame in an AVIF may be larger than the picture that its file speaks of (up to libavif's
own limit of 16,384 x 16,384 pixels), from which it is made smaller.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final, NamedTuple, TypeVar

from PIL import Image, TiffImagePlugin

# Pillow's own reader makes an object of 250 bytes of each byte in a list of strips. libtiff turns numbers into the
# machine's order of bytes, which Pillow knows of some kinds only.
TiffImagePlugin.READ_LIBTIFF = True
_NATIVE: Final = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
for _kind, (_mode, _raw) in TiffImagePlugin.OPEN_INFO.items():
    TiffImagePlugin.OPEN_INFO[_kind] = _mode, _NATIVE.get(_raw, _raw)

#: Segments of Exif data. Each is joined with all before it, which takes a second in a file of this size.
MAX_EXIF_SEGMENTS: Final = 100
_LARGE_BYTES: Final = 1_000_000
#: Scans of a JPEG that is as large as may be. A smaller one may have more.
MAX_SCANS: Final = 1000
_MIN_SCAN_BYTES: Final = 10
#: Segments of metadata in a JPEG that is not much larger. Pillow makes objects of 130 bytes of the 4 that one may have,
#: and an object of three bytes in the header of a frame that is longer than libjpeg takes.
MAX_SEGMENTS: Final = 10_000
_MIN_SEGMENT_BYTES: Final = 1000
_SEGMENTS_OF_A_LONG_FRAME: Final = 1000
_SEGMENT: Final = re.compile(  # never in compressed pixels
    rb"\xff(?=[\xc0-\xfe])(?:[\xe0-\xef\xfe]"  # what is looked ahead at saves a fifth of the time
    rb"|[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xde](?P<long>(?!\0[\0-\x14])..\x08.{4}[\1\3\4]))",
    re.DOTALL,
)
#: Pixels of a picture that Python code decodes, a few microseconds each: of the formats QOI, DDS and XPM, say.
MAX_PYTHON_PIXELS: Final = 16_000_000
#: Comments among the numbers of a plain PPM. For each, what is read of the file is copied.
MAX_COMMENTS: Final = 1000
#: Tiles and components of a JPEG 2000. Each tile has memory for each component, before anything is decoded.
MAX_TILES: Final = 4096
MAX_COMPONENTS: Final = 4
#: Precincts and code-blocks of a picture in JPEG 2000, and packets, which take less. OpenJPEG makes some 300 bytes of
#: each, before anything is decoded. A large picture may have one for so many pixels: common ones have 500 for each.
MAX_PARTS: Final = 200_000
_PIXELS_OF_A_PART: Final = 32
_PACKETS_OF_A_PART: Final = 64
#: Headers of a JPEG 2000 that differ from each other, and places that look like one at first.
MAX_HEADERS: Final = 50
MAX_LIKE_HEADERS: Final = 100_000
# These are found by what OpenJPEG demands of them, which compressed data hardly ever meet, and not by their places:
# where it meets what it does not know, it goes on by two bytes at a time until there is a header.
_SIZE: Final = re.compile(rb"\xff(?=\x51.{38})", re.DOTALL)
_COMPONENTS: Final = re.compile(rb"(?:[\0-\x25\x80-\xa5][^\0]{2})+", re.DOTALL)
_STYLE: Final = re.compile(
    rb"\xff(?=(?:\x52\0[\x0c-\x2d](?P<all>[\0-\7]).(?P<layers>..)[\0\1]"  # of all components, or of one
    rb"|\x53\0[\x09-\x2a][\0-\3](?P<one>.))"
    rb"(?P<levels>[\0-\x20])(?P<x>[\0-\x08])(?P<y>[\0-\x08]).[\0\1](?P<precincts>.{0,33}))",
    re.DOTALL,
)
#: Bytes that a value of each type takes in a TIFF.
_TIFF_BYTES: Final = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_MAX_TIFF_TAGS: Final = 65_535  # libtiff reads no more of them
#: Pixels of a tile in a TIFF of a small picture, and how many times the picture's they may be in a large one.
MAX_TILE_PIXELS: Final = 2048 * 2048
_PICTURES_OF_A_TILE: Final = 2

_T = TypeVar("_T")


class _Style(NamedTuple):
    """How a component of a JPEG 2000 is divided. All sides are powers of 2."""

    n_layers: int
    width: int  # a code-block's
    height: int
    precincts: bytes  # four bits a side, of the smallest resolution first


def excess_of_file(data: bytes) -> str | None:
    """Return what a picture's file has too much of to be opened, in words; None where there is no such thing."""
    if len(data) > _LARGE_BYTES and data.count(b"Exif\0\0") > MAX_EXIF_SEGMENTS:
        return f"more than {MAX_EXIF_SEGMENTS} segments of Exif data"
    if len(data) > _LARGE_BYTES and data.startswith((b"\xff\xd8", b"BLP1\0\0\0\0")):
        most = max(MAX_SEGMENTS, len(data) // _MIN_SEGMENT_BYTES)
        counted = (_SEGMENTS_OF_A_LONG_FRAME if found["long"] else 1 for found in _SEGMENT.finditer(data))
        if any(n > most for n in accumulate(counted)):
            return f"more than {most} segments of metadata"
    return None


def excess_of_picture(data: bytes, picture: Image.Image, max_pixels: int) -> str | None:
    """Return the same of a picture that is opened and not yet decoded.

    Args:
        max_pixels: how many pixels it may have.
    """
    n_pixels = picture.width * picture.height
    decoders = {tile[0] for tile in getattr(picture, "tile", ())}
    if decoders & Image.DECODERS.keys() and n_pixels > MAX_PYTHON_PIXELS:
        return f"more than {MAX_PYTHON_PIXELS} pixels, the most that one of the format {picture.format} may have"
    if "ppm_plain" in decoders and data.count(b"#") > MAX_COMMENTS:
        return f"more than {MAX_COMMENTS} comments"
    if picture.format in ("JPEG", "MPO", "BLP"):
        most = MAX_SCANS * max(max_pixels, 1_000_000) // max(1, n_pixels)
        if len(data) > most * _MIN_SCAN_BYTES and data.count(b"\xff\xda") > most:
            return f"more than {most} scans"
    if picture.format in ("JPEG2000", "ICNS"):
        return _excess_of_jpeg_2000(data, n_pixels)
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.format == "TIFF":
        return _excess_of_tiff(data, picture.tag_v2, n_pixels)
    return None


def _excess_of_jpeg_2000(data: bytes, n_pixels: int) -> str | None:
    if any(data.count(marker) > MAX_LIKE_HEADERS for marker in (b"\xff\x51", b"\xff\x52", b"\xff\x53")):
        return f"more than {MAX_LIKE_HEADERS} headers"
    sizes, styles = _distinct(_sizes(data)), _distinct(_styles(data))
    if max(len(sizes), len(styles)) > MAX_HEADERS:
        return f"more than {MAX_HEADERS} different headers"
    most = max(MAX_PARTS, n_pixels // _PIXELS_OF_A_PART)
    for width, height, _, _, tile_width, tile_height, tile_x, tile_y, n_components in sizes:
        width, height = width - tile_x, height - tile_y
        n_tiles = -(-width // tile_width) * -(-height // tile_height)
        if n_components > MAX_COMPONENTS or n_tiles > MAX_TILES:
            return f"more than {MAX_TILES} tiles or {MAX_COMPONENTS} components"
        tile = min(width, tile_width), min(height, tile_height)
        if n_tiles * n_components * _n_parts(tile, styles) > most:
            return f"more than {most} precincts, code-blocks and packets"
    return None


def _distinct(found: Iterable[_T]) -> set[_T]:
    """Return what differs from each other, and not many more than may be."""
    different = set()
    for one in found:
        different.add(one)
        if len(different) > MAX_HEADERS:
            break
    return different


def _sizes(data: bytes) -> Iterator[tuple[int, ...]]:
    """Give width, height, their offsets, those of tiles, and the number of components of each JPEG 2000 in a file."""
    for found in _SIZE.finditer(data):
        start = found.start() + 2
        length, _, *size, n_components = struct.unpack_from(">HH8IH", data, start)
        is_header = length == 38 + 3 * n_components and _COMPONENTS.fullmatch(data, start + 38, start + length)
        if is_header and size[4] and size[5]:
            yield *size, n_components


def _styles(data: bytes) -> Iterator[_Style]:
    for found in _STYLE.finditer(data):
        levels = found["levels"][0]
        has_precincts = (found["all"] or found["one"])[0] & 1
        yield _Style(
            n_layers=int.from_bytes(found["layers"] or b""),
            width=found["x"][0] + 2,
            height=found["y"][0] + 2,
            precincts=found["precincts"][: levels + 1] if has_precincts else b"\xff" * (levels + 1),
        )


def _n_parts(tile: tuple[int, int], styles: set[_Style]) -> int:
    """Return how many parts a component of a tile has at most, but for those that each tile has one of."""
    n_parts = n_packets = 0
    for style in styles:
        n_of_style = 0
        for level, precinct in enumerate(reversed(style.precincts)):
            # Each level is half as wide and high as the one before it, and but for the last one in three bands, which
            # are half as wide and high again. So are precincts in them, which code-blocks cannot be larger than.
            is_banded = level < len(style.precincts) - 1
            width, height = precinct & 15, precinct >> 4
            n_precincts = _n_cells(tile, level + width, level + height)
            width, height = min(width, style.width + is_banded), min(height, style.height + is_banded)
            n_blocks = _n_cells(tile, level + width, level + height)
            n_of_style += (3 if is_banded else 1) * (n_precincts + n_blocks - 2)
            n_packets = max(n_packets, n_precincts * len(style.precincts))
        n_parts = max(n_parts, n_of_style)
    n_layers = max((style.n_layers for style in styles), default=0)
    return n_parts + n_layers * n_packets // _PACKETS_OF_A_PART


def _n_cells(size: tuple[int, int], width: int, height: int) -> int:
    """Return how many cells an area has whose sides are these powers of 2."""
    return -(-size[0] >> width) * -(-size[1] >> height)


def _excess_of_tiff(data: bytes, tags: TiffImagePlugin.ImageFileDirectory_v2, n_pixels: int) -> str | None:
    if data.startswith(b"MM\0+"):  # Pillow takes it for a smaller kind of TIFF, and knows other tags than libtiff
        return "tags that may be read in two ways"
    count, entry = ("Q", "HHQ8x") if data[2] == 43 else ("H", "HHI4x")
    order = "<" if data.startswith(b"II") else ">"
    (n_tags,) = struct.unpack_from(order + count, data, tags.offset)
    start, n_bytes = tags.offset + struct.calcsize(order + count), struct.calcsize(order + entry)
    n_whole = min(n_tags, _MAX_TIFF_TAGS, (len(data) - start) // n_bytes)
    entries = list(struct.iter_unpack(order + entry, data[start : start + n_whole * n_bytes]))
    # libtiff reads the values of all tags, even where they are the same bytes of the file, but no larger ones.
    sizes = (n * _TIFF_BYTES[kind] for _, kind, n in entries if kind < len(_TIFF_BYTES))
    if sum(size for size in sizes if size <= len(data)) > len(data):
        return "tags that are larger than its file"
    # It makes room for a whole tile. Of a size that is there twice, or of an odd type, Pillow may know another one.
    n_sides = sum(tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH) for tag, _, _ in entries)
    if n_sides:
        width, length = tags.get(TiffImagePlugin.TILEWIDTH), tags.get(TiffImagePlugin.TILELENGTH)
        most = max(MAX_TILE_PIXELS, _PICTURES_OF_A_TILE * n_pixels)
        if n_sides > 2 or not (isinstance(width, int) and isinstance(length, int)) or width * length > most:
            return f"tiles of more than {most} pixels"
    return None
