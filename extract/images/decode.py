"""Encoded bytes to an upright 8-bit RGB image, the same for every source, or a DecodeError.

Alpha is dropped, not composited: that is what `convert("RGB")` does in torchvision's and timm's loaders, hence what
their weights were trained on. 16-bit grayscale is scaled to 8 bits, where Pillow's own conversion would clip it.
"""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from extract.images.jpeg import load_jpeg
from extract.images.png import check_png
from extract.images.tiff import load_tiff
from store.errors import UserError

Image.init()

# Only formats that Pillow decodes by itself: its EPS and WMF readers, for instance, start other programs.
_WANTED = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "MPO", "PPM", "TIFF")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
ENDINGS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS) | {".mpo"}

_MOST_SCANS = 100  # an encoder writes ten or twenty; a few bytes more cost another pass over all pixels
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
    """One sample is no image that can be decoded. Takes the whole message, as torch's workers rebuild it from that."""


def decode_rgb(encoded: bytes, sample_id: str) -> Image.Image:
    """Upright 8-bit RGB; the first frame of an animation."""
    if not encoded:
        raise undecodable(sample_id, ValueError("it holds no bytes"))
    try:
        image = _load(encoded)
    except MemoryError:
        raise
    except Exception as error:  # from damaged bytes Pillow's readers may raise nearly anything
        raise undecodable(sample_id, error) from error
    return to_rgb(image, sample_id)


def to_rgb(image: Image.Image, sample_id: str) -> Image.Image:
    """A decoded image of any mode, turned upright by its EXIF orientation, as 8-bit RGB."""
    try:
        if 0 in image.size:
            raise ValueError(f"it has no pixels (size {image.width} x {image.height})")
        turn = _UPRIGHT.get(_orientation(image))  # read first: the conversion may drop it
        rgb = _convert(image)
        return rgb if turn is None else rgb.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:
        raise undecodable(sample_id, error) from error


def undecodable(sample_id: str, error: Exception) -> DecodeError:
    return DecodeError(
        f"sample {sample_id!r} cannot be decoded: {_reason(error)}. "
        "Repair or remove it; a job with data.on_error: skip goes on without such samples"
    )


def _load(encoded: bytes) -> Image.Image:
    """The decoded image; where a format can tell that data are missing or damaged, they are an error."""
    with _quiet_pillow():
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_effort(image, encoded)
        if isinstance(image, TiffImageFile):
            return load_tiff(image, encoded)  # reads the rest of its tags, and warns of them, only here
    if image.format in ("JPEG", "MPO"):
        return load_jpeg(image, encoded)
    if image.format == "PNG":
        check_png(encoded)
    image.load()
    return image


def _check_effort(image: Image.Image, encoded: bytes) -> None:
    """Pillow has limits for pixels and texts, but not for these."""
    if "progressive" in image.info and (n_scans := encoded.count(b"\xff\xda")) > _MOST_SCANS:
        raise ValueError(f"it has {n_scans} scans, where {_MOST_SCANS} are legal; save it anew")
    if isinstance(image, TiffImageFile):
        width, length = (image.tag_v2.get(side, 0) for side in _TILE_SIDES)
        if Image.MAX_IMAGE_PIXELS and width * length > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8, and 1 where the EXIF block is damaged: the pixels are still good."""
    try:
        with _quiet_pillow():
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_wide_gray(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no fixed white; save it with 8 or 16 bits")
    if image.mode == "RGB":
        return image
    if image.mode == "La":
        return image.convert("LA").convert("RGB")
    if image.mode in ("P", "PA"):
        # By way of RGBA, because a palette with transparency makes the direct conversion warn; same colors.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """Modes I;16 and I (which holds 16 bits too, in some formats): 65535 becomes 255."""
    gray = np.asarray(image)  # (height, width), uint16 or int32
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError(f"its gray values {gray.min()} to {gray.max()} exceed 16 bits; save it with 8 or 16 bits")
    return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit against decompression bombs; shrink it"
    if isinstance(error, UnidentifiedImageError):
        return f"it is not an image in a known format ({', '.join(FORMATS)}), or of a kind that Pillow does not read"
    return str(error) or type(error).__name__


_filters_lock = threading.Lock()


def _renew_lock() -> None:
    """A forked DataLoader worker must not inherit a lock that a thread of its parent held."""
    global _filters_lock
    _filters_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow's warnings ignored, but for the decompression bomb, which becomes an error.

    Warning filters belong to the whole process, so threads take turns; pixels are decoded outside.
    """
    with _filters_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
