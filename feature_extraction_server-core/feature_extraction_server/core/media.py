"""Images and recordings: from a client's files, as bytes or as base64 text, to pictures and samples.

All of this runs on the request's own thread. Pillow is imported with this module; NumPy, soundfile and soxr
only when the first recording arrives (NumPy with grey in floating point, too).
"""

from __future__ import annotations

import binascii
import io
import math
import re
import threading
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import pybase64
from PIL import Image, ImageOps, UnidentifiedImageError

from feature_extraction_server.core import pixels
from feature_extraction_server.core.cores import N_CORES, all_cores, spread
from feature_extraction_server.core.errors import InvalidInput, ServerError, TooLarge
from feature_extraction_server.core.image_limits import excess_of_file, excess_of_picture

if TYPE_CHECKING:
    import numpy as np
    import soundfile

# Pillow warns of a client's odd file on the server's standard error, and remembers each text that it warned with.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# EPS is left out, since Pillow would hand the client's PostScript to an external interpreter, and IPTC, which holds a
# file of any format, EPS too, and says of it what it likes.
_REFUSED_FORMATS: Final = frozenset({"EPS", "IPTC"})
_DATA_URL: Final = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE: Final = b" \t\r\n\f\v"
#: What is read or computed at a time: more would be more memory, not less time.
_BLOCK_VALUES: Final = 1 << 20
#: Hz, as speech models take recordings: one of 1 Hz is sixteen thousand times as large for them as it came.
_MODELS_RATE: Final = 16_000

# Decoders run without Python's interpreter lock. More of them at a time than there are cores would only take turns.
_decoders: Final = threading.BoundedSemaphore(N_CORES)
#: Where pictures of so many pixels are decoded, a worker has much to do besides running Python.
_LARGE_PIXELS: Final = 512 * 512


@contextmanager
def _decoding() -> Iterator[None]:
    with _decoders, all_cores():
        yield


@dataclass(frozen=True)
class Audio:
    """A recording. ``samples``: float32 (n,), channels averaged, in [-1, 1]; ``sampling_rate``: Hz, as recorded."""

    samples: np.ndarray[Any, np.dtype[np.float32]]
    sampling_rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate

    @property
    def n_bytes(self) -> int:
        """How much memory it takes, in a model too."""
        return _audio_bytes(len(self.samples), self.sampling_rate)

    def resampled(self, sampling_rate: int) -> Audio:
        """Return the recording at another sampling rate in Hz (itself where that is its own)."""
        if sampling_rate == self.sampling_rate:
            return self
        import numpy as np
        import soxr

        samples = np.clip(soxr.resample(self.samples, self.sampling_rate, sampling_rate), -1, 1)
        return Audio(samples.astype(np.float32, copy=False), sampling_rate)


def decode_base64(text: str, field: str) -> bytes:
    """Decode base64, standard or URL-safe, with or without padding, white space and a data URL prefix.

    Raises:
        InvalidInput: the text is empty or not base64; the error names ``field``.
    """
    with suppress(ValueError):  # most senders follow the standard to the letter, and that is fastest
        if data := pybase64.b64decode(text, validate=True):
            return data
    text = text.lstrip()
    try:
        if text[:5].lower() == "data:":
            text = _data_of_url(text, field)
        encoded = text.encode("ascii").translate(_URL_SAFE, delete=_WHITE_SPACE).rstrip(b"=")
        # One character more than a multiple of four encodes nothing: b64decode refuses it.
        data = pybase64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (UnicodeError, binascii.Error):
        raise InvalidInput(
            f"{field} is not valid base64: encode the file's bytes as base64, with or without a data URL prefix",
            field=field,
        ) from None
    if not data:
        raise InvalidInput(f"{field} is empty: send a file's bytes as base64", field=field)
    return data


def _data_of_url(url: str, field: str) -> str:
    match = _DATA_URL.match(url)
    if match is None or ";base64" not in match[2].lower().replace(" ", ""):
        raise InvalidInput(f"{field} is a data URL that does not start with 'data:<type>;base64,'", field=field)
    data = url[match.end() :]
    return urllib.parse.unquote(data, errors="strict") if "%" in data else data


def file_of(source: str | bytes, field: str) -> bytes:
    """Return a file's bytes, of which there must be some; ``source`` may be its base64.

    Raises:
        InvalidInput: it is empty or not base64; the error names ``field``.
    """
    if isinstance(source, str):
        return decode_base64(source, field)
    if not source:
        raise InvalidInput(f"{field} is empty: it must be a file of at least one byte", field=field)
    return source


