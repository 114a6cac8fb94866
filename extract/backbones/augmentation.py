"""Augments training images: a random resized crop and a flip, drawn for every sample and epoch from the seed."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from extract.backbones.preprocessing import build_transform
from extract.images.resize_limit import check_resize

# timm's defaults: share of the image's area, and width / height
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Box = tuple[float, float, float, float]


class Augment:
    """Crop, resize and flip, then scale and normalize as the backbone expects it.

    Args:
        config: timm's data config of the backbone.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        height, width = config["input_size"][1:]
        self._size = width, height
        self._resampling = _RESAMPLING.get(config["interpolation"], Image.Resampling.BICUBIC)
        self._normalize = build_transform({**config, "crop_pct": 1.0})  # for an image of the right size

    def __call__(self, image: Image.Image, draw: np.random.Generator) -> Float[Tensor, "channels height width"]:
        """Draw one augmented view. Raises ResizeError for too thin an image."""
        check_resize(*image.size, *self._size)
        cropped = image.resize(self._size, self._resampling, box=random_box(image.width, image.height, draw))
        if draw.random() < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._normalize(cropped)


def random_box(width: int, height: int, draw: np.random.Generator) -> Box:
    """Draw a crop (left, upper, right, lower); the whole image if ten draws do not fit into it."""
    for _ in range(10):
        area = width * height * draw.uniform(*_SCALE)
        ratio = math.exp(draw.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = draw.uniform(0, width - w), draw.uniform(0, height - h)
            return left, upper, left + w, upper + h
    return 0.0, 0.0, float(width), float(height)
