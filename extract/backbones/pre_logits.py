"""Computes a backbone's pre-logits features: what runs between its last block and its classifier, kept frozen.

In timm's terms these are `forward_head(norm(tokens), pre_logits=True)`: the final norm, then the pooling.
"""

import copy
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.timm_models import build_empty, first_line
from extract.backbones.vivit_weights import VIVIT, empty_vivit
from store.layout import TokenLayout

_NORMS = ("norm", "fc_norm")  # before and after the pooling


class NormOnly(nn.Module):
    """Stands in for a timm model that has a final norm and no pooling.

    Args:
        norm: maps tokens (batch, tokens, dim) to normalized tokens.
        dim: width of the tokens.
    """

    UNAVAILABLE = "this backbone has no pooling of its own"
    num_prefix_tokens = 0

    def __init__(self, norm: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.embed_dim = norm, dim

    def forward_head(self, x: Float[Tensor, "batch tokens dim"], pre_logits: bool) -> Float[Tensor, "batch dim"]:
        """As in timm's models."""
        raise NotImplementedError(self.UNAVAILABLE)


class FirstToken(NormOnly):
    """Stands in for a timm model whose classifier reads the first token."""

    num_prefix_tokens = 1

    def forward_head(self, x: Float[Tensor, "batch tokens dim"], pre_logits: bool) -> Float[Tensor, "batch dim"]:
        """As in timm's models."""
        return x[:, 0]


class PreLogits(nn.Module):
    """The final norm and the pooling of a model, which its own `forward_head` does.

    `pool(normalize(tokens))` is timm's `forward_head(norm(tokens), pre_logits=True)`. If every frame of a clip has its
    own prefix tokens, it is the mean of that over the `prefix_sets` frames.

    Args:
        model: a timm model, or a `NormOnly`. It is kept as it is, so pass it without its blocks; see `pre_logits_of`.
        prefix_sets: of the layout of the tokens.

    Attributes:
        unavailable: why the model does not pool; empty if it does.
        reads_patches: whether the pooling reads any patch token.
    """

    def __init__(self, model: nn.Module, prefix_sets: int = 1) -> None:
        super().__init__()
        self.model: Any = model
        self.num_prefix_tokens, self.prefix_sets = _num_prefix_tokens(model), prefix_sets  # the former of one frame
        read, self.unavailable = _tokens_read(self.model)
        self._prefix_read = max((place + 1 for place in read if place < self.num_prefix_tokens), default=0)
        self.reads_patches = self.num_prefix_tokens in read
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PreLogits":
        """Stay in evaluation mode: the frozen model uses no dropout."""
        return super().train(False)

    def normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Apply the backbone's final norm, if it has one."""
        norm = getattr(self.model, "norm", None)
        return tokens if norm is None else norm(tokens)

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool normalized tokens as the backbone does."""
        if self.prefix_sets == 1:
            return self._pool_frame(tokens)
        pooled = self._pool_frame(self._split(tokens))
        return pooled.reshape(len(tokens), self.prefix_sets, -1).mean(dim=1)

    def _split(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "all_frames n dim"]:
        """The frames of the clips, each with its own prefix tokens first."""
        batch, n_tokens, dim = tokens.shape
        n = n_tokens // self.prefix_sets
        n_prefix = min(self.num_prefix_tokens, n)  # fewer if only class tokens are stored
        parts = tokens.tensor_split([self.prefix_sets * n_prefix], dim=1)
        frames = [
            part.reshape(batch * self.prefix_sets, k, dim)
            for part, k in zip(parts, (n_prefix, n - n_prefix), strict=True)
        ]
        return torch.cat(frames, dim=1)

    def _pool_frame(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        return self.model.forward_head(tokens, pre_logits=True)  # type: ignore[no-any-return]

    def can_pool(self, layout: TokenLayout) -> bool:
        """Whether a layout has the tokens that `pool` reads, at the positions where it reads them."""
        n_prefix = layout.num_prefix_tokens // layout.prefix_sets
        if self.unavailable:
            return False
        if self.reads_patches:
            return layout.num_patches > 0 and n_prefix >= self.num_prefix_tokens
        return n_prefix >= self._prefix_read

    def normalize_pooled(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Apply the norm that some backbones have after their pooling."""
        fc_norm = getattr(self.model, "fc_norm", None)
        return pooled if fc_norm is None else fc_norm(pooled)

    def freeze_pooling(self) -> None:
        """Freeze modules that only `pool` runs, such as an attention pool, in a model that is trained without it."""
        for name, child in self.model.named_children():
            if name not in _NORMS:
                child.requires_grad_(False)

    def for_sets(self, prefix_sets: int) -> "PreLogits":
        """The same modules, for tokens reduced to another number of sets; see `store.layout.reduced_layout`."""
        other = copy.copy(self)
        other.prefix_sets = prefix_sets
        return other

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors by their names in the model, float32."""
        return {name: tensor.detach().cpu().float().numpy() for name, tensor in self.model.state_dict().items()}


def pre_logits_of(model: nn.Module, shared: bool = False, prefix_sets: int = 1) -> PreLogits:
    """The final norm and pooling of a timm model, frozen: a copy, or the model's own modules if `shared`."""
    stripped = _strip(model)
    return PreLogits(stripped if shared else copy.deepcopy(stripped), prefix_sets)


def vivit_pre_logits(model: nn.Module, shared: bool = False) -> PreLogits:
    """The final norm of transformers' ViViT, whose classifier reads the class token; see `pre_logits_of`."""
    layernorm: Any = model.layernorm
    norm = layernorm if shared else copy.deepcopy(layernorm)
    return PreLogits(FirstToken(norm, norm.weight.shape[0]))


def plain_norm_pre_logits(dim: int) -> PreLogits:
    """For a user's module, whose norm and pooling are unknown: a LayerNorm without parameters, and no pooling."""
    return PreLogits(NormOnly(nn.LayerNorm(dim, elementwise_affine=False), dim))


def pre_logits_from_arrays(
    name: str, kwargs: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix_sets: int = 1
) -> PreLogits:
    """Rebuild a backbone's `PreLogits` from the tensors in a store, without the other weights of the model.

    Args:
        prefix_sets: of the layout of the stored tokens.
    """
    if name == VIVIT:
        pre_logits = vivit_pre_logits(empty_vivit(kwargs))
    else:
        pre_logits = pre_logits_of(build_empty(name, dict(kwargs)), prefix_sets=prefix_sets)
    pre_logits = pre_logits.to_empty(device="cpu")
    pre_logits.model.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    return pre_logits


def _num_prefix_tokens(model: Any) -> int:
    return int(getattr(model, "num_prefix_tokens", 0))


def _strip(model: Any) -> nn.Module:
    """A model that shares with `model` the modules that its norms and `forward_head` run, and has no others."""
    # run forward_head once to find the modules that it uses
    used, children = set(_NORMS), list(model.named_children())
    hooks = [child.register_forward_pre_hook(lambda *_, name=name: used.add(name)) for name, child in children]
    parameter = next(model.parameters())
    with torch.no_grad(), suppress(Exception):  # `_tokens_read` runs it again, and reports the error
        model.forward_head(parameter.new_zeros(1, _num_prefix_tokens(model) + 1, model.embed_dim), pre_logits=True)
    for hook in hooks:
        hook.remove()
    # a shallow copy without the other modules
    stripped: Any = copy.copy(model)
    stripped._parameters, stripped._buffers = {}, {}
    stripped._modules = {name: child for name, child in model._modules.items() if child is None or name in used}
    assert isinstance(stripped, nn.Module)
    return stripped


@torch.no_grad()
def _tokens_read(model: Any) -> tuple[set[int], str]:
    """Which of the prefix tokens and one patch token the pooling reads, by index; and why it does not pool, if so.

    One token of each sample is NaN: the pooled features are NaN if and only if that token is read, for any weights.
    """
    if type(model) is NormOnly:
        return set(), NormOnly.UNAVAILABLE
    # a copy with all-zero weights on the CPU
    probe: Any = copy.deepcopy(model).to_empty(device="cpu").float().eval()
    for tensor in chain(probe.parameters(), probe.buffers()):
        tensor.zero_()
    # token k of sample k is NaN
    count = _num_prefix_tokens(model) + 1
    tokens = torch.zeros(count, count, model.embed_dim, device="cpu")
    tokens[range(count), range(count)] = torch.nan
    try:
        pooled = probe.forward_head(tokens, pre_logits=True)
    except NotImplementedError as error:  # an encoder without a classifier
        return set(), first_line(error)
    except Exception as error:  # the code of a thousand models may raise anything
        return set(), f"{type(model).__name__}.forward_head ends in {type(error).__name__}: {first_line(error)}"
    if pooled.shape != (count, model.embed_dim):
        return set(), "this backbone does not pool its tokens (global_pool '')"
    return set(pooled.isnan().any(dim=1).nonzero().flatten().tolist()), ""
