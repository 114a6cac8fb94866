"""Methods that train a part of the backbone's own parameters: all of it, biases (BitFit), norms, attention.

BitFit is Ben Zaken et al., arXiv 2106.10199; the four are baselines of He et al., arXiv 2203.16329.
"""

from collections.abc import Callable

from torch import nn

from adapt.methods.in_backbone.target_modules import TARGETS, Vit
from store.errors import UserError

Wanted = Callable[[str, nn.Module], bool]
_UNUSED = ("mask_token", "head.", "head_dist.")  # of pretraining and of the classifier that the read-out replaces


def train_all(vit: Vit) -> None:
    """Every parameter."""
    _train(vit, lambda name, _: True, "parameters")


def train_biases(vit: Vit) -> None:
    """Every bias: of linear maps, norms and the patch embedding; EVA and BEiT call some q_bias and v_bias."""
    _train(vit, lambda name, _: name.endswith("bias"), "biases")


def train_norms(vit: Vit) -> None:
    """Weight and bias of every normalization, the final one included."""
    _train(vit, lambda _, owner: "Norm" in type(owner).__name__, "norms")


def train_attention(vit: Vit) -> None:
    """The projections of every attention: q, k, v and output."""
    owners = {id(place.linear) for target in TARGETS[:4] for place in vit.places(target)}
    own = ("q_bias", "v_bias")  # where EVA and BEiT keep them
    _train(vit, lambda name, owner: id(owner) in owners or name.endswith(own), "attention projections")


def _train(vit: Vit, wanted: Wanted, what: str) -> None:
    found = 0
    for path, owner in vit.module.named_modules():
        for name, parameter in owner.named_parameters(prefix=path, recurse=False):
            if not name.startswith(_UNUSED) and wanted(name, owner):
                parameter.requires_grad_(True)
                found += 1
    if not found:
        raise UserError(f"this backbone has no {what} to train; choose another method")
