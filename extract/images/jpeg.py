"""Decodes a JPEG with a decoder that reports what Pillow ignores: data that end early or are inconsistent.

libjpeg only warns of such data and fills the rest with gray, and Pillow drops its warnings. simplejpeg wraps the same
library with the same settings, so its pixels equal Pillow's bit for bit, but in strict mode a warning is an error.
"""

import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from simplejpeg import decode_jpeg

_COLORS = {"RGB": "RGBX", "L": "GRAY", "CMYK": "CMYK"}  # by Pillow's mode; Pillow has RGB in four bytes
_MAJOR_REVISION = slice(11, 12)  # of JFIF, after the segment's name
# Subsampling such as 4:1:0, which libjpeg decodes but TurboJPEG does not, and scans that some encoders repeat.
_HARMLESS = re.compile("Could not determine subsampling|Inconsistent progression sequence")
_SURPLUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MAX_PADDING = 16  # bytes; some encoders pad to a whole word before the end marker


def load_jpeg(image: Image.Image, encoded: bytes) -> Image.Image:
    """Decode a JPEG, or the first image of an MPO, that Pillow has opened.

    Raises:
        ValueError: the decoder found the data to be truncated or damaged.
    """
    pixels = decode_strictly(image, encoded)
    if pixels is None or image.mode == "CMYK":  # Pillow knows which files store CMYK inverted
        image.load()
        return image
    decoded = Image.frombytes(image.mode, image.size, pixels, "raw", "RGBX" if image.mode == "RGB" else "L")
    decoded.info = image.info  # with the EXIF block
    return decoded


def decode_strictly(image: Image.Image, encoded: bytes) -> UInt8[np.ndarray, "height width channels"] | None:
    """The pixels of an opened JPEG (RGB as RGBX); None if it is valid, but only Pillow can decode it.

    Raises:
        ValueError: the decoder found the data to be truncated or damaged.
    """
    try:
        pixels: UInt8[np.ndarray, "height width channels"] = decode_jpeg(
            _with_known_revision(encoded), _COLORS[image.mode], strict=True
        )
    except ValueError as error:
        if _is_harmless(str(error)):
            return None
        raise ValueError(f"its JPEG data are damaged or truncated ({error})") from error
    return pixels


def _with_known_revision(encoded: bytes) -> bytes:
    """Set JFIF revision 1: another one changes no pixel, but its warning would hide warnings of the data."""
    if encoded[6:11] != b"JFIF\0" or encoded[_MAJOR_REVISION] == b"\1":
        return encoded
    return encoded[: _MAJOR_REVISION.start] + b"\1" + encoded[_MAJOR_REVISION.stop :]


def _is_harmless(warning: str) -> bool:
    if surplus := _SURPLUS.search(warning):
        return int(surplus[1]) <= _MAX_PADDING
    return _HARMLESS.search(warning) is not None
