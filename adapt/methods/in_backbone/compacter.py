"""Compacter: adapters whose weights are sums of Kronecker products (Mahabadi et al., arXiv 2106.04647).

    W = sum_i A_i (x) (s_i t_i^T)           i = 1 ... n;  A_i (n, n), s_i (out / n, rank), t_i (in / n, rank)

All adapters of all blocks, down and up, share the A_i; each has its own s_i, t_i and biases: L(d + h)(4r + 2) + n^3
parameters in L blocks. They are put where adapters.py puts them. The paper's: the factorization, the sharing, n = 4
and rank 1. Ours: the entries of W_down start with variance 1 / in, and s of W_up at zero, so that the adapter starts as
the identity and every factor moves from the second step on.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.methods.in_backbone.adapters import Adapter, insert_adapters
from adapt.methods.in_backbone.target_modules import TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import PositiveInt
from store.errors import UserError


class CompacterOptions(TunedOptions):
    """Options of `compacter`.

    Args:
        bottleneck: h.
        n: how many products, and the side of their shared factors; must divide d and h.
        rank: r, of the factors that are not shared.
    """

    bottleneck: PositiveInt = 64
    n: PositiveInt = 4
    rank: PositiveInt = 1


class KroneckerLinear(nn.Module):
    """x W^T + b, with W as above.

    W reads its input through n * n * rank numbers only, so it is the product of two thin matrices: one holds t, the
    other A and s. Two thin products take a fraction of the multiplications of x W^T (a third of the time on a CPU, at
    d = 768, h = 64 and n = 4), and W is never formed.

    Args:
        slow: A, (n, n, n), which other maps may share.
        in_features: width of the input.
        out_features: width of the output.
        rank: of s_i t_i^T.
    """

    def __init__(self, slow: nn.Parameter, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        n = len(slow)
        self.slow = slow
        self.s = nn.Parameter(torch.empty(n, out_features // n, rank))
        self.t = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for fast in (self.s, self.t):  # rank * var(s) * var(t) = 1 / in; the n terms of variance 1 / n in A add up to 1
            nn.init.normal_(fast, std=(rank * in_features) ** -0.25)

    def forward(self, x: Float[Tensor, "batch tokens in"]) -> Float[Tensor, "batch tokens out"]:
        """Apply the map to every token."""
        n = len(self.slow)
        inner = x.reshape(*x.shape[:-1], n, -1) @ self.t.permute(1, 0, 2).flatten(1)  # (batch, tokens, n, n * rank)
        outer = torch.einsum("iab,ipr->birap", self.slow, self.s).flatten(3).flatten(0, 2)  # (n * n * rank, out)
        return torch.add(inner.flatten(2) @ outer, self.bias)


def inject_compacter(vit: TargetViT, options: CompacterOptions) -> None:
    """Put factorized adapters behind the attention and the MLP of every block.

    Raises:
        UserError: n does not divide the widths; blocks that do not add two residuals.
    """
    dim, bottleneck, n, rank = vit.dim, options.bottleneck, options.n, options.rank
    if dim % n or bottleneck % n:
        legal = [k for k in range(1, min(dim, bottleneck) + 1) if not dim % k and not bottleneck % k]
        raise UserError(
            f"n ({n}) must divide the backbone's width ({dim}) and bottleneck ({bottleneck}); legal here: {legal}"
        )
    slow = nn.Parameter(torch.empty(n, n, n))
    nn.init.normal_(slow, std=n**-0.5)

    def make_adapter() -> Adapter:
        down, up = KroneckerLinear(slow, dim, bottleneck, rank), KroneckerLinear(slow, bottleneck, dim, rank)
        nn.init.zeros_(up.s)
        return Adapter(down, up)

    for block in vit.blocks:
        insert_adapters(block, ("attention", "mlp"), make_adapter)
