"""Backbones under methods that train inside them, for the tests of these methods."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt.features.feature_sources import spec_of_backbone
from adapt.methods.in_backbone.kronecker import inject_kronecker
from adapt.methods.in_backbone.linear_updates import update_tensors
from adapt.methods.in_backbone.lora import inject_lora, inject_lora_fix
from adapt.methods.in_backbone.target_modules import Vit
from adapt.methods.in_backbone.tuned_backbone import Install, Tuned
from adapt.methods.table import count_params
from extract.backbones.backbone import TimmBackbone, empty_backbone, load_backbone
from extract.config import BackboneConfig

CLASSES = 5


SIZE = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}


# name -> timm model, keyword arguments beside SIZE
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "not square": ("vit_tiny_patch16_224", {"img_size": (32, 48)}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "eva, separate": ("eva02_tiny_patch14_224", {"qkv_fused": False}),
    "eva, gates apart": ("eva02_base_patch14_224", {"swiglu_mlp": True, "scale_mlp": True}),
    "beit": ("beit_base_patch16_224", {}),
}


# install, options
METHODS: dict[str, tuple[Install, dict[str, Any]]] = {
    "lora": (inject_lora, {"rank": 2, "alpha": 3.0}),
    "lora_fix": (inject_lora_fix, {"rank": 2}),
    "kronecker": (inject_kronecker, {"n": 4, "rank": 2, "scale": 0.5, "bias": True}),
    "kronecker of slow rank 2": (inject_kronecker, {"n": 4, "slow_rank": 2, "scale": 0.5, "bias": True}),
}


methods = pytest.mark.parametrize("method", METHODS)


@lru_cache
def backbone_of(family: str) -> TimmBackbone:
    name, kwargs = FAMILIES[family]
    size = None if "img_size" in kwargs else 32
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights="random", image_size=size, model_kwargs=SIZE | kwargs)
    backbone = load_backbone(config)
    for name, tensor in backbone.module.named_parameters():
        if "gamma" in name:
            nn.init.ones_(tensor)  # layer scales start so small that the blocks would not matter
    return backbone


def build(method: str, family: str = "vit", **more: Any) -> Tuned:
    """An untrained model; `more` takes precedence over the options of METHODS."""
    install, options = METHODS[method]
    return build_with(install, family, **(options | more))


def build_with(install: Install, family: str = "vit", **options: Any) -> Tuned:
    backbone = backbone_of(family)
    return Tuned(backbone, spec_of_backbone(backbone, range(backbone.depth)), CLASSES, install, **options)


def inject_nothing(vit: Vit) -> None:
    """The frozen model under the read-out."""


def draw_images(family: str = "vit", batch: int = 3) -> Tensor:
    return torch.randn(batch, *backbone_of(family).image_size)


def disturb(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    for tensor in update_tensors(model).values():
        nn.init.normal_(tensor, std=0.3)
    return model


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()


def count_on_meta(install: Install, width: int = 768, **options: Any) -> int:
    """What a method trains in a ViT of 12 blocks and of this width."""
    backbone = empty_backbone("vit_base_patch16_224", {} if width == 768 else {"embed_dim": width, "num_heads": 8})
    with torch.device("meta"):
        spec = spec_of_backbone(backbone, range(backbone.depth))
        return count_params(Tuned(backbone, spec, CLASSES, install, **options))[0]
