"""Decoding any bytes gives an upright RGB image or raises DecodeError."""

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from extract.images.decode import EXTENSIONS, DecodeError, decode_rgb, to_rgb


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> np.ndarray:
    image = decode_rgb(encoded, "a/b.png")
    assert image.mode == "RGB"
    return np.asarray(image)  # (height, width, 3)


def gradient(height: int = 24, width: int = 40) -> Image.Image:
    """Smooth, so that JPEG keeps it, and different in every corner, so that a wrong rotation is noticed."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], axis=-1).astype(np.uint8))


def test_an_rgb_image_keeps_every_value() -> None:
    assert np.array_equal(decode(encode(gradient())), np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(gradient(), kind, exif=exif, **options)
    plain = Image.open(io.BytesIO(encode(gradient(), kind, **options))).convert("RGB")
    plain.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(plain))
    assert np.array_equal(decode(encoded), expected)


def test_a_damaged_exif_block_leaves_the_pixels_as_they_are() -> None:
    encoded = encode(gradient(), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01")
    assert np.array_equal(decode(encoded), decode(encode(gradient(), "JPEG")))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P"])
def test_a_mode_without_16_bits_converts_as_pillow_does(mode: str) -> None:
    image = gradient().convert(mode)
    assert np.array_equal(decode(encode(image)), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_composited() -> None:
    image = Image.new("RGBA", (3, 2), (200, 100, 50, 0))
    assert (decode(encode(image)) == (200, 100, 50)).all()


@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_a_palette_with_transparency_keeps_its_colors_and_does_not_warn(transparency: Any) -> None:
    image = gradient().quantize(256)
    assert np.array_equal(decode(encode(image, transparency=transparency)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_transparent_color_does_not_warn(mode: str) -> None:
    color = (0, 0, 0) if mode == "RGB" else 0
    image = gradient().convert(mode)
    assert np.array_equal(decode(encode(image, transparency=color)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    encoded = encode(image, "JPEG", quality=100)
    assert b"Adobe" in encoded  # hence stored inverted
    red, green, blue = decode(encoded)[8, 8]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_and_not_clipped(kind: str) -> None:
    gray = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    expected = np.round(gray / 257).astype(np.uint8)
    assert np.array_equal(decode(encode(Image.fromarray(gray), kind))[..., 0], expected)


def test_big_endian_16_bit_gray_is_read_right() -> None:
    image = Image.frombytes("I;16B", (2, 1), b"\xff\xff\x01\x01")
    assert np.asarray(to_rgb(image, "x"))[0, :, 0].tolist() == [255, 1]


def test_32_bit_gray_within_16_bits_is_scaled() -> None:
    gray = np.array([[0, 65535]], dtype=np.int32)
    assert decode(encode(Image.fromarray(gray), "TIFF"))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_gray_beyond_16_bits_is_refused(value: int) -> None:
    encoded = encode(Image.fromarray(np.full((2, 2), value, dtype=np.int32)), "TIFF")
    with pytest.raises(DecodeError, match=rf"'a/b.png' .* gray values {value} to {value} exceed 16 bits"):
        decode(encoded)


def test_floating_point_pixels_are_refused() -> None:
    encoded = encode(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="floating-point numbers without a fixed white value; save it with 8 or 16"):
        decode(encoded)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(encoded) == (255, 0, 0)).all()


def test_zero_bytes_are_an_error() -> None:
    with pytest.raises(DecodeError, match=r"sample 'a/b.png' cannot be decoded: it is empty.*on_error: skip"):
        decode(b"")


@pytest.mark.parametrize("encoded", [b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 99])
def test_what_is_no_image_is_an_error(encoded: bytes) -> None:
    with pytest.raises(DecodeError, match=r"not an image in a known format \(JPEG, PNG"):
        decode(encoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_an_error(kind: str, share: float) -> None:
    encoded = encode(gradient(200, 200), kind)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(DecodeError, match=r"sample 'a/b\.png' cannot be decoded: "):
        decode(encoded[: int(len(encoded) * share)])


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels and holds none."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_an_error_whatever_the_filters(side: int) -> None:
    with pytest.raises(DecodeError, match=rf"more than {Image.MAX_IMAGE_PIXELS} pixels, the limit"):
        decode(bomb(side))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_gives_an_image_or_a_decode_error_and_no_warning(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = bytearray(encode(gradient(), kind, **({"exif": exif} if kind not in {"GIF", "BMP"} else {})))
    for _ in range(data.draw(st.integers(1, 8))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_rgb(bytes(encoded), "x")
    except DecodeError as error:
        assert "sample 'x' cannot be decoded" in str(error)  # noqa: PT017 (both outcomes are legal)
    else:
        assert image.mode == "RGB"


def test_threads_decode_the_same_and_leave_the_warning_filters_alone() -> None:
    palette = encode(gradient().quantize(256), transparency=bytes(range(256)))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [palette, encode(gradient(), "JPEG", exif=exif), encode(gradient(), "TIFF")]
    expected = [decode(encoded).tobytes() for encoded in kinds]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda i: decode(kinds[i % 3]).tobytes(), range(300)))
    assert decoded == [expected[i % 3] for i in range(300)]
    assert warnings.filters == before


def test_a_decode_error_survives_pickling_as_from_a_worker() -> None:
    with pytest.raises(DecodeError) as caught:
        decode(b"")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_usual_endings_are_known() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"} <= EXTENSIONS
    assert not {".eps", ".pdf", ".txt", ".mp4"} & EXTENSIONS


def test_photos_of_phones_are_read_upright() -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    gradient = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    stored = Image.fromarray(np.stack([gradient] * 3, axis=-1))
    encoded = io.BytesIO()
    heif.from_pillow(stored).save(encoded, quality=-1)
    found = decode_rgb(encoded.getvalue(), "IMG_1.HEIC")
    assert (found.mode, found.size) == ("RGB", (48, 64))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(stored)).max() <= 3
    assert {".heic", ".heif"} <= EXTENSIONS
    with pytest.raises(DecodeError, match=r"'IMG_1\.HEIC' cannot be decoded"):
        decode_rgb(encoded.getvalue()[:-20], "IMG_1.HEIC")
