"""One forward pass of many LoSA networks of equal shape, with the values and gradients of `LoSA.forward`.

Where no tokens are mixed, y stays a product of low rank. With the hidden units h_j of the layers,

    W_down,i (x_i + y_{i-1}) = W_down,i x_i + sum_{j<i} (W_down,i W_up,j) h_j

so that frozen tokens are multiplied once by the W_down of all models, and nothing else is as wide as a token before the
last layer. Otherwise, and at high ranks, every update is added to y in place. Both forms keep only hidden units for the
backward pass. For L layers and tokens d wide, a forward and backward pass multiplies 10d + 3Lr times a layer, token and
hidden unit at low rank: 4d for W_down x, 3Lr for the sum, 6d for y_L, unless only a mean of y_L is read. In the other
form it is 14d: the backward pass takes the updates from y again, one by one, which costs 2d and saves a copy of y for
each.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.dropout import Draw, shared_draws
from adapt.methods.feature_spec import TokenBatch, TokensByLayer
from adapt.methods.from_features.losa import LoSA, LowRankMixer
from adapt.methods.from_features.losa_functions import Frozen, LowRankUnits, Maps, SumOfUpdates
from adapt.methods.readout import classify_stacked
from adapt.methods.stack import Stack


def stack_losas(models: Sequence[LoSA]) -> Stack:
    """Stack networks; see `adapt.methods.stack.Stack`."""
    first = models[0]
    products = (4 if _only_pools(first) else 10) * first.dim + 3 * len(first.layers) * first.options.rank
    is_low_rank = not _mixers(first)[0].token_mixing_options and products <= 14 * first.dim

    def forward(tokens: TokensByLayer, generators: Sequence[torch.Generator]) -> Float[Tensor, "models batch classes"]:
        batch, draws = first.read(tokens), shared_draws(generators)
        inputs = [first.normalized(batch, layer) for layer in first.layers]
        if is_low_rank:
            return _low_rank_logits(models, batch, inputs, draws)
        # y is not exact in half precision; frames of videos are mixed over several axes
        is_exact = inputs[0].dtype == batch[first.layers[0]].dtype and first.mixers[0].frames == 1
        logits = [
            model.classify(batch, _sum_of_updates(model, inputs, draw)) if is_exact else model(batch, draw)
            for model, draw in zip(models, draws, strict=True)
        ]
        return torch.stack(logits)

    return forward


def _low_rank_logits(
    models: Sequence[LoSA], batch: TokenBatch, inputs: Sequence[Tensor], draws: Sequence[Draw]
) -> Float[Tensor, "models batch classes"]:
    dtype = inputs[0].dtype
    # stack the parameters, layers first
    by_model = [_mixers(model) for model in models]
    mixers = list(zip(*by_model, strict=True))
    down = torch.stack([torch.stack([mixer.down.weight for mixer in layer]) for layer in mixers])
    bias = torch.stack([torch.stack([mixer.down.bias for mixer in layer]) for layer in mixers])
    up = torch.stack([torch.cat([mixer.up.weight for mixer in of_model], dim=1) for of_model in by_model])
    up_bias = torch.stack([torch.stack([mixer.up.bias for mixer in layer]) for layer in mixers]).cumsum(dim=0)
    # what earlier layers add to the hidden units of each: by their hidden units, and by their biases
    mixing = down @ up  # (layers, models, rank, layers * rank); later layers in it are not read
    from_bias = torch.einsum("lmrd,lmd->lmr", down[1:], up_bias[:-1])
    shift = bias + F.pad(from_bias, (0, 0, 0, 0, 1, 0))
    frozen = Frozen(inputs, _channel_factors(models, inputs, draws))
    units = LowRankUnits.apply(frozen, down.to(dtype), shift.to(dtype), mixing.to(dtype))
    # the last unit is 1, and its column is the sum of the biases
    up = torch.cat([up, up_bias[-1][:, :, None]], dim=2).to(dtype)
    groups = zip(units, torch.split(up, [len(of_group) for of_group in units]), strict=True)
    pooled = [_pool_units(models[0], batch, *of_group) for of_group in groups]
    return classify_stacked([model.readout for model in models], torch.cat(pooled))


def _pool_units(
    model: LoSA, batch: TokenBatch, units: Float[Tensor, "models units rows"], up: Float[Tensor, "models dim units"]
) -> Float[Tensor, "models batch features"]:
    """Pooled features for y_L = up units; if y_L itself is only pooled, and linearly, the units are pooled first."""
    size, readout = len(batch[model.layers[-1]]), model.readout
    if _only_pools(model):
        pooled = readout.pool(units.mT.reshape(len(up) * size, -1, up.shape[2]))
        y = pooled.view(len(up), -1, up.shape[2]) @ up.mT  # (models, batch * parts, dim)
        return readout.pooled(batch) + y.view(len(up), size, -1)
    y = (units.mT @ up.mT).view(len(up), size, -1, up.shape[1])
    pooled = readout.pool(model.add_to_last(batch, y).flatten(0, 1))
    return pooled.view(len(up), size, -1)


def _only_pools(model: LoSA) -> bool:
    """Whether of y_L only a mean over tokens is read."""
    return model.add == "after_norm" and model.readout.pools_linearly


def _channel_factors(
    models: Sequence[LoSA], inputs: Sequence[Tensor], draws: Sequence[Draw]
) -> list[Float[Tensor, "models rank rows"]] | None:
    """The factors of dropout for the hidden units of every layer; None if nothing is dropped."""
    shape = (*inputs[0].shape[:2], models[0].options.rank)
    by_model = [
        [mixer.dropout.factors(shape, inputs[0], draw) for mixer in _mixers(model)]
        for model, draw in zip(models, draws, strict=True)
    ]
    if all(factors[0] is None for factors in by_model):
        return None
    ones = inputs[0].new_ones(shape)
    return [
        torch.stack([(ones if one is None else one).flatten(0, 1).T for one in of_layer])
        for of_layer in zip(*by_model, strict=True)
    ]


def _sum_of_updates(
    model: LoSA, inputs: Sequence[Float[Tensor, "batch read dim"]], draw: Draw
) -> Float[Tensor, "batch read dim"]:
    """The sum y_L of the updates of all layers."""
    steps, tensors = list[Maps](), list[Tensor]()
    for x, mixer in zip(inputs, _mixers(model), strict=True):
        keep = mixer.dropout.factors((*x.shape[:2], mixer.down.out_features), x, draw)
        steps.append(Maps(x, None, None if keep is None else keep.flatten(0, 1).T[None]))
        tensors += _maps(mixer.down, mixer.up)
        if mixer.token_down and mixer.token_up:
            keep = mixer.dropout.factors((len(x), mixer.token_down.out_features, x.shape[2]), x, draw)
            steps.append(Maps(x, mixer.num_prefix, keep))
            tensors += _maps(mixer.token_down, mixer.token_up)
    y: Tensor = SumOfUpdates.apply(steps, *tensors)
    return y


def _maps(down: nn.Linear, up: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    return down.weight, down.bias, torch.cat([up.weight, up.bias[:, None]], dim=1)


def _mixers(model: LoSA) -> list[LowRankMixer]:
    return [cast(LowRankMixer, mixer) for mixer in model.mixers]
