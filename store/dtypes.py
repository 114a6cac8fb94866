"""Defines the formats of stored token values, and decodes them: float32, float16, bfloat16, int8 or int4.

int8 and int4 divide values by the per-channel RMS of the layer, then store a scale and codes q that decode to
q (|q| + knee). Small values are spaced more finely than large ones, so that one massive channel costs the others no
accuracy (docs/formats.md compares the alternatives). int8 has a float32 scale for each token, in an array of its own.
int4 has blocks of up to 32 channels: a little-endian float16 scale, then bytes whose low halves are the codes of the
block's first half of channels and whose high halves are those of the second, as two's complements. bfloat16 is stored
as its uint16 bit pattern, since zarr-python has no bfloat16.

`decode` gives the same bits for numpy arrays and torch tensors. Tokens are encoded in `extract.forward.encoding`.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Num

from store.config import Dtype

STORED_DTYPE: dict[Dtype, str] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
    "int8": "int8",
    "int4": "uint8",
}
SCALE_BYTES = 2  # of a block of int4
_MOST_IN_BLOCK = 32


@dataclass(frozen=True)
class Codes:
    """Codes from -`most` to `most`; q stands for q (|q| + `knee`) times a scale and the RMS of the channel."""

    most: int
    knee: int

    @property
    def largest(self) -> int:
        """The largest code, decoded."""
        return self.most * (self.most + self.knee)

    @property
    def encoding(self) -> str:
        """The formula, for the attributes of an array."""
        return f"q * (|q| + {self.knee}) * scale * rms"


CODES: dict[Dtype, Codes] = {"int8": Codes(most=127, knee=64), "int4": Codes(most=7, knee=4)}
ENCODINGS: dict[Dtype, str] = {
    "int8": CODES["int8"].encoding,
    "int4": f"{CODES['int4'].encoding}, in blocks of channels: float16 scale, then two codes a byte",
}


@dataclass(frozen=True)
class Encoded:
    """Stored values of one layer and, for int8, the scale of every token.

    The width is `stored_width` of the format.
    """

    values: Num[np.ndarray, "samples tokens width"]
    scale: Float32[np.ndarray, "samples tokens"] | None = None


def channel_rms(mean_square: Float[np.ndarray, "dim"]) -> Float32[np.ndarray, "dim"]:
    """Root of every channel's mean square; 1 where that is zero in float32, since values are divided by it."""
    rms = np.sqrt(mean_square).astype(
        np.float32
    )  # converted before the comparison, since float32 rounds more values to zero
    return np.where(rms > 0, rms, np.float32(1))


def decode(values: Any, scale: Any = None, rms: Any = None) -> Any:
    """Decode stored values to float32: q (|q| + knee) * scale * rms for int8 and int4, else the values.

    Args:
        values: numpy array or torch tensor (..., tokens, width); bfloat16 as ml_dtypes.bfloat16 or torch.bfloat16, not
            as bit patterns.
        scale: float32 (..., tokens), for int8 only.
        rms: float32 (dim,), for int8 and int4 only.
    """
    if scale is not None:
        decoded = _expand(_wide(values), "int8")
        decoded *= scale[..., None]
        decoded *= rms
        return decoded
    return _decode_blocks(values, rms) if str(values.dtype).endswith("uint8") else _wide(values)


def _decode_blocks(values: Any, rms: Any) -> Any:
    """Decode int4."""
    dim = len(rms)
    block = block_size(dim)
    half = block // 2
    blocks = values.reshape(*values.shape[:-1], dim // block, SCALE_BYTES + half)
    float16 = np.dtype("<f2") if isinstance(values, np.ndarray) else values[:0].half().dtype  # without importing torch
    scale = blocks[..., :SCALE_BYTES].view(float16)
    decoded = _wide(scale) * rms.reshape(-1, block)
    packed = blocks[..., SCALE_BYTES:] ^ 0x88  # codes plus 8
    for channels, halves in ((slice(half), packed & 0xF), (slice(half, block), packed >> 4)):
        codes = _wide(halves)
        codes -= 8
        decoded[..., channels] *= _expand(codes, "int4")
    return decoded.reshape(*values.shape[:-1], dim)


def _expand(codes: Any, dtype: Dtype) -> Any:
    """The values q (|q| + knee) of float32 codes q."""
    expanded = abs(codes)
    expanded += CODES[dtype].knee  # in place: allocating new arrays takes longer than the arithmetic
    expanded *= codes
    return expanded


def _wide(values: Any) -> Any:
    """As float32."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()


def decode_numpy(encoded: Encoded, dtype: Dtype, rms: Float32[np.ndarray, "dim"] | None) -> Float[np.ndarray, "..."]:
    """Decode the stored values of one layer to float32."""
    values = encoded.values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else encoded.values
    decoded: Float[np.ndarray, "..."] = decode(values, encoded.scale, rms)
    return decoded


def block_size(dim: int) -> int:
    """Channels of a block of int4: the largest multiple of 4 up to 32 that divides the width; 0 if 4 does not."""
    return max((size for size in range(4, _MOST_IN_BLOCK + 1, 4) if dim % size == 0), default=0)


def stored_width(dtype: Dtype, dim: int) -> int:
    """Stored values of a token of `dim` channels; for int4, bytes of its blocks."""
    return dim // 2 + dim // block_size(dim) * SCALE_BYTES if dtype == "int4" else dim


def bytes_per_token(dtype: Dtype, dim: int) -> int:
    """Stored bytes of one token before compression."""
    return stored_width(dtype, dim) * np.dtype(STORED_DTYPE[dtype]).itemsize + (4 if dtype == "int8" else 0)
