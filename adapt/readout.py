"""The one read-out that every method is offered: final norm, pooling, linear classifier."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.spec import FeatureSpec
from store.errors import UserError

Pool = Literal["cls", "mean", "cls_mean", "backbone"]


class Readout(nn.Module):
    """Last-layer tokens -> frozen final norm -> pooling -> linear head.

    Args:
        pool: `cls` (class token), `mean` (mean of the patch tokens), `cls_mean` (both, concatenated) or `backbone` (as
            the backbone pools, its attention pool included).

    Raises:
        UserError: the stored tokens do not hold what `pool` needs.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, pool: Pool) -> None:
        super().__init__()
        prefix, patches = spec.layout.num_prefix_tokens, spec.layout.num_patches
        if (pool in ("cls", "cls_mean") and not prefix) or (pool in ("mean", "cls_mean") and not patches):
            legal = [*(["cls"] if prefix else []), *(["mean"] if patches else []), "backbone"]
            raise UserError(f"pool {pool!r} needs tokens that are not there ({spec.layout}); legal: {', '.join(legal)}")
        self.mode, self.num_prefix_tokens, self.tail = pool, prefix, spec.tail
        self.head = nn.Linear(spec.dim * (2 if pool == "cls_mean" else 1), num_classes)

    def normalise(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The backbone's final norm."""
        return self.tail.normalise(tokens)

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch features"]:
        """Pool normalised tokens."""
        if self.mode == "backbone":
            return self.tail.pool(tokens)
        parts = []
        if self.mode in ("cls", "cls_mean"):
            parts.append(self.tail.normalise_pooled(tokens[:, 0]))
        if self.mode in ("mean", "cls_mean"):
            parts.append(self.tail.normalise_pooled(tokens[:, self.num_prefix_tokens :].mean(dim=1)))
        return torch.cat(parts, dim=1)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised tokens."""
        logits: Tensor = self.head(self.pool(tokens))
        return logits
