"""Reference implementations of position biases and convolutions, with loops over positions."""

from itertools import product
from operator import add
from typing import Any

import torch
from torch import Tensor


def literal_convolution(v: Tensor, conv: Any, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """For every patch the weighted sum over itself and its neighbors on the grid."""
    local, positions = torch.zeros_like(v), list(product(*map(range, grid)))
    for here, position in enumerate(positions, start=prefix):
        local[:, here] = conv.bias
        for offset in product((-1, 0, 1), repeat=len(grid)):
            neighbor = tuple(map(add, position, offset))
            if neighbor in positions:
                weight = conv.weight[(slice(None), 0, *(1 + step for step in offset))]
                local[:, here] += weight * v[:, prefix + positions.index(neighbor)]
    return local


def literal_bias(table: Tensor, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """For every pair of patches the table's entry for the offset between them."""
    positions = list(product(*map(range, grid)))
    bias = torch.zeros(len(table), prefix + len(positions), prefix + len(positions))
    for (i, query), (j, key) in product(enumerate(positions, start=prefix), repeat=2):
        offset = (to - start + side - 1 for start, to, side in zip(query, key, grid, strict=True))
        bias[:, i, j] = table[(slice(None), *offset)]
    return bias
