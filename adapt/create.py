"""A fresh model for a backbone or a store, for users who write their own loop."""

from typing import Any

import torch
from pydantic import ValidationError
from rich.table import Table
from torch import nn

from adapt.config.messages import explain
from adapt.features.feature_sources import spec_of_backbone, spec_of_store
from adapt.methods.table import METHODS, build_model, count_params, find_method
from extract.backbones.backbone import Backbone, ModelBackbone, empty_backbone, load_backbone
from extract.backbones.pre_logits import PreLogits
from extract.config import BackboneConfig
from store.console.terminal import Terminal
from store.errors import UserError
from store.reader import Store


def create_model(method: str, backbone: str | Backbone | Store, num_classes: int, **options: Any) -> nn.Module:
    """Build a trainable model of any method.

    Args:
        method: a name of `sidecache methods`.
        backbone: a loaded backbone, an open store, or the name of a timm model (of which only the shapes are used; its
            tail is then untrained).
        num_classes: width of the classifier.
        options: the method's own, as in `methods:` of pipeline.yaml.

    Returns:
        a module from {layer: (batch, tokens, dim)} to logits (batch, classes); of an end-to-end method a module from
        preprocessed images (batch, channels, height, width), with a copy of the backbone in it.

    Raises:
        UserError: an unknown method or option, no classes.
    """
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, got {num_classes}")
    kind = find_method(method).options
    try:
        checked = kind.model_validate(options)
    except ValidationError as error:
        raise UserError(f"{method}: {explain(error, kind)}") from error
    if isinstance(backbone, str):
        end_to_end = find_method(method).needs == "end_to_end"
        backbone = _untrained(BackboneConfig(name=backbone, weights="random"), end_to_end)
    if isinstance(backbone, Store):
        return build_model(method, spec_of_store(backbone), num_classes, checked)
    spec = spec_of_backbone(backbone, range(backbone.depth))
    return build_model(method, spec, num_classes, checked, backbone)


def _untrained(config: BackboneConfig, whole: bool) -> ModelBackbone:
    """A backbone with random weights; without its blocks' memory where only its shapes and its tail are needed."""
    if whole:
        return load_backbone(config)
    assert config.name
    backbone = empty_backbone(config.name, config.model_kwargs)
    backbone.tail = backbone.tail and _initialize(backbone.tail)
    return backbone


def _initialize(tail: PreLogits) -> PreLogits:
    """From the meta device to the CPU; memory that nothing has written could hold anything."""
    tail = tail.to_empty(device="cpu")
    for tensor in tail.parameters():
        nn.init.normal_(tensor, std=0.02)
    for module in tail.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    return tail


def list_methods(backbone: str, num_classes: int) -> list[dict[str, Any]]:
    """Every method with its default options; `trainable_params` counts without the head, `head_params` the head.

    Both are None of a method that does not serve this backbone; `unavailable` then says why.
    """
    shape = empty_backbone(backbone, {})
    return [
        {"method": name, "needs": method.needs, **_count(name, num_classes, shape)} for name, method in METHODS.items()
    ]


def _count(name: str, num_classes: int, shape: ModelBackbone) -> dict[str, Any]:
    spec, options = spec_of_backbone(shape, range(shape.depth)), find_method(name).options()
    try:
        with torch.device("meta"):
            parameters, head = count_params(build_model(name, spec, num_classes, options, shape))
    except UserError as error:
        return {"trainable_params": None, "head_params": None, "unavailable": str(error)}
    return {"trainable_params": parameters, "head_params": head, "unavailable": None}


def print_methods(listed: list[dict[str, Any]], backbone: str) -> None:
    """The list as a table on standard output."""
    table = Table(title=f"methods on {backbone}")
    for heading in ("method", "needs", "trained parameters", "of the head"):
        table.add_column(heading, justify="right" if "param" in heading or "head" in heading else "left")
    for method in listed:
        counts = [method["trainable_params"], method["head_params"]]
        shown = ["not available", ""] if method["unavailable"] else [f"{count:,}" for count in counts]
        table.add_row(method["method"], method["needs"].replace("_", " "), *shown)
    terminal = Terminal()
    terminal.print(table)
    for method in listed:
        if method["unavailable"]:
            terminal.print(f"{method['method']}: {method['unavailable']}", highlight=False)
