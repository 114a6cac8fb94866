"""Builds timm models by name, and refuses names and arguments that are wrong or would load something else."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from extract.backbones.module_count_limit import limit_module_count
from store.errors import UserError
from store.out_of_memory import is_shortage

_MAX_NUMBER = 16_384  # for an integer of model_kwargs, also inside a list
# arguments of timm.create_model that the configuration sets elsewhere
_RESERVED = {
    "pretrained": "set backbone.weights",
    "checkpoint_path": "set backbone.weights",
    "num_classes": "a backbone has no classifier",
    "in_chans": "images have three channels",
    "features_only": "tokens are tapped from the whole model",
}


@dataclass(frozen=True)
class ModelSpec:
    """Which timm model to build, and the file to load into it.

    Attributes:
        kwargs: of `timm.create_model`.
        file: the weights; None for random weights, and for those of the model hub.
        pretrained_cfg: overrides timm's, if a hub folder gives one.
    """

    name: str
    kwargs: dict[str, Any]
    file: Path | None = None
    pretrained_cfg: dict[str, Any] | None = None


def build_empty(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model without classifier and weights, on the meta device: shapes at no cost, even of ViT-g.

    Raises:
        UserError: as of `create_model`.
    """
    with torch.device("meta"):
        return create_model(ModelSpec(name, kwargs), num_classes=0)


def create_model(spec: ModelSpec, **kwargs: Any) -> nn.Module:
    """Call `timm.create_model`, with its untrained weights.

    Raises:
        UserError: timm has no model of that name, or cannot build it with these arguments.
    """
    _require_legal(spec)
    try:
        with limit_module_count():
            model: nn.Module = timm.create_model(spec.name, **spec.kwargs, **kwargs)
    except Exception as error:  # wrong arguments surface anywhere in a model's constructor
        if is_shortage(error):
            raise
        raise UserError(
            f"timm cannot build {spec.name!r} with model_kwargs {spec.kwargs}: {first_line(error)}"
        ) from error
    return model


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _require_legal(spec: ModelSpec) -> None:
    if ":" in spec.name:  # timm would download it
        raise UserError(f"backbone.name {spec.name!r} is no timm model; write it as backbone.weights: {spec.name}")
    if not timm.is_model(spec.name):
        near = difflib.get_close_matches(spec.name, timm.list_models(), n=5, cutoff=0.5) or ["vit_base_patch16_224"]
        raise UserError(
            f"backbone.name {spec.name!r} is no timm model; near ones: {', '.join(near)} (see timm.list_models())"
        )
    if reserved := [name for name in spec.kwargs if name in _RESERVED]:
        raise UserError(f"backbone.model_kwargs may not hold {reserved[0]!r}: {_RESERVED[reserved[0]]}")
    for key, value in spec.kwargs.items():
        if (largest := _largest_number(value)) > _MAX_NUMBER:
            raise UserError(f"backbone.model_kwargs.{key} is {largest:,}; legal: at most {_MAX_NUMBER:,}")


def _largest_number(value: Any) -> int:
    """The largest integer in a value of model_kwargs; 0 if it holds none."""
    if isinstance(value, list | tuple):
        return max(map(_largest_number, value), default=0)
    return value if isinstance(value, int) else 0
