"""The registry of methods: name -> options, how the model is built, and how it is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.from_features.attentive_probe import AttentiveProbe, AttentiveProbeOptions, stack_attentive_probes
from adapt.methods.from_features.conv_ladder import ConvLadder, ConvLadderOptions
from adapt.methods.from_features.efficient_probe import (
    EfficientProbe,
    EfficientProbeOptions,
    stack_efficient_probes,
)
from adapt.methods.from_features.head2toe import Head2Toe, Head2ToeOptions
from adapt.methods.from_features.knn import KNN, KNNOptions
from adapt.methods.from_features.ladder import Ladder, LadderOptions
from adapt.methods.from_features.last import LAST, LASTOptions
from adapt.methods.from_features.layer_fusion import LayerFusion, LayerFusionOptions
from adapt.methods.from_features.linear_probe import LinearProbe, LinearProbeOptions
from adapt.methods.from_features.losa import LoSA, LoSAOptions
from adapt.methods.from_features.losa_stack import stack_losas
from adapt.methods.from_features.transformer_probe import TransformerProbe, TransformerProbeOptions
from adapt.methods.in_backbone.adapters import AdapterDropOptions, AdapterOptions, inject_adapters
from adapt.methods.in_backbone.compacter import CompacterOptions, inject_compacter
from adapt.methods.in_backbone.kronecker import KroneckerOptions, inject_kronecker
from adapt.methods.in_backbone.lepe import inject_lepe
from adapt.methods.in_backbone.lora import LoRAOptions, inject_lora, inject_lora_fix
from adapt.methods.in_backbone.parameter_subsets import train_all, train_attention, train_biases, train_norms
from adapt.methods.in_backbone.prompt import PromptOptions, inject_prompts
from adapt.methods.in_backbone.random_subspace import IntrinsicOptions, inject_intrinsic
from adapt.methods.in_backbone.relative_position_bias import inject_rpb
from adapt.methods.in_backbone.tuned_backbone import Inject, TrainableBackbone, TunedBackbone, TunedOptions
from adapt.methods.options import MethodOptions
from adapt.methods.stack import Stack
from store.errors import UserError, did_you_mean

Hyperparameter = Literal["lr", "weight_decay"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a backbone; exactly one of `build` and `inject` is given.

    Args:
        options: the class of its options.
        build: `build(spec, num_classes, options)` makes the model of a method that trains from features.
        inject: `inject(vit, options)` changes a copy of the backbone in place, for a method that trains inside it.
        hyperparameters: which of learning rate and weight decay it has.
        stack: `stack(models)` makes one forward pass of models with the same `stack_key`; None where it would not be
            faster than calling each model in turn.
    """

    options: type[MethodOptions]
    build: Callable[[FeatureSpec, int, Any], nn.Module] | None = None
    inject: Inject | None = None
    hyperparameters: tuple[Hyperparameter, ...] = ("lr", "weight_decay")
    stack: Callable[[Sequence[Any]], Stack] | None = None

    @property
    def solved(self) -> bool:
        """Whether a solver of `adapt.training.trials` finds the model; else it is trained step by step."""
        return "lr" not in self.hyperparameters

    @property
    def trains_backbone(self) -> bool:
        """Whether it needs images and gradients through a copy of the backbone; else it trains from features."""
        return self.inject is not None


METHODS: dict[str, Method] = {
    "linear_probe": Method(options=LinearProbeOptions, build=LinearProbe, hyperparameters=("weight_decay",)),
    "head2toe": Method(options=Head2ToeOptions, build=Head2Toe, hyperparameters=("weight_decay",)),
    "knn": Method(options=KNNOptions, build=KNN, hyperparameters=()),
    "attentive_probe": Method(options=AttentiveProbeOptions, build=AttentiveProbe, stack=stack_attentive_probes),
    "efficient_probe": Method(options=EfficientProbeOptions, build=EfficientProbe, stack=stack_efficient_probes),
    "layer_fusion": Method(options=LayerFusionOptions, build=LayerFusion),
    "losa": Method(options=LoSAOptions, build=LoSA, stack=stack_losas),
    "ladder": Method(options=LadderOptions, build=Ladder),
    "conv_ladder": Method(options=ConvLadderOptions, build=ConvLadder),
    "last": Method(options=LASTOptions, build=LAST),
    "transformer_probe": Method(options=TransformerProbeOptions, build=TransformerProbe),
    "full": Method(options=TunedOptions, inject=train_all),
    "bitfit": Method(options=TunedOptions, inject=train_biases),
    "layernorm": Method(options=TunedOptions, inject=train_norms),
    "attention": Method(options=TunedOptions, inject=train_attention),
    "lora": Method(options=LoRAOptions, inject=inject_lora),
    "lora_fix": Method(options=LoRAOptions, inject=inject_lora_fix),
    "kronecker": Method(options=KroneckerOptions, inject=inject_kronecker),
    "adapter": Method(options=AdapterOptions, inject=inject_adapters),
    "adapter_drop": Method(options=AdapterDropOptions, inject=inject_adapters),
    "compacter": Method(options=CompacterOptions, inject=inject_compacter),
    "lepe": Method(options=TunedOptions, inject=inject_lepe),
    "rpb": Method(options=TunedOptions, inject=inject_rpb),
    "prompt": Method(options=PromptOptions, inject=inject_prompts),
    "intrinsic": Method(options=IntrinsicOptions, inject=inject_intrinsic),
}


def find_method(name: str) -> Method:
    """Look up a method by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; legal: {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    return METHODS[name]


def build_model(
    name: str, spec: FeatureSpec, num_classes: int, options: MethodOptions, *, backbone: Any = None
) -> nn.Module:
    """Build an untrained model; its random numbers come from torch's global generator.

    Args:
        name: of the method.
        spec: the features.
        num_classes: width of the classifier.
        options: of the method's own class.
        backbone: the frozen model, which methods that train inside it need.

    Raises:
        UserError: the method does not fit the features or the backbone.
    """
    method = find_method(name)
    if method.build:
        return method.build(spec, num_classes, options)
    assert method.inject
    assert isinstance(options, TunedOptions)
    if not isinstance(backbone, TrainableBackbone):
        raise UserError(f"{name} trains inside the backbone, which must be a timm model; give one instead of features")
    return TunedBackbone(backbone, spec, num_classes, inject=method.inject, options=options)
