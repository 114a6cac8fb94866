"""Builds timm's evaluation transform, and a digest that changes with anything it does to pixels."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms import ResizeKeepRatio
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose, Resize

from extract.images.resize_limit import ResizeLimit

Transform = Callable[[Image.Image], Float[Tensor, "channels height width"]]


def data_config(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """The data config of a timm model: input size, mean, std, interpolation, crop."""
    model_size = getattr(getattr(model, "patch_embed", None), "img_size", None)  # model_kwargs may have set it
    args: dict[str, Any] = {}
    if model_size:
        args["input_size"] = (3, *model_size)
    elif image_size:
        args["img_size"] = image_size
    config: dict[str, Any] = resolve_data_config(args, model=model)  # type: ignore[no-untyped-call]
    return config


def build_transform(config: dict[str, Any]) -> Transform:
    """Build timm's evaluation transform: resize, center crop, scale, normalize.

    The transform raises ResizeError for images that are too thin.
    """
    steps = create_transform(**config, is_training=False).transforms
    resize = next(step for step in steps if isinstance(step, Resize | ResizeKeepRatio))
    transform: Transform = Compose([_limit(resize), *steps])
    return transform


def _limit(resize: Resize | ResizeKeepRatio) -> ResizeLimit:
    if isinstance(resize.size, int):
        return ResizeLimit(resize.size, resize.size, to="cover")
    height, width = resize.size
    if isinstance(resize, Resize):
        return ResizeLimit(width, height, to="exact")
    return ResizeLimit(width, height, to="fit" if resize.longest else "cover")


def describe(config: dict[str, Any]) -> str:
    """The data config as one line of JSON, for provenance and messages."""
    return json.dumps(config, sort_keys=True, default=list)


def is_described(preprocessing: str) -> bool:
    """Whether `describe` wrote this, for a named model; the text of a user's own transform looks different."""
    return preprocessing.startswith("{")


def transform_digest(transform: Transform) -> str:
    """Digest of the transform's output for a fixed synthetic image (not square, with gradients and edges)."""
    y, x = np.mgrid[0:181, 0:263]
    pixels = np.stack([(3 * x + y) % 256, (x * y // 7) % 256, 255 * ((x // 16 + y // 16) % 2)], axis=-1)
    result = transform(Image.fromarray(pixels.astype(np.uint8)))
    values = torch.as_tensor(result).contiguous()
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
