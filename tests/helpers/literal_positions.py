"""Position biases and convolutions written out literally, as references."""

from itertools import product
from operator import add
from typing import Any

import torch
from torch import Tensor


def literal_convolution(v: Tensor, conv: Any, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """Every patch: the sum over its neighbors on the grid, and itself."""
    local, places = torch.zeros_like(v), list(product(*map(range, grid)))
    for here, place in enumerate(places, start=prefix):
        local[:, here] = conv.bias
        for way in product((-1, 0, 1), repeat=len(grid)):
            neighbor = tuple(map(add, place, way))
            if neighbor in places:
                weight = conv.weight[(slice(None), 0, *(1 + step for step in way))]
                local[:, here] += weight * v[:, prefix + places.index(neighbor)]
    return local


def literal_bias(table: Tensor, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """Every pair of patches: the table's entry for the way from one to the other."""
    places = list(product(*map(range, grid)))
    bias = torch.zeros(len(table), prefix + len(places), prefix + len(places))
    for (i, query), (j, key) in product(enumerate(places, start=prefix), repeat=2):
        way = (to - start + side - 1 for start, to, side in zip(query, key, grid, strict=True))
        bias[:, i, j] = table[(slice(None), *way)]
    return bias
