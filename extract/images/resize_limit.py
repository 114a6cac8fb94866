"""Limits the pixels that Pillow allocates to resize an image: for a thin image, far more than the image has."""

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image


class ResizeError(ValueError):
    """An image is so thin that resizing it would take more memory than the largest legal image does."""


def check_resize(width: int, height: int, new_width: int, new_height: int) -> None:
    """Refuse a resize with more pixels than Pillow's limit for an image, in the result or between its two steps.

    Raises:
        ResizeError: there would be more pixels, or none.
    """
    if not new_width or not new_height:
        raise ResizeError(f"resizing its {width} x {height} pixels leaves none; crop or remove it")
    # Pillow first resizes all rows to the new width, then the columns.
    n_pixels = new_width * max(height, new_height)
    if Image.MAX_IMAGE_PIXELS and n_pixels > Image.MAX_IMAGE_PIXELS:
        raise ResizeError(
            f"its {width} x {height} pixels become {n_pixels:,} during the resize, more than the limit of "
            f"{Image.MAX_IMAGE_PIXELS:,}; crop or remove it"
        )


@dataclass(frozen=True)
class ResizeLimit:
    """A transform that refuses an image that the next transform, a resize, would make too large.

    Args:
        width: of the resize.
        height: of the resize.
        to: `exact` if the resize gives `width` x `height`; `cover` or `fit` if it keeps the aspect ratio, and the
            result covers this size or fits into it.
    """

    width: int
    height: int
    to: Literal["exact", "cover", "fit"]

    def __call__(self, image: Any) -> Any:
        """The image, unchanged; raises ResizeError if it is refused. A tensor is not checked."""
        if isinstance(image, Image.Image):
            check_resize(image.width, image.height, *self._resized(image.width, image.height))
        return image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.to == "exact":
            return self.width, self.height
        choose = max if self.to == "cover" else min
        scale = choose(self.width / width, self.height / height)
        return round(width * scale), round(height * scale)
