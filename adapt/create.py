"""A fresh model for a backbone or a store, for users who write their own loop."""

from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import nn

from adapt.explain import explain
from adapt.features import spec_of_backbone, spec_of_store
from adapt.methods import METHODS, build_model, count_params, find_method
from extract.backbone import Backbone, ModelBackbone, empty_backbone, load_backbone
from extract.config import BackboneConfig
from extract.tail import Tail
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
    backbone.tail = backbone.tail and _initialise(backbone.tail)
    return backbone


def _initialise(tail: Tail) -> Tail:
    """From the meta device to the CPU; memory that nothing has written could hold anything."""
    tail = tail.to_empty(device="cpu")
    for tensor in tail.parameters():
        nn.init.normal_(tensor, std=0.02)
    for module in tail.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    return tail


def list_methods(backbone: str, num_classes: int) -> list[dict[str, Any]]:
    """Every method with its default options; `trainable_params` counts without the head, `head_params` the head."""
    shape = empty_backbone(backbone, {})
    spec = spec_of_backbone(shape, range(shape.depth))
    listed = []
    for name, method in METHODS.items():
        with torch.device("meta"):
            model = build_model(name, spec, num_classes, method.options(), shape)
        parameters, head = count_params(model)
        listed.append({"method": name, "needs": method.needs, "trainable_params": parameters, "head_params": head})
    return listed


def print_methods(listed: list[dict[str, Any]], backbone: str) -> None:
    """The list as a table on standard output."""
    table = Table(title=f"methods on {backbone}")
    for heading in ("method", "needs", "trained parameters", "of the head"):
        table.add_column(heading, justify="right" if "param" in heading or "head" in heading else "left")
    for method in listed:
        counts = f"{method['trainable_params']:,}", f"{method['head_params']:,}"
        table.add_row(method["method"], method["needs"].replace("_", " "), *counts)
    Console().print(table)
