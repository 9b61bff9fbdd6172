"""Image and audio files made by hand, damaged and lying ones among them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import soundfile

RATE_HZ = 8000


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, chunks: bytes = b"") -> bytes:
    """Return a PNG file of what Pillow itself does not write; ``rows`` may be less than the header promises."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + data + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def recording(samples: Any, format: str = "WAV", subtype: str = "FLOAT", rate: int = RATE_HZ) -> bytes:
    """Return a sound file of ``samples``, (frames,) or (frames, channels)."""
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), rate, format=format, subtype=subtype)
    return file.getvalue()


def wav(
    data: bytes, *, format: int = 1, channels: int = 1, rate: int = RATE_HZ, bits: int = 16, claimed: int = 0
) -> bytes:
    """Return a WAV file around raw data; ``claimed`` is the number of bytes that its header speaks of."""
    size = claimed or len(data)
    frame = channels * bits // 8
    header = struct.pack("<IHHIIHH", 16, format, channels, rate, rate * frame % 2**32, frame, bits)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + header + b"data" + struct.pack("<I", size) + data
