"""Small models of the weight-update methods on several families of backbones."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt.features.specs import spec_of_backbone
from adapt.methods.in_backbone.target_modules import TargetViT
from adapt.methods.in_backbone.tuned_backbone import Inject, TunedBackbone, TunedOptions
from adapt.methods.in_backbone.updated_linear import update_tensors
from adapt.methods.registry import build_model, find_method
from adapt.methods.trained_parameters import count_params
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


# case -> method, options
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 2, "alpha": 3.0}),
    "lora_fix": ("lora_fix", {"rank": 2}),
    "kronecker": ("kronecker", {"n": 4, "rank": 2, "scale": 0.5, "bias": True}),
    "kronecker of slow rank 2": ("kronecker", {"n": 4, "slow_rank": 2, "scale": 0.5, "bias": True}),
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
            nn.init.ones_(tensor)  # layer scales start so small that the blocks would have no effect
    return backbone


def build(case: str, family: str = "vit", **more: Any) -> TunedBackbone:
    """An untrained model of a case of METHODS; `more` takes precedence over its options."""
    method, options = METHODS[case]
    return build_method(method, family, **(options | more))


def build_method(method: str, family: str = "vit", **options: Any) -> TunedBackbone:
    """An untrained model of any method that trains inside the backbone."""
    return _build(method, backbone_of(family), options)


def _build(method: str, backbone: TimmBackbone, options: dict[str, Any]) -> Any:
    spec, checked = spec_of_backbone(backbone, range(backbone.depth)), find_method(method).options(**options)
    return build_model(method, spec, CLASSES, checked, backbone=backbone)


def build_with(inject: Inject, family: str = "vit") -> TunedBackbone:
    """A model with any inject function."""
    backbone = backbone_of(family)
    spec = spec_of_backbone(backbone, range(backbone.depth))
    return TunedBackbone(backbone, spec, CLASSES, inject=inject, options=TunedOptions())


def inject_nothing(vit: TargetViT, options: TunedOptions) -> None:
    """Leave the model frozen, under the read-out."""


def draw_images(family: str = "vit", batch: int = 3) -> Tensor:
    return torch.randn(batch, *backbone_of(family).image_size)


def disturb(model: nn.Module) -> nn.Module:
    """Set the tensors of all updates to random values, as if they had been trained."""
    for tensor in update_tensors(model).values():
        nn.init.normal_(tensor, std=0.3)
    return model


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()


def count_on_meta(method: str, width: int = 768, **options: Any) -> int:
    """The number of parameters that a method trains in a ViT of 12 blocks of this width."""
    backbone = empty_backbone("vit_base_patch16_224", {} if width == 768 else {"embed_dim": width, "num_heads": 8})
    with torch.device("meta"):
        return count_params(_build(method, backbone, options))[0]
