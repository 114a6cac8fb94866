"""Warns of pixels that were never normalized: the backbone computes with them, and every class is wrong."""

import warnings
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from store.errors import Note

_BRIGHT = 20.0  # no normalized value is as large
_LIGHT = 0.5  # a picture without any larger value may be normalized


class RawPixelCheck:
    """Looks at the tensors that one adaptor is given, and warns once.

    Args:
        transform: the backbone's own.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self._transform, self._has_warned = transform, False

    def warn_of(self, images: Tensor) -> None:
        """Warn if the values of images are those of a file, not those of the transform."""
        if self._has_warned or images.numel() == 0:
            return
        reason = self._find_reason(images)
        if reason:
            self._has_warned = True
            warnings.warn(
                f"these images seem not to be normalized: {reason}; use adaptor.transform on every PIL image, or give "
                "the images themselves to adaptor.predict",
                Note,
                stacklevel=2,
            )

    def _find_reason(self, images: Tensor) -> str:
        if not images.is_floating_point():
            return f"their type is {images.dtype}"
        smallest, largest = (float(value) for value in torch.aminmax(images))
        if smallest >= 0 and _BRIGHT < largest <= 255:
            return "their values are between 0 and 255"
        if smallest >= 0 and _LIGHT < largest <= 1 and self._makes_negative():
            return "their values are between 0 and 1, where the backbone has negative ones for dark pixels"
        return ""

    def _makes_negative(self) -> bool:
        """Whether the transform gives a black image negative values."""
        return bool(torch.as_tensor(self._transform(Image.new("RGB", (256, 256)))).amin() < 0)
