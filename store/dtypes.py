"""Defines the formats of stored token values, and decodes them: float32, float16, bfloat16 or int8.

int8 divides values by the per-channel RMS of the layer, then stores a scale for each token and codes q that decode to
q (|q| + 64). Small values are spaced more finely than large ones, so that one massive channel costs the others no
accuracy (docs/formats.md compares the alternatives). bfloat16 is stored as its uint16 bit pattern, since zarr-python
has no bfloat16.

`decode` gives the same bits for numpy arrays and torch tensors. Tokens are encoded in `extract.forward.encoding`.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Num

from store.config import Dtype

STORED_DTYPE: dict[Dtype, str] = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
INT8_MAX, KNEE = 127, 64
LARGEST = INT8_MAX * (INT8_MAX + KNEE)  # the largest code, decoded
INT8_ENCODING = f"q * (|q| + {KNEE}) * scale * rms"


@dataclass(frozen=True)
class Encoded:
    """Stored values of one layer and, for int8, the scale of every token: its largest value divided by LARGEST."""

    values: Num[np.ndarray, "samples tokens dim"]
    scale: Float32[np.ndarray, "samples tokens"] | None = None


def channel_rms(mean_square: Float[np.ndarray, "dim"]) -> Float32[np.ndarray, "dim"]:
    """Root of every channel's mean square; 1 where that is zero in float32, since values are divided by it."""
    rms = np.sqrt(mean_square).astype(
        np.float32
    )  # converted before the comparison, since float32 rounds more values to zero
    return np.where(rms > 0, rms, np.float32(1))


def decode(values: Any, scale: Any = None, rms: Any = None) -> Any:
    """Decode stored values to float32: values * (|values| + 64) * scale * rms for int8, else the values.

    Args:
        values: numpy array or torch tensor (..., tokens, dim); bfloat16 as ml_dtypes.bfloat16 or torch.bfloat16, not as
            bit patterns.
        scale: float32 (..., tokens), for int8 only.
        rms: float32 (dim,), for int8 only.
    """
    wide = values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()
    if scale is None:
        return wide
    decoded = abs(wide)
    decoded += KNEE  # in place: allocating new arrays takes longer than the arithmetic
    decoded *= wide
    decoded *= scale[..., None]
    decoded *= rms
    return decoded


def decode_numpy(encoded: Encoded, dtype: Dtype, rms: Float32[np.ndarray, "dim"] | None) -> Float[np.ndarray, "..."]:
    """Decode the stored values of one layer to float32."""
    values = encoded.values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else encoded.values
    decoded: Float[np.ndarray, "..."] = decode(values, encoded.scale, rms)
    return decoded


def bytes_per_token(dtype: Dtype, dim: int) -> int:
    """Stored bytes of one token before compression."""
    return dim * np.dtype(STORED_DTYPE[dtype]).itemsize + (4 if dtype == "int8" else 0)
