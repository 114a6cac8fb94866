"""Truncated and damaged images are refused if their format allows it; docs/reliability.md lists where it does not."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extract.images.decode import DecodeError, decode_rgb

DATA = os.environ.get("SIDECACHE_DATA")
SHARES = [tenth / 10 for tenth in range(1, 10)]


def photo(height: int = 96, width: int = 120) -> Image.Image:
    """Smooth shapes with some noise: a few kilobytes in every format."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 2, y * 2, (x * y) // 90], axis=-1)
    return Image.fromarray((smooth + np.random.default_rng(0).integers(0, 32, smooth.shape)).astype(np.uint8))


def encode(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(encoded, "x"))  # (height, width, 3)


def pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def hole(encoded: bytes, share: float, n_bytes: int = 64) -> bytes:
    """Replace some bytes by zeros, as in a download with a missing part."""
    start = int(len(encoded) * share)
    assert encoded[start : start + n_bytes] != bytes(n_bytes)
    return encoded[:start] + bytes(n_bytes) + encoded[start + n_bytes :]


GRAY = photo().convert("L")
JPEGS = {
    "baseline": encode("JPEG"),
    "progressive": encode("JPEG", progressive=True),
    "restart markers": encode("JPEG", restart_marker_rows=1),
    "4:4:4": encode("JPEG", subsampling=0, quality=100),
    "4:2:2": encode("JPEG", subsampling=1),
    "RGB": encode("JPEG", keep_rgb=True),
    "gray": encode("JPEG", GRAY),
    "CMYK": encode("JPEG", photo().convert("CMYK")),
}
OTHERS = {
    "PNG": encode("PNG"),
    "PNG of a palette": encode("PNG", photo().quantize(200)),
    "GIF": encode("GIF", photo().quantize(64)),
    "WEBP": encode("WEBP"),
    "lossless WEBP": encode("WEBP", lossless=True),
    "BMP": encode("BMP"),
    "PPM": encode("PPM"),
    "JPEG2000": encode("JPEG2000"),
    "TIFF": encode("TIFF"),
    "TIFF, LZW": encode("TIFF", compression="tiff_lzw"),
    "TIFF, deflate": encode("TIFF", compression="tiff_adobe_deflate"),
    "TIFF, JPEG": encode("TIFF", compression="jpeg"),
}
WITH_CHECKSUMS = ["PNG", "PNG of a palette", "TIFF, deflate"]


@pytest.mark.parametrize("name", JPEGS)
def test_a_healthy_jpeg_has_the_pixels_that_pillow_gives(name: str) -> None:
    assert np.array_equal(decode(JPEGS[name]), pillow(JPEGS[name]))


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="SIDECACHE_DATA is unset: the real images are not here")
def test_a_real_jpeg_has_the_pixels_that_pillow_gives() -> None:
    files = sorted((Path(str(DATA)) / "images").rglob("*.jpg"))
    assert len(files) > 1000
    for file in files:
        encoded = file.read_bytes()
        assert np.array_equal(decode(encoded), pillow(encoded)), file


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_a_cut_image_is_refused(name: str, share: float) -> None:
    encoded = {**JPEGS, **OTHERS}[name]
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode(encoded[: int(len(encoded) * share)])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_was_cut_and_closed_again_is_refused(name: str, share: float) -> None:
    start = JPEGS[name].index(b"\xff\xda") + 14
    cut = start + int((len(JPEGS[name]) - start) * share)
    with pytest.raises(DecodeError, match="its JPEG data are damaged or truncated"):
        decode(JPEGS[name][:cut] + b"\xff\xd9")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("name", "end"), [("PNG", 12), ("GIF", 1)])
def test_another_format_that_was_cut_and_closed_again_is_refused(name: str, end: int, share: float) -> None:
    encoded = OTHERS[name]
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode(encoded[: int(len(encoded) * share)] + encoded[-end:])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", WITH_CHECKSUMS)
def test_a_hole_is_refused_by_a_format_with_checksums(name: str, share: float) -> None:
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode(hole(OTHERS[name], share))


def test_the_chunk_of_a_png_that_is_damaged_is_named() -> None:
    encoded = OTHERS["PNG"]
    with pytest.raises(DecodeError, match=r"its IDAT chunk at byte \d+ does not match its checksum"):
        decode(hole(encoded, 0.5))
    with pytest.raises(DecodeError, match="it is truncated: a PNG ends with an IEND chunk"):
        decode(encoded[:-12])
    text = encoded[:-12] + b"\0\0\0\4tEXtabcd" + bytes(4) + encoded[-12:]
    with pytest.raises(DecodeError, match="its tEXt chunk at byte"):
        decode(text)


def test_bytes_behind_the_end_of_an_image_are_no_damage() -> None:
    for name in ("PNG", "GIF", "BMP"):
        assert np.array_equal(decode(OTHERS[name] + b"more"), decode(OTHERS[name]))
    assert np.array_equal(decode(JPEGS["baseline"] + b"more"), decode(JPEGS["baseline"]))


def test_most_holes_in_a_jpeg_leave_it_with_too_few_or_too_many_data() -> None:
    noticed = 0
    for share in np.linspace(0.3, 0.9, 40):
        try:
            decode(hole(JPEGS["baseline"], share, 512))
        except DecodeError:
            noticed += 1
    assert noticed > 20


def test_a_jpeg_with_data_left_over_is_refused_but_padding_is_not() -> None:
    encoded = JPEGS["baseline"]
    assert np.array_equal(decode(encoded[:-2] + bytes(12) + encoded[-2:]), decode(encoded))
    with pytest.raises(DecodeError, match=r"damaged or truncated \(.* extraneous bytes before marker 0xd9"):
        decode(encoded[:-2] + bytes(100) + encoded[-2:])


def test_an_unknown_jfif_revision_hides_no_damage() -> None:
    encoded = JPEGS["baseline"]
    assert encoded[6:12] == b"JFIF\0\1"
    strange = encoded[:11] + b"\0" + encoded[12:]
    assert np.array_equal(decode(strange), decode(encoded))
    with pytest.raises(DecodeError, match="damaged or truncated"):
        decode(strange[: len(strange) // 2] + b"\xff\xd9")


def test_a_jpeg_of_unusual_sampling_is_read_as_pillow_does() -> None:
    encoded = bytearray(encode("JPEG", subsampling=0))
    encoded[encoded.index(b"\xff\xc0") + 11] = 0x42  # two rows of four luma blocks for one of chroma
    assert np.array_equal(decode(bytes(encoded)), pillow(bytes(encoded)))


def test_an_mpo_whose_second_image_is_cut_gives_its_first() -> None:
    encoded = encode("MPO", save_all=True, append_images=[photo().rotate(180)])
    assert np.array_equal(decode(encoded[:-900]), decode(encoded))
