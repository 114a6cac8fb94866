"""TIFFs that Pillow would decode to wrong pixels: refused by name, or put right.

The tags are those of the TIFF 6.0 specification (1992), deflate that of the Photoshop TIFF Technical Notes (2002).
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
_AT_ONCE = 1 << 20  # bytes that are inflated at a time, only to check them


def load_tiff(image: TiffImageFile, encoded: bytes) -> Image.Image:
    """The decoded image of a TIFF that Pillow has opened; gray of 12 bits is scaled to 16, and 0 is black.

    Raises:
        ValueError: the layout is one that Pillow misreads, or the data are damaged so that a decoder notices.
    """
    bits = image.tag_v2.get(_BITS, (1,))
    _check_layout(image, bits)
    _check_parts(image, encoded, bits)
    _mend_palette(image)
    white_is_zero = image.tag_v2.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
    image.load()
    if image.mode.startswith("I;16") and (white_is_zero or bits[0] == 12):
        return _plain_gray(image, bits[0], white_is_zero)
    return image


def _check_layout(image: TiffImageFile, bits: Sequence[int]) -> None:
    if _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ()) and max(bits) < 32:
        raise ValueError("its pixels are signed numbers, which have no fixed white; save it with unsigned ones")
    apart = image.tag_v2.get(_PLANAR) == _SEPARATE_PLANES
    if apart and image.tag_v2.get(_COMPRESSION, _RAW) == _RAW and max(bits) > 8:
        raise ValueError(f"its color planes of {max(bits)} bits are stored one by one; save it with them interleaved")


def _check_parts(image: TiffImageFile, encoded: bytes, bits: Sequence[int]) -> None:
    """Check the sizes and checksums that neither Pillow nor libtiff look at."""
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
    """Where strips are missing, or colors subsampled, there are fewer bytes than Pillow takes."""
    held = [sum(image.tag_v2[counts]) for _, counts in _PARTS if counts in image.tag_v2]
    samples = image.tag_v2.get(_SAMPLES, 1)
    needed = image.height * image.width * (sum(bits) if len(bits) == samples else bits[0] * samples) // 8
    if held and max(held) < needed:
        raise ValueError(f"its strips or tiles have {max(held):,} bytes, where its pixels take {needed:,}")


def _check_deflate(part: bytes) -> None:
    stream = zlib.decompressobj()
    try:
        while stream.decompress(part, _AT_ONCE):
            part = stream.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"its deflate data are damaged ({error})") from error
    if not stream.eof:
        raise ValueError("its deflate data are cut")


def _check_jpeg(tables: bytes, part: bytes) -> None:
    stream = (tables[:-2] + part[2:] if tables else part) + b"\xff\xd9"  # which not every program writes
    opened = Image.open(io.BytesIO(stream), formats=("JPEG",))  # which refuses a size beyond the limit
    decode_strictly(opened, stream)


def _mend_palette(image: TiffImageFile) -> None:
    """Some programs write colors of 8 bits where TIFF has 16: where all are small, take them for such, as libtiff."""
    colors = image.tag_v2.get(_COLOR_MAP, ())
    if image.mode in ("P", "PA") and max(colors, default=256) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colors))


def _plain_gray(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    gray = np.asarray(image)  # (height, width), uint16
    if white_is_zero:
        gray = (1 << bits) - 1 - gray
    return Image.fromarray(gray << 4 | gray >> 8 if bits == 12 else gray)
