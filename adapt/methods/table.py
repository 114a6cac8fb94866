"""The table of methods: name -> options, builder, and what it trains from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from adapt.methods.feature_spec import FeatureSpec, TrainableBackbone
from adapt.methods.from_features.attentive_probe import AttentiveProbe, AttentiveProbeOptions
from adapt.methods.from_features.ladder import Ladder, LadderOptions
from adapt.methods.from_features.linear_probe import LinearProbe, LinearProbeOptions
from adapt.methods.from_features.losa import LoSA, LoSAOptions
from adapt.methods.from_features.transformer_probe import TransformerProbe, TransformerProbeOptions
from adapt.methods.in_backbone.adapters import AdapterDropOptions, AdapterOptions, inject_adapters
from adapt.methods.in_backbone.compacter import CompacterOptions, inject_compacter
from adapt.methods.in_backbone.kronecker import KroneckerOptions, inject_kronecker
from adapt.methods.in_backbone.lepe import inject_lepe
from adapt.methods.in_backbone.linear_updates import update_tensors
from adapt.methods.in_backbone.lora import LoRAOptions, inject_lora, inject_lora_fix
from adapt.methods.in_backbone.parameter_subsets import train_all, train_attention, train_biases, train_norms
from adapt.methods.in_backbone.prompt import PromptOptions, inject_prompts
from adapt.methods.in_backbone.random_subspace import IntrinsicOptions, inject_intrinsic
from adapt.methods.in_backbone.relative_position_bias import inject_rpb
from adapt.methods.in_backbone.tuned_backbone import Install, Tuned, TunedOptions
from store.errors import UserError
from store.strict_model import StrictModel


@dataclass(frozen=True)
class Method:
    """One way to adapt a backbone; its options are the keyword arguments of `build` or `install`.

    `build(spec, num_classes, **options)` returns the model of a method that trains from features. `install(vit,
    **options)` changes a copy of the backbone in place, for a method that trains end to end (tuned_backbone.py).
    `solved` methods are brought to their optimum (`adapt.training.linear_solver`) and have no learning rate; the others
    are trained step by step (`adapt.training.loop`).
    """

    options: type[StrictModel]
    build: Callable[..., nn.Module] | None = None
    install: Install | None = None
    solved: bool = False

    @property
    def needs(self) -> Literal["features", "end_to_end"]:
        """What it trains from: stored features, or images and gradients through the backbone."""
        return "features" if self.build else "end_to_end"


METHODS: dict[str, Method] = {
    "linear_probe": Method(LinearProbeOptions, LinearProbe, solved=True),
    "attentive_probe": Method(AttentiveProbeOptions, AttentiveProbe),
    "losa": Method(LoSAOptions, LoSA),
    "ladder": Method(LadderOptions, Ladder),
    "transformer_probe": Method(TransformerProbeOptions, TransformerProbe),
    "full": Method(TunedOptions, install=train_all),
    "bitfit": Method(TunedOptions, install=train_biases),
    "layernorm": Method(TunedOptions, install=train_norms),
    "attention": Method(TunedOptions, install=train_attention),
    "lora": Method(LoRAOptions, install=inject_lora),
    "lora_fix": Method(LoRAOptions, install=inject_lora_fix),
    "kronecker": Method(KroneckerOptions, install=inject_kronecker),
    "adapter": Method(AdapterOptions, install=inject_adapters),
    "adapter_drop": Method(AdapterDropOptions, install=inject_adapters),
    "compacter": Method(CompacterOptions, install=inject_compacter),
    "lepe": Method(TunedOptions, install=inject_lepe),
    "rpb": Method(TunedOptions, install=inject_rpb),
    "prompt": Method(PromptOptions, install=inject_prompts),
    "intrinsic": Method(IntrinsicOptions, install=inject_intrinsic),
}


def find_method(name: str) -> Method:
    """The method of that name."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; legal: {', '.join(METHODS)}")
    return METHODS[name]


def build_model(
    name: str, spec: FeatureSpec, num_classes: int, options: StrictModel, backbone: Any = None
) -> nn.Module:
    """A fresh model; its random draws come from torch's global generator. End-to-end methods need the backbone."""
    method = find_method(name)
    kwargs: dict[str, Any] = {field: getattr(options, field) for field in type(options).model_fields}
    if method.build:
        return method.build(spec, num_classes, **kwargs)
    assert method.install
    if not isinstance(backbone, TrainableBackbone):
        raise UserError(f"{name} trains inside the backbone, which must be a timm model; give one instead of features")
    return Tuned(backbone, spec, num_classes, method.install, **kwargs)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training leaves behind: trained parameters, those of an update that stay as they were drawn (LoRA with A
    frozen), and the standardization that the head stands on.
    """
    buffers = {name: tensor for name, tensor in model.named_buffers() if name.startswith("readout.")}
    return (
        trainable(model)
        | update_tensors(model)
        | {name: tensor for name, tensor in buffers.items() if "tail" not in name}
    )


def count_params(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters without the head, parameters of the head)."""
    head = sum(tensor.numel() for name, tensor in trainable(model).items() if ".head." in name)
    return sum(tensor.numel() for tensor in trainable(model).values()) - head, head
