"""The backbone's own read-out: what runs between its last block and its classifier, kept frozen."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.vivit_weights import VIVIT, empty_vivit
from extract.backbones.weights import build_empty, first_line
from store.layout import TokenLayout


class NormOnly(nn.Module):
    """The read-out of a module that has a final norm and no pooling.

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
        """As of timm's models."""
        raise NotImplementedError(self.UNAVAILABLE)


class FirstToken(NormOnly):
    """The read-out of a model whose classifier reads its first token."""

    num_prefix_tokens = 1

    def forward_head(self, x: Float[Tensor, "batch tokens dim"], pre_logits: bool) -> Float[Tensor, "batch dim"]:
        """As of timm's models."""
        return x[:, 0]


class Tail(nn.Module):
    """A model without all that runs before its final norm; its own `forward_head` does the pooling.

    `pool(normalize(tokens))` is timm's `forward_head(norm(tokens), pre_logits=True)`, or the mean of that over
    `prefix_sets` frames with prefix tokens of their own.

    Args:
        model: a timm model, or a `NormOnly`; it is kept as it is, so give it stripped (see `tail_of`).
        prefix_sets: of the layout of the tokens that are read.

    Attributes:
        unavailable: why the model does not pool; empty where it does.
        reads_patches: whether its pooling reads any patch token.
    """

    def __init__(self, model: nn.Module, prefix_sets: int = 1) -> None:
        super().__init__()
        self.model: Any = model
        self.num_prefix_tokens, self.prefix_sets = _prefix_of(model), prefix_sets  # former: a frame's
        read, self.unavailable = _tokens_read(self.model)
        self._prefix_read = max((place + 1 for place in read if place < self.num_prefix_tokens), default=0)
        self.reads_patches = self.num_prefix_tokens in read
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Tail":
        """It stays in evaluation mode: a frozen read-out has no dropout."""
        return super().train(False)

    def normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The backbone's final norm, where it has one."""
        norm = getattr(self.model, "norm", None)
        return tokens if norm is None else norm(tokens)

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool normalized tokens as the backbone does."""
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
        return self.model.forward_head(tokens, pre_logits=True)  # type: ignore[no-any-return]

    def can_pool(self, layout: TokenLayout) -> bool:
        """Whether the tokens that it reads, or counts off before these, are there; reduced tokens may lack some."""
        prefix = layout.num_prefix_tokens // layout.prefix_sets
        if self.unavailable:
            return False
        if self.reads_patches:
            return layout.num_patches > 0 and prefix >= self.num_prefix_tokens
        return prefix >= self._prefix_read

    def normalize_pooled(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The norm that some backbones have behind their pooling."""
        fc_norm = getattr(self.model, "fc_norm", None)
        return pooled if fc_norm is None else fc_norm(pooled)

    def freeze_pooling(self) -> None:
        """Freeze what `pool` alone runs, such as an attention pool, in a model that is trained but not pooled by it."""
        for name, part in self.model.named_children():
            if name not in _NORMS:
                part.requires_grad_(False)

    def for_sets(self, prefix_sets: int) -> "Tail":
        """The same modules on tokens that were reduced to another number of sets; see `store.layout.reduced_layout`."""
        other = copy.copy(self)
        other.prefix_sets = prefix_sets
        return other

    def arrays(self) -> dict[str, np.ndarray]:
        """Its tensors by their names in the model, float32."""
        return {name: tensor.detach().cpu().float().numpy() for name, tensor in self.model.state_dict().items()}


_NORMS = ("norm", "fc_norm")  # before the pooling, and behind it


def tail_of(model: nn.Module, shared: bool = False, prefix_sets: int = 1) -> Tail:
    """The tail of a timm model: a copy, or its very modules (`shared`), all frozen."""
    stripped = _strip(model)
    return Tail(stripped if shared else copy.deepcopy(stripped), prefix_sets)


def vivit_tail(model: nn.Module, shared: bool = False) -> Tail:
    """The tail of transformers' ViViT, whose classifier reads the class token; see `tail_of`."""
    layernorm: Any = model.layernorm
    norm = layernorm if shared else copy.deepcopy(layernorm)
    return Tail(FirstToken(norm, norm.weight.shape[0]))


def plain_tail(dim: int) -> Tail:
    """The tail of a module of the user's, of which no read-out is known: a LayerNorm without parameters."""
    return Tail(NormOnly(nn.LayerNorm(dim, elementwise_affine=False), dim))


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
    tail.model.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    return tail


def _prefix_of(model: Any) -> int:
    return int(getattr(model, "num_prefix_tokens", 0))


def _strip(model: Any) -> nn.Module:
    """A model that shares with `model` the modules that its norms and `forward_head` run, and has no others."""
    used = set(_NORMS)
    parts = [(name, part) for name, part in model.named_children()]
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: used.add(name)) for name, part in parts]
    like = next(model.parameters())
    with torch.no_grad(), suppress(Exception):  # what stands in its way is found again in `_tokens_read`
        model.forward_head(like.new_zeros(1, _prefix_of(model) + 1, model.embed_dim), pre_logits=True)
    for hook in hooks:
        hook.remove()
    stripped: Any = copy.copy(model)
    stripped._parameters, stripped._buffers = {}, {}
    stripped._modules = {name: part for name, part in model._modules.items() if part is None or name in used}
    assert isinstance(stripped, nn.Module)
    return stripped


@torch.no_grad()
def _tokens_read(model: Any) -> tuple[set[int], str]:
    """Which of the prefix tokens and one patch token the pooling reads, by place; and why it does not pool, if so.

    A token that is not a number makes the pooled features so, whatever the weights, if and only if it is read.
    """
    if type(model) is NormOnly:
        return set(), NormOnly.UNAVAILABLE
    probe: Any = copy.deepcopy(model).to_empty(device="cpu").float().eval()
    for tensor in chain(probe.parameters(), probe.buffers()):
        tensor.zero_()
    count = _prefix_of(model) + 1
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
