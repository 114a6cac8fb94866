"""How token values are kept: float32, float16, bfloat16 or int8.

int8 divides the per-channel RMS of the layer out first, then keeps one scale a token and codes q that stand for
q (|q| + 64), which spaces small values more finely than large ones: one massive channel then costs the others
nothing (docs/formats.md compares the alternatives). bfloat16 is kept as its uint16 bit pattern, because zarr-python has
no bfloat16.

`decode` works on numpy arrays and on torch tensors alike, with the same float32 arithmetic and so the same bits; how
tokens are encoded, where they are computed, is in `extract.forward.encoding`.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Num

from store.config import Dtype

STORED_DTYPE: dict[Dtype, str] = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
INT8_MAX, KNEE = 127, 64
LARGEST = INT8_MAX * (INT8_MAX + KNEE)  # what the largest code stands for
INT8_ENCODING = f"q * (|q| + {KNEE}) * scale * rms"


@dataclass(frozen=True)
class Encoded:
    """Stored values of one layer and, for int8, the scale of every token: its largest value / LARGEST."""

    values: Num[np.ndarray, "samples tokens dim"]
    scale: Float32[np.ndarray, "samples tokens"] | None = None


def channel_rms(mean_square: Float[np.ndarray, "dim"]) -> Float32[np.ndarray, "dim"]:
    """Root of every channel's mean square; 1 where that is zero in float32, so that it can be divided by."""
    rms = np.sqrt(mean_square).astype(np.float32)  # narrowed first: what float32 rounds to zero counts as zero
    return np.where(rms > 0, rms, np.float32(1))


def decode(values: Any, scale: Any = None, rms: Any = None) -> Any:
    """Stored values to float32; numpy arrays or torch tensors, (..., tokens, dim).

    bfloat16 arrives here already viewed as such: ml_dtypes.bfloat16 in numpy, torch.bfloat16 in torch. `scale` is
    (..., tokens) and `rms` (dim,), both float32, for int8; None for the other formats.
    """
    wide = values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()
    if scale is None:
        return wide
    decoded = abs(wide)
    decoded += KNEE  # in place from here on: getting memory for new arrays takes longer than the arithmetic
    decoded *= wide
    decoded *= scale[..., None]
    decoded *= rms
    return decoded


def decode_numpy(encoded: Encoded, dtype: Dtype, rms: Float32[np.ndarray, "dim"] | None) -> Float[np.ndarray, "..."]:
    """Stored values of one layer to float32."""
    values = encoded.values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else encoded.values
    decoded: Float[np.ndarray, "..."] = decode(values, encoded.scale, rms)
    return decoded


def bytes_per_token(dtype: Dtype, dim: int) -> int:
    """Stored bytes of one token before compression."""
    return dim * np.dtype(STORED_DTYPE[dtype]).itemsize + (4 if dtype == "int8" else 0)