def decode_image(
    source: str | bytes, field: str, max_pixels: int, draft_size: int | None = None, max_bytes: float = math.inf
) -> Image.Image:
    """Decode a picture's file, or its base64, of any format that Pillow reads (but EPS and IPTC) to RGB.

    EXIF orientation is applied, transparency laid over white; of an animation the first frame is taken. Grey of more
    than 8 bits is scaled to 8, from 0 to the full scale of 16 bits, or of 32 where it exceeds that; in floating point,
    to the smallest of 1, 255 and 65535 that no value exceeds. Negative numbers are black, and so is what is not finite.

    Args:
        draft_size: pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as no side becomes shorter.
        max_bytes: what its pixels may take in memory.

    Raises:
        InvalidInput: not base64, not a picture, or a damaged one; the error names ``field``.
        TooLarge: more than ``max_pixels`` pixels or ``max_bytes`` (found out before decoding).
    """
    data = file_of(source, field)
    with _decoding():
        return _decode_image(data, field, max_pixels, draft_size, max_bytes)


def _decode_image(data: bytes, field: str, max_pixels: int, draft_size: int | None, max_bytes: float) -> Image.Image:
    if (excess := excess_of_file(data)) is not None:
        raise _too_much(field, excess)
    # Some formats (icons) decode a picture within the file as soon as they are opened: Pillow's own limit is for those.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise InvalidInput(f"{field} is not an image of a known format", field=field) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        n_found = re.search(r"\d+", str(error))
        raise _too_many_pixels(field, n_found[0] if n_found else "too many", max_pixels) from None
    except Exception as error:  # Pillow's parsers meet hostile bytes with errors of many types
        raise InvalidInput(f"{field} is a damaged image: {_reason(error)}", field=field) from None
    if image.format in _REFUSED_FORMATS:
        raise InvalidInput(f"{field} is an image of the format {image.format}, which is not accepted", field=field)
    n_pixels = image.width * image.height
    if n_pixels > max_pixels:
        raise _too_many_pixels(field, f"{image.width} x {image.height} = {n_pixels}", max_pixels)
    if (excess := excess_of_picture(data, image, max_pixels)) is not None:
        raise _too_much(field, excess)
    if n_pixels >= _LARGE_PIXELS:
        spread()
    try:
        if draft_size is not None:
            image.draft(image.mode, (draft_size, draft_size))
        if pixels.n_bytes(image.size) > max_bytes:
            raise _too_many_bytes(field)
        if image.format == "JPEG" and image.mode == "RGB":
            with suppress(OSError):  # no file descriptor is left, say: it is copied then
                pixels.decode_in_region(image)
        image.load()
        # What reads the pixels where they lie takes the size for true.
        if (image.im.mode, image.im.size) != (image.mode, image.size):
            raise InvalidInput(f"{field} is a damaged image: it holds another picture than it says", field=field)
        return _to_rgb(_upright(image))
    except ServerError:
        raise
    except Exception as error:  # as above
        raise InvalidInput(f"{field} is a damaged image: {_reason(error)}", field=field) from None


def _too_many_pixels(field: str, found: str, allowed: int) -> TooLarge:
    return TooLarge(f"{field} has {found} pixels; at most {allowed} are allowed (MAX_IMAGE_PIXELS)", field=field)


def _too_much(field: str, excess: str) -> TooLarge:
    return TooLarge(f"{field} is an image with {excess}", field=field)


def _too_many_bytes(field: str) -> TooLarge:
    return TooLarge(
        f"{field} makes the request's pictures and recordings take more memory than they may together "
        "(MAX_DECODED_BYTES): send fewer of them at a time",
        field=field,
    )


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # EXIF data that cannot be read says nothing about orientation
        ImageOps.exif_transpose(image, in_place=True)  # else even an upright picture would be copied
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        # A copy without the file's metadata and without the lazy file behind it would cost a second buffer.
        return image
    if image.mode.startswith("I"):
        image = _to_8_bit_grey(image)
    elif image.mode == "F":
        image = _from_floats(image)
    elif image.mode == "La":  # the one mode that Pillow converts to no other
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit (or 32-bit) grey to 8 bits; Pillow's own conversion would clip it to white."""
    clear = image.info.get("transparency")
    image = image.convert("I")
    highest = cast("tuple[int, int]", image.getextrema())[1]
    full_scale = 65535 if highest <= 65535 else 2**31 - 1
    grey = image.point(lambda value: value * (255 / full_scale) + 0.5).convert("L")
    grey.info.pop("transparency", None)  # a level of the unscaled image
    if isinstance(clear, int):
        import numpy as np

        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    return grey


