"""Every layout of a TIFF is decoded to the right RGB or refused; tifffile writes the files that are decoded here."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest

from extract.images.decode import DecodeError, decode_rgb

tifffile = pytest.importorskip("tifffile", reason="tifffile, which writes the layouts, is not installed")

Y, X = np.mgrid[0:48, 0:64]
GRAY = ((X * 4 + Y) % 256).astype(np.uint8)
RGB = np.stack([X * 4, Y * 5, X * Y % 256], axis=-1).astype(np.uint8)
ALPHA = np.maximum(GRAY, 127)
CMYK = np.concatenate([255 - RGB, np.zeros_like(RGB[..., :1])], axis=-1)
PALETTE = np.stack([np.arange(256), 255 - np.arange(256), np.zeros(256)]).astype(np.uint16)  # (colors, indices)


def encode(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tifffile.imwrite(buffer, pixels, metadata=None, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(encoded, "x")).astype(int)  # (height, width, 3)


def with_alpha(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels.reshape(48, 64, -1), alpha[..., None]], axis=-1)


def planes(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def premultiplied(pixels: np.ndarray) -> np.ndarray:
    return np.round(pixels.reshape(48, 64, -1) * (ALPHA / 255)[..., None]).astype(np.uint8)


LAYOUTS: dict[str, tuple[np.ndarray, dict[str, Any], np.ndarray]] = {
    "1 bit": (GRAY > 100, {"photometric": "minisblack"}, (GRAY > 100) * 255),
    "1 bit, white is zero": (GRAY > 100, {"photometric": "miniswhite"}, (GRAY <= 100) * 255),
    "8 bits": (GRAY, {"photometric": "minisblack"}, GRAY),
    "8 bits, white is zero": (GRAY, {"photometric": "miniswhite"}, 255 - GRAY),
    "16 bits": (GRAY * np.uint16(257), {"photometric": "minisblack"}, GRAY),
    "gray and alpha": (with_alpha(GRAY, ALPHA), {"photometric": "minisblack", "planarconfig": "contig",
                       "extrasamples": ["unassalpha"]}, GRAY),
    "gray and premultiplied alpha": (with_alpha(premultiplied(GRAY), ALPHA), {"photometric": "minisblack",
                                     "planarconfig": "contig", "extrasamples": ["assocalpha"]}, GRAY),
    "RGB": (RGB, {"photometric": "rgb"}, RGB),
    "RGB, 16 bits": (RGB * np.uint16(257), {"photometric": "rgb"}, RGB),
    "RGB in planes": (planes(RGB), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    "RGB and alpha": (with_alpha(RGB, ALPHA), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, RGB),
    "RGB and premultiplied alpha": (with_alpha(premultiplied(RGB), ALPHA), {"photometric": "rgb",
                                    "extrasamples": ["assocalpha"]}, RGB),
    "RGB and something": (with_alpha(RGB, ALPHA), {"photometric": "rgb", "extrasamples": ["unspecified"]}, RGB),
    "CMYK": (CMYK, {"photometric": "separated"}, RGB),
    "CMYK in planes": (planes(CMYK), {"photometric": "separated", "planarconfig": "separate"}, RGB),
    "CMYK, 16 bits": (CMYK * np.uint16(257), {"photometric": "separated"}, RGB),
    "palette": (GRAY, {"photometric": "palette", "colormap": PALETTE * 257}, PALETTE.T[GRAY]),
    "palette of 8 bits": (GRAY, {"photometric": "palette", "colormap": PALETTE}, PALETTE.T[GRAY]),
    "YCbCr": (with_alpha(with_alpha(GRAY, np.full_like(GRAY, 128)), np.full_like(GRAY, 128)),
              {"photometric": "ycbcr", "subsampling": (1, 1)}, GRAY),
}  # fmt: skip


@pytest.mark.parametrize("tile", [None, (16, 16)], ids=["strips", "tiles"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_read_has_the_right_colors(name: str, order: str, compression: Any, tile: Any) -> None:
    pixels, options, expected = LAYOUTS[name]
    tile = None if pixels.dtype == bool else tile  # tifffile writes no tiles of them
    encoded = encode(pixels, byteorder=order, compression=compression, tile=tile, **options)
    if "palette" not in name:
        assert np.array_equal(tifffile.imread(io.BytesIO(encoded)), pixels)
    wanted = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=-1)
    # premultiplication by the smallest alpha, 127, leaves half of the steps
    assert np.abs(decode(encoded) - wanted.astype(int)).max() <= ("premultiplied" in name) + ("YCbCr" in name)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bits_of_which_zero_is_white_are_inverted_or_refused(compression: Any) -> None:
    pixels = GRAY * np.uint16(257)
    little = encode(pixels, photometric="miniswhite", byteorder="<", compression=compression)
    assert np.array_equal(decode(little)[..., 0], 255 - GRAY)
    with pytest.raises(DecodeError, match="of a kind that Pillow cannot read"):
        decode(encode(pixels, photometric="miniswhite", byteorder=">", compression=compression))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (GRAY.astype(np.int8), {"photometric": "minisblack"}, "signed numbers without a fixed white"),
        (GRAY.astype(np.int16), {"photometric": "minisblack"}, "signed numbers without a fixed white"),
        (GRAY * np.uint32(1 << 24), {"photometric": "minisblack"}, "exceed 16 bits|Pillow cannot read"),
        (GRAY.astype(np.float16), {"photometric": "minisblack"}, "of a kind that Pillow cannot read"),
        (GRAY.astype(np.float32), {"photometric": "minisblack"}, "floating-point numbers without a fixed white"),
        (GRAY.astype(np.float32), {"photometric": "miniswhite"}, "floating-point numbers without a fixed white"),
        (GRAY.astype(np.float64), {"photometric": "minisblack"}, "of a kind that Pillow cannot read"),
        (RGB.astype(np.float32), {"photometric": "rgb"}, "of a kind that Pillow cannot read"),
        (RGB.astype(np.uint32), {"photometric": "rgb"}, "of a kind that Pillow cannot read"),
        (RGB.astype(np.int8), {"photometric": "rgb"}, "of a kind that Pillow cannot read"),
        (RGB, {"photometric": "icclab"}, "of a kind that Pillow cannot read"),
    ],
)
def test_a_layout_without_known_colors_is_refused(
    pixels: np.ndarray, options: Any, message: str, compression: Any, order: str
) -> None:
    with pytest.raises(DecodeError, match=message):
        decode(encode(pixels, compression=compression, byteorder=order, **options))


def test_wide_planes_without_compression_are_refused() -> None:
    with pytest.raises(DecodeError, match="its color planes of 16 bits are stored separately; save it with inter"):
        decode(encode(planes(RGB * np.uint16(257)), photometric="rgb", planarconfig="separate"))


def test_gray_in_lab_is_gray() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., 0] = [0, 32, 64, 96, 128, 160, 192, 255]  # L; a and b are signed, and zero
    rgb = decode(encode(pixels, photometric="cielab"))
    assert np.ptp(rgb, axis=-1).max() <= 2
    assert (np.diff(rgb[0, :, 0]) > 20).all()


def by_hand(bits: int, photometric: int, data: bytes, width: int, height: int, *more: tuple[int, int]) -> bytes:
    """A little-endian TIFF of one strip; `more` are further tags of one short."""
    shorts = [(258, bits), (259, 1), (262, photometric), *more]
    longs = [(256, width), (257, height), (273, 8), (278, height), (279, len(data))]
    tags = sorted([(tag, 3, value) for tag, value in shorts] + [(tag, 4, value) for tag, value in longs])
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data += bytes(len(data) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + packed + bytes(4)


@pytest.mark.parametrize(("bits", "steps"), [(2, 3), (4, 15), (12, 4095)])
def test_the_largest_value_of_odd_bits_is_white(bits: int, steps: int) -> None:
    values = [0, steps, 1, steps // 2, steps, 0, steps, steps]
    data = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(bits)
    expected = [round(255 * value / steps) for value in values]
    assert np.abs(decode(by_hand(bits, 1, data, 8, 1))[0, :, 0] - expected).max() <= 1
    if bits < 8:
        assert np.abs(decode(by_hand(bits, 0, data, 8, 1))[0, :, 0] - 255 + expected).max() <= 1


def test_subsampled_colors_and_missing_strips_are_refused() -> None:
    data = bytes([200] * 4 + [128, 128]) * 64  # four of Y to one of Cb and Cr
    with pytest.raises(DecodeError, match="its strips or tiles have 384 bytes, but its pixels take 768"):
        decode(by_hand(8, 6, data, 16, 16, (277, 3)) + bytes(1000))
    with pytest.raises(DecodeError, match="have 100 bytes, but its pixels take 256"):
        decode(by_hand(8, 1, bytes(100), 16, 16) + bytes(1000))


@pytest.mark.parametrize("tile", [None, (16, 16)], ids=["strips", "tiles"])
@pytest.mark.parametrize("share", [tenth / 10 for tenth in range(2, 10)])
def test_damaged_deflate_data_are_refused(share: float, tile: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
    encoded = encode(noise, photometric="minisblack", compression="zlib", tile=tile)  # the tags come first
    at = int(len(encoded) * share)
    with pytest.raises(DecodeError, match="its deflate data are damaged"):
        decode(encoded[:at] + bytes(32) + encoded[at + 32 :])
    with pytest.raises(DecodeError, match=r"its deflate data are (truncated|damaged)"):
        decode(encoded[:at])


def test_a_jpeg_inside_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    huge = bytes.fromhex("ffd8 ffc0 000b 08 ffff ffff 01 01 11 00 ffda 0008 01 01 00 00 3f 00") + bytes(64)
    encoded = bytearray(by_hand(8, 1, huge, 16, 16))
    at = encoded.index(struct.pack("<HHII", 259, 3, 1, 1))
    encoded[at : at + 12] = struct.pack("<HHII", 259, 3, 1, 7)
    with pytest.raises(DecodeError, match="the limit against decompression bombs"):
        decode(bytes(encoded))
