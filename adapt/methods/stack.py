"""One forward pass of many models of equal shape, which share the products with the frozen tokens."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adapt.methods.feature_spec import TokensByLayer

Stack = Callable[[TokensByLayer, Sequence[torch.Generator]], Float[Tensor, "models batch classes"]]
"""`stack(tokens, generators)` gives the logits that every model gives alone, and their gradients to its own parameters.

Dropout of model i draws from `generators[i]`, which is on the device of the tokens: the values that the model alone
would draw from torch's global generator in the same state. Models with one seed are given one generator, from which is
drawn once. Without dropout, and in evaluation, nothing is drawn.
"""

_MAY_DIFFER = {"dropout", "layer", "layers", "pool"}  # the last three are compared as the model resolved them


def stack_key(model: Any) -> Hashable:
    """What models of a stack must have in common: class, layers, pooling and all options except the dropout rate.

    Args:
        model: of a method that has a `stack`.
    """
    options = model.options.model_dump_json(exclude=_MAY_DIFFER)
    return type(model), options, model.layers, model.readout.mode, model.readout.head.out_features