def _from_floats(image: Image.Image) -> Image.Image:
    """Scale grey in floating point to 8 bits. No file says what white is: the smallest usual value none exceeds."""
    import numpy as np

    highest = max(float(values.max()) for _, values in _finite(image))
    full_scale = next((white for white in (1, 255, 65535) if highest <= white), highest)
    grey = Image.new("L", image.size)
    for top, values in _finite(image):
        levels = (np.clip(values, 0, full_scale) * (255 / full_scale) + 0.5).astype(np.uint8)
        grey.paste(Image.fromarray(levels), (0, top))
    return grey


def _finite(image: Image.Image) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Give a picture in floating point row by row, or some at a time, with 0 for what is not a finite number."""
    import numpy as np

    n_rows = max(1, _BLOCK_VALUES // image.width)
    for top in range(0, image.height, n_rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + n_rows, image.height))))
        yield top, np.where(np.isfinite(values), values, np.float32(0))


def decode_audio(source: str | bytes, field: str, max_seconds: float, max_bytes: float = math.inf) -> Audio:
    """Decode a recording's file, or its base64 (WAV, FLAC, OGG, MP3 and whatever else libsndfile reads).

    Args:
        max_bytes: what its samples may take in memory.

    Raises:
        InvalidInput: not base64, not a recording, a damaged or an empty one; the error names ``field``.
        TooLarge: longer than ``max_seconds``, or more than ``max_bytes``.
    """
    import soundfile

    data = file_of(source, field)
    try:
        spread()
        with _decoding(), soundfile.SoundFile(io.BytesIO(data)) as file:
            samples = _read_mono(file, field, max_seconds, max_bytes)
            sampling_rate = file.samplerate
    except soundfile.LibsndfileError as error:
        raise InvalidInput(
            f"{field} is not a recording that can be read (WAV, FLAC, OGG and MP3 can): {_audio_reason(error)}",
            field=field,
        ) from None
    if not len(samples):
        raise InvalidInput(f"{field} is a recording without a single sample", field=field)
    return Audio(samples, sampling_rate)


def _read_mono(
    file: soundfile.SoundFile, field: str, max_seconds: float, max_bytes: float
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Read block by block, since a header may lie about the length, and channels would multiply the memory."""
    import numpy as np

    max_frames = int(max_seconds * file.samplerate)
    block_frames = max(1, _BLOCK_VALUES // file.channels)
    # Grows in place, where joining a list of blocks would need the memory twice.
    samples = bytearray()
    n_frames = 0
    while len(block := file.read(block_frames, dtype="float32", always_2d=True)):
        n_frames += len(block)
        if n_frames > max_frames:
            raise TooLarge(
                f"{field} is longer than {max_seconds:g} seconds, the longest that is allowed (MAX_AUDIO_SECONDS)",
                field=field,
            )
        if _audio_bytes(n_frames, file.samplerate) > max_bytes:
            raise _too_many_bytes(field)
        if not np.isfinite(block).all():
            raise InvalidInput(f"{field} is a recording with samples that are not finite numbers", field=field)
        samples += memoryview(np.clip(block.mean(axis=1), -1, 1))
    return np.frombuffer(samples, np.float32)


def _audio_bytes(n_samples: int, sampling_rate: int) -> int:
    """Return how much memory a recording takes, or will take when a model has resampled it, if that is more."""
    return 4 * max(n_samples, n_samples * _MODELS_RATE // sampling_rate)


def _audio_reason(error: soundfile.LibsndfileError) -> str:
    words: str = error.error_string
    # What libsndfile says of a file that is in memory, and broken.
    return "the file is malformed" if "does not exist" in words or "Internal" in words else words


def _reason(error: Exception) -> str:
    """The library's own words, on one line and without what is ours (an object's address, say)."""
    words = " ".join(str(error).split())
    return re.sub(r"<[^<>]*>", "the data", words)[:200] or type(error).__name__
