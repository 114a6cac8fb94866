"""How token values are kept: float32, float16, bfloat16 or int8.

int8 divides the per-channel RMS of the layer out first, then keeps one scale a token and codes q that stand for
q (|q| + 64), which spaces small values more finely than large ones: one massive channel then costs the others
nothing (docs/formats.md compares the alternatives). bfloat16 is kept as its uint16 bit pattern, because zarr-python has
no bfloat16.

`decode` works on numpy arrays and on torch tensors alike, with the same float32 arithmetic and so the same bits.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Num

from store.config import Dtype
from store.errors import JobError

STORED_DTYPE: dict[Dtype, str] = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
INT8_MAX, KNEE = 127, 64
LARGEST = INT8_MAX * (INT8_MAX + KNEE)  # what the largest code stands for
INT8_ENCODING = f"q * (|q| + {KNEE}) * scale * rms"
_INT8_LIMIT = np.finfo(np.float32).max / 2  # rounding to a step can double a value, which must not overflow


@dataclass(frozen=True)
class Encoded:
    """Stored values of one layer and, for int8, the scale of every token: its largest value / LARGEST."""

    values: Num[np.ndarray, "samples tokens dim"]
    scale: Float32[np.ndarray, "samples tokens"] | None = None


class NotStorableError(JobError):
    """A value that the format cannot hold, at [sample, token, channel] of the array given."""

    def __init__(self, index: tuple[int, ...], value: float, dtype: Dtype) -> None:
        self.index, self.value, self.dtype = index, value, dtype
        super().__init__(f"{value} at (sample, token, channel) {index} cannot be stored as {dtype}")


def channel_rms(mean_square: Float[np.ndarray, "dim"]) -> Float32[np.ndarray, "dim"]:
    """Root of every channel's mean square; 1 where that is zero in float32, so that it can be divided by."""
    rms = np.sqrt(mean_square).astype(np.float32)  # narrowed first: what float32 rounds to zero counts as zero
    return np.where(rms > 0, rms, np.float32(1))


def encode(
    tokens: Float32[np.ndarray, "samples tokens dim"], dtype: Dtype, rms: Float32[np.ndarray, "dim"] | None = None
) -> Encoded:
    """Turn float32 tokens (samples, tokens, dim) into what is stored.

    `rms` (dim,), in the tokens' own unit, is for int8 alone; the error of a value coded q is then at most half a step,
    (|q| + KNEE / 2 + 0.5) * scale * rms. float16 and bfloat16 round to the nearest: a relative error of at most 2^-11
    and 2^-8.

    Raises:
        ValueError: int8 without rms.
        NotStorableError: at the first non-finite value, or the first that overflows the format.
    """
    _require_storable(np.isfinite(tokens), tokens, dtype)
    if dtype == "float32":
        return Encoded(tokens)
    if dtype == "bfloat16":
        narrow = tokens.astype(ml_dtypes.bfloat16)
        _require_storable(np.isfinite(narrow), tokens, dtype)
        return Encoded(narrow.view(np.uint16))
    if dtype == "float16":
        with np.errstate(over="ignore"):  # reported below, with its place
            half = tokens.astype(np.float16)
        _require_storable(np.isfinite(half), tokens, dtype)
        return Encoded(half)
    if rms is None:
        raise ValueError("int8 needs the per-channel rms of the layer")
    return _encode_int8(tokens, rms)


def _encode_int8(tokens: Float32[np.ndarray, "samples tokens dim"], rms: Float32[np.ndarray, "dim"]) -> Encoded:
    with np.errstate(over="ignore"):
        relative = tokens / rms
    _require_storable((np.abs(relative) < _INT8_LIMIT) & (np.abs(tokens) < _INT8_LIMIT), tokens, "int8")
    scale = np.abs(relative).max(axis=-1) / np.float32(LARGEST)
    # A token of zeros, or one so small that its scale is subnormal, needs a scale to divide by.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    steps = np.abs(relative) / scale[..., None]
    codes = np.sqrt(steps + np.float32((KNEE / 2) ** 2)) - np.float32(KNEE / 2)  # solves q (q + KNEE) = steps
    values = np.copysign(np.minimum(np.rint(codes), INT8_MAX), relative).astype(np.int8)
    return Encoded(values, scale)


def decode(values: Any, scale: Any = None, rms: Any = None) -> Any:
    """The inverse of `encode`, to float32; numpy arrays or torch tensors, (..., tokens, dim).

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


def _require_storable(good: np.ndarray, tokens: np.ndarray, dtype: Dtype) -> None:
    if not good.all():
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        raise NotStorableError(index, float(tokens[index]), dtype)
