"""Methods that train parameters of the backbone itself: all of them, biases (BitFit), norms, or the attention.

BitFit is Ben Zaken et al., arXiv 2106.10199; the four are baselines of He et al., arXiv 2203.16329.
"""

from collections.abc import Callable

from torch import nn

from adapt.methods.in_backbone.target_modules import TARGETS, TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.errors import UserError

_UNUSED = ("mask_token", "head.", "head_dist.")  # of pretraining and of the classifier that the read-out replaces


def train_all(vit: TargetViT, options: TunedOptions) -> None:
    """Train every parameter."""
    _train(vit, lambda name, module: True, "parameters")


def train_biases(vit: TargetViT, options: TunedOptions) -> None:
    """Train every bias: of linear maps, norms and the patch embedding; EVA and BEiT call some q_bias and v_bias."""
    _train(vit, lambda name, module: name.endswith("bias"), "biases")


def train_norms(vit: TargetViT, options: TunedOptions) -> None:
    """Train weight and bias of every normalization, the final one included."""
    _train(vit, lambda name, module: "Norm" in type(module).__name__, "norms")


def train_attention(vit: TargetViT, options: TunedOptions) -> None:
    """Train the projections of every attention: q, k, v and output."""
    projections = {id(target.module) for name in TARGETS[:4] for target in vit.target_modules(name)}
    separate_biases = ("q_bias", "v_bias")  # of EVA and BEiT
    _train(
        vit, lambda name, module: id(module) in projections or name.endswith(separate_biases), "attention projections"
    )


def _train(vit: TargetViT, is_trained: Callable[[str, nn.Module], bool], what: str) -> None:
    """Unfreeze the parameters for which `is_trained(name, module that holds it)`.

    Raises:
        UserError: there is none.
    """
    trained = [
        parameter
        for path, module in vit.module.named_modules()
        for name, parameter in module.named_parameters(prefix=path, recurse=False)
        if not name.startswith(_UNUSED) and is_trained(name, module)
    ]
    if not trained:
        raise UserError(f"this backbone has no {what} to train; choose another method")
    for parameter in trained:
        parameter.requires_grad_(True)
