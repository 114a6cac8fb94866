"""Builds untrained models of any method for users who write their own training loop, and lists the methods."""

from typing import Any

import torch
from pydantic import ValidationError
from rich.table import Table
from torch import nn

from adapt.config.messages import explain
from adapt.features.specs import spec_of_backbone, spec_of_store
from adapt.methods.registry import METHODS, build_model, find_method
from adapt.methods.trained_parameters import count_params
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
            final norm is then untrained).
        num_classes: width of the classifier.
        options: those of the method, as in `methods:` of pipeline.yaml.

    Returns:
        a module from {layer: (batch, tokens, dim)} to logits (batch, classes); of a method that trains inside the
        backbone a module from preprocessed images (batch, channels, height, width), with a copy of the backbone in it.

    Raises:
        UserError: an unknown method or option, no classes.

    Example:
        >>> import sidecache as sc
        >>> from torch.utils.data import DataLoader
        >>> store = sc.open_store("runs/digits/cache.zarr")
        >>> model = sc.create_model("losa", store, num_classes=len(store.classes), rank=8)
        >>> tokens, labels = next(iter(DataLoader(store.dataset("train"), batch_size=4)))
        >>> model(tokens).shape
        torch.Size([4, 10])
    """
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, got {num_classes}")
    options_class = find_method(method).options
    try:
        checked = options_class.model_validate(options)
    except ValidationError as error:
        raise UserError(f"{method}: {explain(error, options_class)}") from error
    if isinstance(backbone, Store):
        return build_model(method, spec_of_store(backbone), num_classes, checked)
    if isinstance(backbone, str):
        backbone = _untrained(backbone, whole=find_method(method).trains_backbone)
    spec = spec_of_backbone(backbone, range(backbone.depth))
    return build_model(method, spec, num_classes, checked, backbone=backbone)


def _untrained(name: str, whole: bool) -> ModelBackbone:
    """A backbone with random weights; if not `whole`, its blocks stay on the meta device and take no memory."""
    if whole:
        return load_backbone(BackboneConfig(name=name, weights="random"))
    backbone = empty_backbone(name, {})
    backbone.tail = backbone.tail and _initialize(backbone.tail)
    return backbone


def _initialize(pre_logits: PreLogits) -> PreLogits:
    """Move from the meta device to the CPU, with random weights."""
    pre_logits = pre_logits.to_empty(device="cpu")
    for tensor in pre_logits.parameters():
        nn.init.normal_(tensor, std=0.02)
    for module in pre_logits.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    return pre_logits


def list_methods(backbone: str, num_classes: int) -> list[dict[str, Any]]:
    """List every method with its parameters at default options.

    Args:
        backbone: the name of a timm model.
        num_classes: width of the classifier.

    Returns:
        for every method: `method`, `needs` (features or end_to_end), `trainable_params` (without the head),
        `head_params`, `unavailable` (why the method cannot train on this backbone; both counts are then None).
    """
    shape = empty_backbone(backbone, {})
    return [
        {
            "method": name,
            "needs": "end_to_end" if method.trains_backbone else "features",
            **_count(name, num_classes, shape),
        }
        for name, method in METHODS.items()
    ]


def _count(name: str, num_classes: int, shape: ModelBackbone) -> dict[str, Any]:
    spec, options = spec_of_backbone(shape, range(shape.depth)), find_method(name).options()
    try:
        with torch.device("meta"):
            parameters, head = count_params(build_model(name, spec, num_classes, options, backbone=shape))
    except UserError as error:
        return {"trainable_params": None, "head_params": None, "unavailable": str(error)}
    return {"trainable_params": parameters, "head_params": head, "unavailable": None}


def print_methods(listed: list[dict[str, Any]], backbone: str) -> None:
    """Print the list as a table."""
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
