"""The backbone of a configuration without its weights: what a plan needs of it."""

import importlib
from pathlib import Path
from typing import Any

from extract.backbones.backbone import ModelBackbone, empty_backbone
from extract.backbones.vivit_weights import VIVIT, architecture
from extract.backbones.weights import recipe_of
from extract.config import BackboneConfig, ClipConfig


def backbone_shape(config: BackboneConfig, clips: ClipConfig | None = None) -> ModelBackbone:
    """The backbone on the meta device. Weights that are not here are done without, wherever a name says enough.

    Raises:
        UserError: a wrong name or argument; neither a name nor weights that tell it.
        JobError: only the model hub knows the name, and it cannot be reached.
    """
    frames = clips.frames if clips else None
    if config.name == VIVIT:
        size = {"image_size": config.image_size} if config.image_size else {}
        return empty_backbone(VIVIT, _vivit_folder(config.weights) | config.model_kwargs | size, frames)
    return empty_backbone(*_name_and_kwargs(config), frames)


def _name_and_kwargs(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    named = config.weights in ("pretrained", "random")
    if config.name and not named and not Path(config.weights).exists():
        config = config.model_copy(update={"weights": "random"})
    recipe = recipe_of(config)
    return recipe.name, recipe.kwargs


def _vivit_folder(weights: str) -> dict[str, Any]:
    """What a folder of weights says of its architecture; nothing where there is no such folder."""
    document = Path(weights) / "config.json"
    if not document.exists():
        return {}
    transformers: Any = importlib.import_module("transformers")
    return architecture(transformers.VivitConfig.from_json_file(document))
