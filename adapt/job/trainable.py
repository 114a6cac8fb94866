"""Whether the methods of a job can be trained at all: asked before hours are spent on its store."""

import torch

from adapt.config.pipeline import Config
from adapt.features.specs import spec_of_backbone
from adapt.job.checks import require_whole
from adapt.methods.registry import build_model, find_method
from extract.backbones.backbone import Backbone
from extract.backbones.backbone_shape import backbone_shape
from extract.forward.device import resolve_device
from store.layout import resolve_layers


def require_trainable(config: Config, own_backbone: Backbone | None = None) -> None:
    """Build every method of a job, on the meta device, where nothing takes time or memory.

    Args:
        own_backbone: a module of the user's, in place of `backbone:`.

    Raises:
        UserError: a method does not fit the backbone, or the layers and tokens that the store is to keep; the device
            that is to train is not there.
    """
    resolve_device(config.train.device)
    backbone = own_backbone or backbone_shape(config.backbone, config.data.clips)
    spec = spec_of_backbone(backbone, resolve_layers(config.store.layers, backbone.depth), config.store.tokens)
    for method in config.parsed_methods():
        whole = require_whole(backbone, spec) if find_method(method.name).trains_backbone else None
        for options in method.different_options:
            if not options.needs_measurement:
                with torch.device("meta"):
                    build_model(method.name, spec, 2, options, backbone=whole)
