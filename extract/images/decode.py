"""Decodes an image to upright 8-bit RGB, in the same way for every source, or raises DecodeError.

Alpha is dropped, not composited, as `convert("RGB")` does in torchvision's and timm's loaders, with which the weights
were trained. 16-bit grayscale is scaled to 8 bits; Pillow's own conversion would clip it.
"""

import importlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from extract.images.jpeg import load_jpeg
from extract.images.png import check_png
from extract.images.tiff import load_tiff
from store.errors import UserError

Image.init()
with suppress(ImportError):  # the extra `heif`
    importlib.import_module("pillow_heif").register_heif_opener()

# Only formats that are decoded in this process: Pillow's EPS and WMF readers, for instance, start other programs.
_SUPPORTED = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "GIF", "JPEG2000", "MPO", "PPM", "TIFF")
FORMATS = tuple(name for name in _SUPPORTED if name in Image.OPEN)
EXTENSIONS = frozenset(ext for ext, name in Image.registered_extensions().items() if name in FORMATS) | {".mpo"}

_REMEDY = "Repair or remove it, or set data.on_error: skip to go on without such samples"
_MAX_SCANS = 100  # encoders write ten or twenty; each costs another pass over all pixels, but only a few bytes
_TILE_SIDES = (322, 323)  # TIFF tags
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(UserError):
    """A sample cannot be decoded. Its only argument is the message, from which torch's workers rebuild it."""


def decode_rgb(encoded: bytes, sample_id: str) -> Image.Image:
    """Decode an image file to upright 8-bit RGB; of an animation, the first frame.

    Raises:
        DecodeError: the bytes are not an image, or a damaged one; the message names `sample_id`.
    """
    if not encoded:
        raise undecodable(sample_id, ValueError("it is empty"))
    try:
        image = _load(encoded)
    except MemoryError:
        raise
    except Exception as error:  # for damaged bytes Pillow's readers may raise nearly any error
        raise undecodable(sample_id, error) from error
    return to_rgb(image, sample_id)


def to_rgb(image: Image.Image, sample_id: str) -> Image.Image:
    """Convert a decoded image of any mode to 8-bit RGB, turned upright by its EXIF orientation.

    Raises:
        DecodeError: the image has no pixels, or pixels whose white is unknown; the message names `sample_id`.
    """
    try:
        if 0 in image.size:
            raise ValueError(f"it has no pixels (size {image.width} x {image.height})")
        turn = _UPRIGHT.get(_orientation(image))  # read before the conversion, which may drop it
        rgb = _convert(image)
        return rgb if turn is None else rgb.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:
        raise undecodable(sample_id, error) from error


def undecodable(sample_id: str, error: Exception) -> DecodeError:
    """The DecodeError of a sample, with its cause and the remedy."""
    return DecodeError(f"sample {sample_id!r} cannot be decoded: {_reason(error)}. {_REMEDY}")


def without_remedy(message: str) -> str:
    """The message of a DecodeError without its remedy, which is that of a job."""
    return message.removesuffix(f". {_REMEDY}")


def _load(encoded: bytes) -> Image.Image:
    """Decode with the strictest reader of the format, so that missing or damaged data are an error."""
    with _quiet_pillow():
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_effort(image, encoded)
        if isinstance(image, TiffImageFile):
            return load_tiff(image, encoded)  # Pillow reads more tags here, and may warn of them
    if image.format in ("JPEG", "MPO"):
        return load_jpeg(image, encoded)
    if image.format == "PNG":
        check_png(encoded)
    image.load()
    return image


def _check_effort(image: Image.Image, encoded: bytes) -> None:
    """Limit scans and tile sizes; Pillow limits only pixels and text."""
    if "progressive" in image.info and (n_scans := encoded.count(b"\xff\xda")) > _MAX_SCANS:
        raise ValueError(f"it has {n_scans} scans; legal: at most {_MAX_SCANS}; save it again")
    if isinstance(image, TiffImageFile):
        width, length = (image.tag_v2.get(side, 0) for side in _TILE_SIDES)
        if Image.MAX_IMAGE_PIXELS and width * length > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 if the EXIF block is damaged, since the pixels are still good."""
    try:
        with _quiet_pillow():
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_wide_gray(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a fixed white value; save it with 8 or 16 bits")
    if image.mode == "RGB":
        return image
    if image.mode == "La":
        return image.convert("LA").convert("RGB")
    if image.mode in ("P", "PA"):
        # Via RGBA, with the same colors: the direct conversion warns of a palette with transparency.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """Scale modes I;16 and I (which has 16 bits in some formats) to 8 bits: 65535 becomes 255."""
    gray = np.asarray(image)  # (height, width), uint16 or int32
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError(f"its gray values {gray.min()} to {gray.max()} exceed 16 bits; save it with 8 or 16 bits")
    return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit against decompression bombs; scale it down"
    if isinstance(error, UnidentifiedImageError):
        return f"it is not an image in a known format ({', '.join(FORMATS)}), or of a kind that Pillow cannot read"
    return str(error) or type(error).__name__


_filters_lock = threading.Lock()


def _renew_lock() -> None:
    """Replace the lock in a forked DataLoader worker: in the parent, another thread may have held it."""
    global _filters_lock
    _filters_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Ignore Pillow's warnings, except that of a decompression bomb, which becomes an error.

    Warning filters are global, so threads take turns; pixels are decoded outside of this block.
    """
    with _filters_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
