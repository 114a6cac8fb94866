"""Adaptors of the tiny backbone, as a job would save them."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_vit import TINY
from torch import nn

import sidecache as sc
from adapt.adaptors.card import Card, card_document
from extract.backbones.backbone import TimmBackbone, digests
from extract.config import BackboneConfig

BACKBONE = BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY)
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_probe": {"pool": "cls_mean"},
    "losa": {"rank": 4, "token_rank": 2, "layers": [0, 2]},
    "knn": {"k": 2},
}


def trained(method: str, backbone: TimmBackbone) -> nn.Module:
    """A model in which no trained tensor and no statistic has its initial value."""
    torch.manual_seed(0)
    model = sc.create_model(method, backbone, 3, **OPTIONS[method])
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.1 * torch.randn_like(tensor))
        width = len(model.readout.mean)
        model.readout.standardize(torch.randn(20, width) * 3 + 1, torch.zeros(width))
        if method == "knn":
            model.readout.head.fill(torch.randn(5, width), torch.eye(3)[[0, 1, 2, 0, 1]], multi_label=False)
    return model.eval()


def card_for(method: str, made_for: TimmBackbone, **changes: Any) -> Card:
    fields: dict[str, Any] = {
        "method": method,
        "options": OPTIONS[method],
        "backbone": BACKBONE,
        "precision": "float32",
        "layers": (0, 1, 2),
        "tokens": "all",
        "classes": ("a", "b", "c"),
        "multi_label": False,
        "metrics": {"top1": 50.0, "mean_average_precision": None},
        "train_precision": "float32",
        **digests(made_for),
    }
    return Card(**(fields | changes))


def card_of(path: Path) -> dict[str, Any]:
    """The card of an adaptor, without digest and checksum."""
    card: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return {name: value for name, value in card.items() if name not in ("tensors_digest", "checksum")}


def forge_card(path: Path, **changes: Any) -> Path:
    """Change a card (and, before the call, the tensors) such that digest and checksum are right."""
    path.with_suffix(".json").write_text(json.dumps(card_document(card_of(path) | changes, path)))
    return path
