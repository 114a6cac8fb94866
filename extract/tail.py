"""The backbone's own read-out: what stands between its last block and its classifier, kept frozen."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from extract.vivit_weights import VIVIT, empty_vivit
from extract.weights import build_empty
from store.layout import TokenLayout


class Tail(nn.Module):
    """Final norm, pooling and, where the backbone has them, attention pool and the norm after pooling.

    `pool(normalise(tokens))` is timm's `forward_head(norm(tokens), pre_logits=True)`, or the mean of that over
    `prefix_sets` frames with prefix tokens of their own.
    """

    def __init__(
        self,
        norm: nn.Module | None = None,
        attn_pool: nn.Module | None = None,
        fc_norm: nn.Module | None = None,
        pool_type: str = "avg",
        num_prefix_tokens: int = 0,
        distilled: bool = False,
        prefix_sets: int = 1,
    ) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.attn_pool = attn_pool
        self.fc_norm = fc_norm or nn.Identity()
        self.pool_type, self.num_prefix_tokens = pool_type, num_prefix_tokens  # the latter of one frame
        self.prefix_sets = prefix_sets
        self.distilled = distilled  # DeiT reads its class token and its distillation token
        self.reads_patches = attn_pool is not None or (pool_type != "token" and not distilled)
        self.eval().requires_grad_(False)

    def normalise(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The backbone's final norm."""
        return self.norm(tokens)  # type: ignore[no-any-return]

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool normalised tokens as the backbone does."""
        if self.prefix_sets == 1:
            return self._pool_frame(tokens)
        pooled = self._pool_frame(self._split(tokens))
        return pooled.reshape(len(tokens), self.prefix_sets, -1).mean(dim=1)

    def _split(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "all_frames n dim"]:
        """The frames of a clip, each with its prefix tokens in front."""
        batch, n_tokens, dim = tokens.shape
        n = n_tokens // self.prefix_sets
        prefix = min(self.num_prefix_tokens, n)  # fewer are there where only class tokens were stored
        parts = tokens.tensor_split([self.prefix_sets * prefix], dim=1)
        sets = [
            part.reshape(batch * self.prefix_sets, k, dim) for part, k in zip(parts, (prefix, n - prefix), strict=True)
        ]
        return torch.cat(sets, dim=1)

    def _pool_frame(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        if self.attn_pool is not None:
            return self.normalise_pooled(self.attn_pool(tokens))
        if self.distilled:
            return tokens[:, :2].mean(dim=1)
        pooled = global_pool_nlc(tokens, pool_type=self.pool_type, num_prefix_tokens=self.num_prefix_tokens)
        return self.normalise_pooled(pooled)

    def can_pool(self, layout: TokenLayout) -> bool:
        """Whether the tokens that it reads, or that stand before these, are there; reduced tokens may lack some."""
        prefix = layout.num_prefix_tokens // layout.prefix_sets
        if self.attn_pool is None and not self.pool_type:
            return False  # such a backbone does not pool
        if self.reads_patches:
            return layout.num_patches > 0 and prefix >= self.num_prefix_tokens
        return prefix >= (2 if self.distilled else 1)

    def normalise_pooled(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The norm that some backbones have behind their pooling."""
        return self.fc_norm(pooled)  # type: ignore[no-any-return]

    def for_sets(self, prefix_sets: int) -> "Tail":
        """The same modules on tokens that were reduced to another number of sets; see `store.layout.reduced_layout`."""
        other = copy.copy(self)
        other.prefix_sets = prefix_sets
        return other

    def arrays(self) -> dict[str, np.ndarray]:
        """Its tensors by name, float32."""
        return {name: tensor.detach().cpu().float().numpy() for name, tensor in self.state_dict().items()}


def tail_of(model: nn.Module, shared: bool = False, prefix_sets: int = 1) -> Tail:
    """The tail of a timm model: a copy, or its very modules (`shared`), all frozen."""
    parts = {name: getattr(model, name, None) for name in ("norm", "attn_pool", "fc_norm")}
    if not shared:
        parts = copy.deepcopy(parts)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    return Tail(
        **parts,
        pool_type=str(getattr(model, "global_pool", "avg")),
        num_prefix_tokens=prefix,
        distilled=hasattr(model, "dist_token"),
        prefix_sets=prefix_sets,
    )


def vivit_tail(model: nn.Module, shared: bool = False) -> Tail:
    """The tail of transformers' ViViT, whose classifier reads the class token; see `tail_of`."""
    norm: Any = model.layernorm
    return Tail(norm=norm if shared else copy.deepcopy(norm), pool_type="token", num_prefix_tokens=1)


def tail_from_arrays(
    name: str, kwargs: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix_sets: int = 1
) -> Tail:
    """Rebuild a backbone's tail from stored tensors, without the model's weights.

    Args:
        prefix_sets: that of the stored tokens' layout.
    """
    if name == VIVIT:
        tail = vivit_tail(empty_vivit(kwargs))
    else:
        tail = tail_of(build_empty(name, dict(kwargs)), prefix_sets=prefix_sets)
    tail = tail.to_empty(device="cpu")
    tail.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    return tail
