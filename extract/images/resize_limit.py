"""How many pixels Pillow makes of an image while it resizes it: for a thin one far more than the image has."""

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image


class ResizeError(ValueError):
    """An image so thin that it cannot be resized within the memory that the largest legal image takes."""


def check_resize(width: int, height: int, new_width: int, new_height: int) -> None:
    """Refuse more pixels than Pillow's limit for an image, be it in the result or between the two steps to it.

    Raises:
        ResizeError: there would be more, or none.
    """
    if not new_width or not new_height:
        raise ResizeError(f"nothing is left of its {width} x {height} pixels once it is resized; crop or remove it")
    # Pillow resizes all rows to the new width first, and then the columns.
    n_pixels = new_width * max(height, new_height)
    if Image.MAX_IMAGE_PIXELS and n_pixels > Image.MAX_IMAGE_PIXELS:
        raise ResizeError(
            f"its {width} x {height} pixels become {n_pixels:,} while it is resized, more than the limit of "
            f"{Image.MAX_IMAGE_PIXELS:,}; crop or remove it"
        )


@dataclass(frozen=True)
class ResizeLimit:
    """Hands an image on to a resize that stays within the limit.

    Args:
        to: whether the resize gives exactly `width` x `height`, or keeps the ratio of sides and covers that, or fits
            into it.
    """

    width: int
    height: int
    to: Literal["exact", "cover", "fit"]

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Image.Image):
            check_resize(image.width, image.height, *self._resized(image.width, image.height))
        return image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.to == "exact":
            return self.width, self.height
        choose = max if self.to == "cover" else min
        scale = choose(self.width / width, self.height / height)
        return round(width * scale), round(height * scale)
