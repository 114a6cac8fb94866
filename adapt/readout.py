"""The one read-out that every method is offered: final norm, pooling, standardisation, linear classifier."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.spec import FeatureSpec
from store.errors import UserError

Pool = Literal["auto", "cls", "mean", "cls_mean", "backbone"]


class Readout(nn.Module):
    """Last-layer tokens -> frozen final norm -> pooling -> standardisation -> linear head.

    The standardisation has the mean and deviation of the frozen features over the training rows, the same for every
    method: without it a linear head converges slowly along the channels that vary least. A channel that varies by less
    than a step of the stored format is not divided by its deviation, which is rounding noise (see `standardise`).

    Args:
        pool: `cls` (class token, or the mean of those of all frames), `mean` (mean of the patch tokens), `cls_mean`
            (both, concatenated), `backbone` (as the backbone pools, its attention pool included) or `auto`
            (`cls_mean`, or the one that is there).

    Raises:
        UserError: the stored tokens do not hold what `pool` needs.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, pool: Pool) -> None:
        super().__init__()
        prefix, patches = spec.layout.num_prefix_tokens, spec.layout.num_patches
        if pool == "auto":
            pool = "cls_mean" if prefix and patches else "cls" if prefix else "mean"
        legal = _legal(spec)
        if pool not in legal:
            raise UserError(f"pool {pool!r} needs tokens that are not there ({spec.layout}); legal: {', '.join(legal)}")
        self.mode, self.num_prefix_tokens, self.tail = pool, prefix, spec.tail
        self.class_tokens = spec.layout.class_tokens
        self.reads_patches = spec.tail.reads_patches if pool == "backbone" else pool != "cls"
        width = spec.dim * (2 if pool == "cls_mean" else 1)
        self.head = nn.Linear(width, num_classes)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def standardise(self, pooled: Float[Tensor, "samples features"], rounding: Float[Tensor, "features"]) -> None:
        """Take mean and deviation from pooled frozen features; a channel that does not vary is only centred.

        Args:
            rounding: the most that rounding moves a channel by, half a step of the stored format. A deviation of less
                than a step would be that of the rounding, which new images do not have: divided by it, their features
                would lie far away from those that were trained on. From one step on, rounding moves a standardised
                channel by half a deviation at most, and its mean by nothing that shows.
        """
        device, std = self.mean.device, pooled.std(dim=0, correction=0)
        self.mean = pooled.mean(dim=0).to(device)
        self.std = torch.where(std > 2 * rounding, std, torch.ones_like(std)).to(device)

    def standardised(self, pooled: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Pooled features as the head reads them."""
        return (pooled - self.mean) / self.std

    def normalise(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The backbone's final norm."""
        return self.tail.normalise(tokens)

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch features"]:
        """Pool normalised tokens."""
        if self.mode == "backbone":
            return self.tail.pool(tokens)
        parts = []
        if self.mode in ("cls", "cls_mean"):
            parts.append(self.tail.normalise_pooled(tokens[:, self.class_tokens].mean(dim=1)))
        if self.mode in ("mean", "cls_mean"):
            parts.append(self.tail.normalise_pooled(tokens[:, self.num_prefix_tokens :].mean(dim=1)))
        return torch.cat(parts, dim=1)

    def classify(self, pooled: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits of pooled features."""
        logits: Tensor = self.head(self.standardised(pooled))
        return logits

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised tokens."""
        return self.classify(self.pool(tokens))


def _legal(spec: FeatureSpec) -> list[str]:
    """The ways to pool for which the tokens are there."""
    prefix, patches = spec.layout.num_prefix_tokens > 0, spec.layout.num_patches > 0
    there = {"cls": prefix, "mean": patches, "cls_mean": prefix and patches}
    there["backbone"] = spec.tail.can_pool(spec.layout)
    return [pool for pool, legal in there.items() if legal]
