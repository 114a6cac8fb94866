"""Ridge regression of class indicators in the space that the samples span, with every sample left out once.

With few samples of many features it costs the eigenvectors of one small matrix, whatever the number of features, and
leaving out a sample costs nothing (Cawley and Talbot, 2003): e_i = a_i / G_ii with G = (K + r I)^-1 and a = G Y.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-10, 3))  # of the ridge, relative to the mean of the diagonal
_BIAS = 100.0  # variance of a constant feature, so large that its weight, the bias, is hardly shrunk


def leave_one_out(
    kernel: Float64[Tensor, "samples samples"], targets: Float64[Tensor, "samples classes"]
) -> Float64[Tensor, "samples classes"]:
    """Predict the targets of every sample by a regression on all others.

    Args:
        kernel: inner products of the samples' features, which need not be centered.
        targets: 0 and 1.

    Returns:
        predictions by the strength of the ridge, of `STRENGTHS`, that has the least squared error.
    """
    n_samples = len(kernel)
    rows = kernel.mean(dim=1, keepdim=True)
    centered = kernel - rows - rows.T + kernel.mean()
    scale = centered.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(centered / scale + _BIAS)
    in_eigenvectors, squares = vectors.T @ targets, vectors.square()
    best, least = targets, torch.inf
    for strength in STRENGTHS:
        inverse = 1 / (values.clamp(min=0) + strength * n_samples)
        residuals = vectors @ (inverse[:, None] * in_eigenvectors) / (squares @ inverse)[:, None]
        error = float(residuals.square().sum())
        if error < least:
            best, least = targets - residuals, error
    return best
