"""Fastfood: a random map from d to D numbers, without its D x d matrix (Le et al., ICML 2013, arXiv 1408.3060).

P stacks blocks of p rows, p the next power of two from d on, until there are D rows:

    P_j = H G_j Pi_j H B_j / c

H is the Walsh-Hadamard matrix, B_j a diagonal of random signs, Pi_j a random permutation, G_j a diagonal of standard
normal numbers: O(D log d) time and O(D) memory. The paper's last diagonal, which shapes the lengths of the rows for a
kernel, is left out, as by Li et al. (arXiv 1804.08838). Ours: c is chosen so that every column has length 1 (exactly,
but for the rows that are cut off the last block), so a step in the d numbers is a step about as long in the D, as Li et
al. ask for.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Fastfood(nn.Module):
    """P, which its seed determines; its tensors are in no state dict.

    Args:
        dim: d, size of the input.
        size: D, size of the output, at least d.
        seed: of all random numbers.
        device: of the tensors; they are drawn on the CPU, since a seed gives other numbers on a GPU.
    """

    signs: Tensor
    order: Tensor
    scale: Tensor

    def __init__(self, dim: int, size: int, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.width = 1 << (dim - 1).bit_length()
        shape = (-(-size // self.width), self.width)
        draw = torch.Generator("cpu").manual_seed(seed)
        signs = torch.randint(0, 2, shape, generator=draw, dtype=torch.int8, device="cpu").mul_(2).sub_(1)
        order = torch.rand(shape, generator=draw, device="cpu").argsort(dim=1, stable=True)
        scale = torch.randn(shape, generator=draw, device="cpu")
        scale /= (scale.square().sum() * size / shape[0]).sqrt()
        for name, tensor in (("signs", signs), ("order", order), ("scale", scale)):
            self.register_buffer(name, tensor.to(device), persistent=False)

    def forward(self, theta: Float[Tensor, "dim"]) -> Float[Tensor, "size"]:
        """P theta."""
        mixed = hadamard(F.pad(theta, (0, self.width - self.dim)) * self.signs)  # (blocks, width)
        return hadamard(mixed.gather(1, self.order) * self.scale).flatten()[: self.size]


def hadamard(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """H x for every row, `width` a power of two, entries of H +1 and -1; H is symmetric, so it is its own adjoint."""
    half = 1
    while half < x.shape[1]:
        a, b = x.reshape(len(x), -1, 2, half).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).flatten(1)
        half *= 2
    return x
