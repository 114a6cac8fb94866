"""Finds the depth, width and token layout of the configured backbone without its weights, for the plan."""

import importlib
from pathlib import Path
from typing import Any

from extract.backbones.backbone import ModelBackbone, empty_backbone
from extract.backbones.model_spec import resolve_model
from extract.backbones.vivit_weights import VIVIT, architecture
from extract.config import BackboneConfig, ClipConfig


def backbone_shape(config: BackboneConfig, clips: ClipConfig | None = None) -> ModelBackbone:
    """The backbone on the meta device; its weights need not be here if `backbone.name` is given.

    Raises:
        UserError: a wrong name or argument; neither a name nor weights that contain it.
        JobError: the name is only in the model hub, which cannot be reached.
    """
    frames = clips.frames if clips else None
    if config.name == VIVIT:
        size = {"image_size": config.image_size} if config.image_size else {}
        return empty_backbone(VIVIT, _vivit_kwargs(config.weights) | config.model_kwargs | size, frames)
    return empty_backbone(*_name_and_kwargs(config), frames)


def _name_and_kwargs(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    named = config.weights in ("pretrained", "random")
    if config.name and not named and not Path(config.weights).exists():
        config = config.model_copy(update={"weights": "random"})
    spec = resolve_model(config)
    return spec.name, spec.kwargs


def _vivit_kwargs(weights: str) -> dict[str, Any]:
    """The architecture in a folder of weights; empty if there is no such folder."""
    document = Path(weights) / "config.json"
    if not document.exists():
        return {}
    transformers: Any = importlib.import_module("transformers")
    return architecture(transformers.VivitConfig.from_json_file(document))
