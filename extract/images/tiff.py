"""Decodes TIFFs, and corrects or refuses those of which Pillow would give wrong pixels.

The tags are those of the TIFF 6.0 specification (1992), deflate is that of the Photoshop TIFF Technical Notes (2002).
"""

import io
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImagePalette
from PIL.TiffImagePlugin import TiffImageFile

from extract.images.jpeg import decode_strictly

_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _COLOR_MAP, _SAMPLE_FORMAT = 258, 259, 262, 284, 320, 339
_SAMPLES, _JPEG_TABLES = 277, 347
_PARTS = ((273, 279), (324, 325))  # offsets and byte counts: of strips, of tiles
_RAW, _JPEG, _DEFLATE = 1, 7, (8, 32946)
_WHITE_IS_ZERO, _SEPARATE_PLANES, _SIGNED = 0, 2, 2
_INFLATED_BYTES = 1 << 20  # at a time, only to check the data


def load_tiff(image: TiffImageFile, encoded: bytes) -> Image.Image:
    """Decode a TIFF that Pillow has opened; 12-bit gray is scaled to 16 bits, and 0 becomes black.

    Raises:
        ValueError: Pillow misreads this layout, or a decoder found the data to be damaged.
    """
    bits = image.tag_v2.get(_BITS, (1,))
    _check_layout(image, bits)
    _check_parts(image, encoded, bits)
    _fix_palette(image)
    white_is_zero = image.tag_v2.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
    image.load()
    if image.mode.startswith("I;16") and (white_is_zero or bits[0] == 12):
        return _normalize_gray(image, bits[0], white_is_zero)
    return image


def _check_layout(image: TiffImageFile, bits: Sequence[int]) -> None:
    if _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ()) and max(bits) < 32:
        raise ValueError("its pixels are signed numbers without a fixed white value; save it with unsigned ones")
    is_planar = image.tag_v2.get(_PLANAR) == _SEPARATE_PLANES
    if is_planar and image.tag_v2.get(_COMPRESSION, _RAW) == _RAW and max(bits) > 8:
        raise ValueError(f"its color planes of {max(bits)} bits are stored separately; save it with interleaved colors")


def _check_parts(image: TiffImageFile, encoded: bytes, bits: Sequence[int]) -> None:
    """Check sizes and checksums, which neither Pillow nor libtiff do."""
    compression = image.tag_v2.get(_COMPRESSION, _RAW)
    if compression == _RAW:
        _check_size(image, bits)
    for part in _parts(image, encoded):
        if compression in _DEFLATE:
            _check_deflate(part)
        elif compression == _JPEG:
            _check_jpeg(image.tag_v2.get(_JPEG_TABLES, b""), part)


def _parts(image: TiffImageFile, encoded: bytes) -> Iterator[bytes]:
    """The strips or tiles of the first image."""
    for offsets, counts in _PARTS:
        for offset, count in zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(counts, ()), strict=False):
            yield encoded[offset : offset + count]


def _check_size(image: TiffImageFile, bits: Sequence[int]) -> None:
    """Refuse missing strips and subsampled colors, for which Pillow would read beyond the data."""
    n_bytes = [sum(image.tag_v2[counts]) for _, counts in _PARTS if counts in image.tag_v2]
    samples = image.tag_v2.get(_SAMPLES, 1)
    needed = image.height * image.width * (sum(bits) if len(bits) == samples else bits[0] * samples) // 8
    if n_bytes and max(n_bytes) < needed:
        raise ValueError(f"its strips or tiles have {max(n_bytes):,} bytes, but its pixels take {needed:,}")


def _check_deflate(part: bytes) -> None:
    stream = zlib.decompressobj()
    try:
        while stream.decompress(part, _INFLATED_BYTES):
            part = stream.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"its deflate data are damaged ({error})") from error
    if not stream.eof:
        raise ValueError("its deflate data are truncated")


def _check_jpeg(tables: bytes, part: bytes) -> None:
    stream = (tables[:-2] + part[2:] if tables else part) + b"\xff\xd9"  # an end marker, which not every program writes
    opened = Image.open(io.BytesIO(stream), formats=("JPEG",))  # refuses a size beyond the limit
    decode_strictly(opened, stream)


def _fix_palette(image: TiffImageFile) -> None:
    """Read a palette of small values as 8-bit colors, as libtiff does: TIFF has 16 bits, but some programs write 8."""
    colors = image.tag_v2.get(_COLOR_MAP, ())
    if image.mode in ("P", "PA") and max(colors, default=256) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colors))


def _normalize_gray(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    gray = np.asarray(image)  # (height, width), uint16
    if white_is_zero:
        gray = (1 << bits) - 1 - gray
    if bits == 12:
        gray = gray << 4 | gray >> 8
    return Image.fromarray(gray)
