"""The read-out, which all methods share: final norm, pooling, standardization, linear classifier."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokenBatch
from store.errors import UserError

Pooling = Literal["auto", "cls", "mean", "cls_mean", "flatten", "backbone"]


class Readout(nn.Module):
    """Tokens of one layer or several -> frozen final norm -> pooling -> standardization -> linear head.

    Features are standardized by the mean and deviation of the frozen features over the training rows, the same for
    every method: without it a linear head converges slowly along the channels that vary least. A channel that varies by
    less than a step of the stored format is not divided by its deviation, which is rounding noise (see `standardize`).

    Args:
        spec: the features.
        num_classes: width of the head.
        pool: `cls` (class token, or the mean of all: of all frames, and of a distilled model's two), `mean` (mean of
            the patch tokens), `cls_mean` (both, concatenated), `flatten` (all tokens, concatenated: the head knows
            where a patch was), `backbone` (as the backbone pools, its attention pool included) or `auto` (`cls_mean`,
            or the one of the two that the features hold). Registers are no class tokens.
        layers: which layers it reads; what is pooled of them is concatenated. None: the last of the features.

    Attributes:
        mode: the pooling, with `auto` resolved.
        layers: the layers, ascending.
        reads_patches: whether it reads patch tokens.

    Raises:
        UserError: the stored tokens lack what `pool` needs; `backbone`, and the backbone does not pool.
    """

    def __init__(
        self, spec: FeatureSpec, num_classes: int, pool: Pooling, layers: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        has_class, has_patches = spec.layout.num_class_tokens > 0, spec.layout.num_patches > 0
        if pool == "auto":
            pool = "cls_mean" if has_class and has_patches else "cls" if has_class else "mean"
        legal = _legal_poolings(spec)
        if pool not in legal:
            unavailable = spec.pre_logits.unavailable if pool == "backbone" else ""
            reason = unavailable or f"it needs tokens that are not there ({spec.layout})"
            raise UserError(f"pool {pool!r} is not available: {reason}; legal: {', '.join(legal)}")
        self.mode, self.layout, self.layers = pool, spec.layout, layers or spec.layers[-1:]
        self.tail = spec.pre_logits  # a name of adaptor files: methods that train the final norm save it as this
        self.reads_patches = spec.pre_logits.reads_patches if pool == "backbone" else has_patches and pool != "cls"
        of_layer = {"cls_mean": 2, "flatten": spec.layout.num_tokens}.get(pool, 1)
        width = len(self.layers) * spec.dim * of_layer
        self.head = nn.Linear(width, num_classes)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def standardize(self, pooled: Float[Tensor, "samples features"], rounding: Float[Tensor, "features"]) -> None:
        """Take mean and deviation from pooled frozen features; a channel that does not vary is only centered.

        Args:
            pooled: features of the training rows.
            rounding: the most that rounding moves a channel by, half a step of the stored format. A deviation of less
                than a step would be that of the rounding, which new images do not have: divided by it, their features
                would be far away from those that were trained on. From one step on, rounding moves a standardized
                channel by half a deviation at most, and its mean by a negligible amount.
        """
        device, std = self.mean.device, pooled.std(dim=0, correction=0)
        self.mean = pooled.mean(dim=0).to(device)
        self.std = torch.where(std > 2 * rounding, std, torch.ones_like(std)).to(device)

    def standardized(self, pooled: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Pooled features as the head reads them."""
        return (pooled - self.mean) / self.std

    def normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Apply the backbone's final norm."""
        return self.tail.normalize(tokens)

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch features"]:
        """Pool normalized tokens."""
        if self.mode == "backbone":
            return self.tail.pool(tokens)
        if self.mode == "flatten":
            return self.tail.normalize_pooled(tokens.flatten(0, 1)).view(len(tokens), -1)
        parts = []
        if self.mode in ("cls", "cls_mean"):
            parts.append(self.tail.normalize_pooled(self._class_tokens(tokens).mean(dim=(1, 2))))
        if self.mode in ("mean", "cls_mean"):
            parts.append(self.tail.normalize_pooled(tokens[:, self.layout.num_prefix_tokens :].mean(dim=1)))
        return torch.cat(parts, dim=1)

    @property
    def pools_linearly(self) -> bool:
        """Whether pooling is a mean of tokens and nothing else."""
        part = self.mean.view(len(self.layers) * (2 if self.mode == "cls_mean" else 1), -1)
        return self.mode not in ("backbone", "flatten") and self.tail.normalize_pooled(part) is part

    def _class_tokens(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch sets classes dim"]:
        """The first prefix tokens of every set."""
        sets, prefix = self.layout.prefix_sets, self.layout.num_prefix_tokens
        by_set = tokens[:, :prefix].reshape(len(tokens), sets, prefix // sets, tokens.shape[2])
        return by_set[:, :, : self.layout.num_class_tokens // sets]

    def pooled(self, tokens: TokenBatch) -> Float[Tensor, "batch features"]:
        """The pooled frozen features of a batch, computed once for all read-outs with the same pooling."""
        parts = [self.pooled_layer(tokens, layer) for layer in self.layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def pooled_layer(self, tokens: TokenBatch, layer: int) -> Float[Tensor, "batch features"]:
        """The same of one layer, also of one that the head does not read."""
        name = "pooled", self.tail, self.mode, self.layout
        return tokens.remember(name, layer, lambda: self.pool(tokens.normalized(layer, self.tail)))

    def classify(self, pooled: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits of pooled features."""
        logits: Tensor = self.head(self.standardized(pooled))
        return logits

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalized tokens."""
        return self.classify(self.pool(tokens))


def classify_stacked(
    readouts: Sequence[Readout], pooled: Float[Tensor, "models batch features"]
) -> Float[Tensor, "models batch classes"]:
    """Logits of several read-outs of equal shape, each from its own pooled features."""
    mean, std, weight, bias = (
        torch.stack(tensors)
        for tensors in zip(*((r.mean, r.std, r.head.weight, r.head.bias) for r in readouts), strict=True)
    )
    return torch.baddbmm(bias[:, None], (pooled - mean[:, None]) / std[:, None], weight.transpose(1, 2))


def _legal_poolings(spec: FeatureSpec) -> list[str]:
    """The poolings whose tokens the features hold."""
    has_class, has_patches = spec.layout.num_class_tokens > 0, spec.layout.num_patches > 0
    legal = {
        "cls": has_class,
        "mean": has_patches,
        "cls_mean": has_class and has_patches,
        "flatten": True,
        "backbone": spec.pre_logits.can_pool(spec.layout),
    }
    return [pool for pool, is_legal in legal.items() if is_legal]
