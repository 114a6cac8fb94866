"""A trained adaptor in memory, and the forward pass that several of them share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.adaptors.card import Card
from adapt.methods.feature_spec import TokenBatch
from adapt.methods.registry import find_method
from extract.backbones.backbone import Images
from extract.forward.device import autocast, to_device
from extract.forward.frozen_forward import FrozenForward
from store.errors import UserError

_SHARED = ("weights_digest", "preprocessing_digest", "precision", "tokens", "clips")


@dataclass(frozen=True, kw_only=True)
class TrainedAdaptor:
    """A trained model with the frozen backbone that computes its inputs.

    Attributes:
        name: of its file, without the ending.
        card: what it was trained on and how.
        model: maps tokens, or for methods that train inside the backbone images, to logits.
        forward: the frozen backbone.
    """

    name: str
    card: Card
    model: nn.Module
    forward: FrozenForward

    @property
    def trains_backbone(self) -> bool:
        """Whether its model is a changed copy of the backbone, which has a forward pass of its own."""
        return find_method(self.card.method).trains_backbone

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that its model reads."""
        model: Any = self.model
        return tuple(model.layers)

    def logits_of(self, inputs: TokenBatch | Images) -> Float[Tensor, "batch classes"]:
        """Logits of tokens, or of images if it trains the backbone, on its device."""
        with autocast(self.forward.device, self.card.train_precision):
            logits: Tensor = self.model(inputs)
        return logits.float()

    def classify(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Probabilities of logits: softmax, or sigmoid for multi-label."""
        return logits.sigmoid() if self.card.multi_label else logits.softmax(dim=1)


def layers_of(adaptors: Sequence[TrainedAdaptor]) -> list[int]:
    """The layers of the frozen backbone that any of the adaptors reads."""
    return sorted({layer for adaptor in adaptors if not adaptor.trains_backbone for layer in adaptor.layers})


@torch.no_grad()
def shared_logits(adaptors: Sequence[TrainedAdaptor], images: Images) -> list[Float[Tensor, "batch classes"]]:
    """Logits of every adaptor for preprocessed images or clips, on the device.

    The backbone computes the union of the layers that they read once.
    """
    forward = adaptors[0].forward
    on_device = to_device(images, forward.device)
    layers = layers_of(adaptors)
    tokens = TokenBatch(forward(on_device, layers) if layers else {})
    return [adaptor.logits_of(on_device if adaptor.trains_backbone else tokens) for adaptor in adaptors]


def require_same_backbone(names: Sequence[object], cards: Sequence[Card]) -> None:
    """Check that adaptors can share a forward pass.

    Args:
        names: of the adaptors, for messages.
        cards: their cards.

    Raises:
        UserError: they differ in the backbone, or in what is read of it.
    """
    for name, card in zip(names[1:], cards[1:], strict=True):
        for field in _SHARED:
            if (other := getattr(card, field)) != (first := getattr(cards[0], field)):
                raise UserError(
                    f"{names[0]} and {name} cannot share a forward pass: {field} is {first} in the card of the first, "
                    f"{other} in that of the second; predict with each of them alone"
                )
