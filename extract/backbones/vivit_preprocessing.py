"""Translates the preprocessor config of a ViViT checkpoint in transformers to timm's data config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torchvision.transforms import CenterCrop, Compose

from extract.backbones.preprocessing import Transform, build_transform
from store.errors import UserError

# the defaults of VivitImageProcessor
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": Image.Resampling.BILINEAR,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 127.5,
    "offset": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def vivit_data_config(preprocessor_config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The data config of timm for a preprocessor config; if that is empty, for Google's preprocessing.

    Google's resizes the shorter side to 256, crops the center 224, and scales to [-1, 1].

    Args:
        preprocessor_config: the fields of a `preprocessor_config.json`.
        size: (height, width) of a frame in pixels; if the config has another one, resize and crop keep their ratio.

    Raises:
        UserError: a resize or crop that timm's data config cannot express.
    """
    fields = _DEFAULTS | (dict(preprocessor_config) or {"do_normalize": False})
    crop, resized = _sides(fields["crop_size"]), _sides(fields["size"])
    if not fields["do_resize"] or not fields["do_center_crop"] or crop[0] * resized[1] != crop[1] * resized[0]:
        given = {name: fields[name] for name in ("do_resize", "size", "do_center_crop", "crop_size")}
        raise UserError(
            f"this ViViT's preprocessing is not supported: {given}; legal: a resize, then a crop of the same shape"
        )
    scale = 255 * (fields["rescale_factor"] if fields["do_rescale"] else 1)  # timm's pixels are in [0, 1]
    offset = 1 if fields["do_rescale"] and fields["offset"] else 0
    mean, std = (fields["image_mean"], fields["image_std"]) if fields["do_normalize"] else ([0.0] * 3, [1.0] * 3)
    return {
        "input_size": (3, *size),
        "interpolation": Image.Resampling(fields["resample"]).name.lower(),
        "mean": tuple((m + offset) / scale for m in mean),
        "std": tuple(s / scale for s in std),
        "crop_pct": _crop_pct(crop[0], resized[0]),
        "crop_mode": "center" if "shortest_edge" in fields["size"] else "squash",
    }


def build_vivit_transform(config: dict[str, Any]) -> Transform:
    """Build timm's evaluation transform with transformers' center crop, which rounds half an odd margin down."""
    steps = build_transform(config).transforms  # type: ignore[attr-defined]
    transform: Transform = Compose(
        [_CenterCrop(*step.size) if isinstance(step, CenterCrop) else step for step in steps]
    )
    return transform


@dataclass(frozen=True)
class _CenterCrop:
    """The middle `height` x `width` pixels of an image."""

    height: int
    width: int

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def _sides(size: Mapping[str, int]) -> tuple[int, int]:
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])


def _crop_pct(crop: int, resized: int) -> float:
    """The ratio crop / resized, adjusted so that floor(crop / crop_pct), as in timm, is exactly `resized`."""
    crop_pct = crop / resized
    return crop_pct if math.floor(crop / crop_pct) == resized else math.nextafter(crop_pct, 0)
