"""What decoding a picture may take besides its pixels, which are all that Pillow and the libraries behind it bound.

Each limit stands for small files whose decoding would take gigabytes of memory, or a core for hours. Hardly any picture
comes near one. To search a file takes a twentieth of the time that decoding it does: small ones, which can hold little
of what is searched for, are not.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import Final

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
#: Pixels of a picture that Python code decodes, a few microseconds each: of the formats QOI, DDS and XPM, say.
MAX_PYTHON_PIXELS: Final = 16_000_000
#: Comments among the numbers of a plain PPM. For each, what is read of the file is copied.
MAX_COMMENTS: Final = 1000
#: Tiles and components of a JPEG 2000. Each tile has memory for each component, before anything is decoded.
MAX_TILES: Final = 4096
MAX_COMPONENTS: Final = 4
_CODESTREAM: Final = re.compile(rb"\xff\x4f\xff\x51")


def excess_of_file(data: bytes) -> str | None:
    """Return what a picture's file has too much of to be opened, in words; None where there is no such thing."""
    if len(data) > _LARGE_BYTES and data.count(b"Exif\0\0") > MAX_EXIF_SEGMENTS:
        return f"more than {MAX_EXIF_SEGMENTS} segments of Exif data"
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
        for n_components, n_tiles in _codestreams(data):
            if n_components > MAX_COMPONENTS or n_tiles > MAX_TILES:
                return f"more than {MAX_TILES} tiles or {MAX_COMPONENTS} components"
    return None


def _codestreams(data: bytes) -> Iterator[tuple[int, int]]:
    """Give, of each JPEG 2000 in a file, how many components and tiles it says that it has."""
    for found in _CODESTREAM.finditer(data):
        header = data[found.start() + 8 : found.start() + 42]
        if len(header) < 34:
            continue
        width, height, _, _, tile_width, tile_height, tile_x, tile_y, n_components = struct.unpack(">8IH", header)
        if not tile_width or not tile_height:
            continue  # OpenJPEG refuses it
        n_tiles = math.ceil((width - tile_x) / tile_width) * math.ceil((height - tile_y) / tile_height)
        yield n_components, n_tiles
