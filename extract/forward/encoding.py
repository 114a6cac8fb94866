"""Encodes tokens for storage, on the device that computed them; `store.dtypes` defines the formats."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from extract.backbones.backbone import TokensByLayer
from store.config import Dtype
from store.dtypes import CODES, Encoded, block_size
from store.errors import JobError

_TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# of a value that becomes a code: rounding to a step can double it, and a scale of int4 is a float16
_LIMIT = {"int8": torch.finfo(torch.float32).max / 2, "int4": torch.finfo(torch.float16).max * CODES["int4"].largest}
_TINY = torch.finfo(torch.float32).tiny
_SMALLEST_SCALE = 2.0**-24  # float16's
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative error of the nearest value

Rms = Float[Tensor, "dim"]


class Encoding:
    """A batch that is encoded and copied to the host; on a GPU both run in the background until `result` is called.

    Args:
        tokens: layer -> (samples, tokens, dim) float32.
        ids: of the samples, for messages.
        rms: layer -> (dim,), in the unit of the tokens and on their device; int8 and int4 only. The error of a value
            with code q is then at most half a step, (|q| + knee / 2 + 0.5) * scale * rms. float16 and bfloat16 round to
            the nearest: a relative error of at most 2^-11 and 2^-8.

    Raises:
        ValueError: int8 or int4 without rms.
    """

    def __init__(self, tokens: TokensByLayer, ids: Sequence[str], dtype: Dtype, rms: Mapping[int, Rms]) -> None:
        self._tokens, self._ids, self._dtype, self._rms = tokens, ids, dtype, rms
        self._parts: dict[int, list[Tensor]] = {}
        for layer, values in tokens.items():
            self._parts[layer] = [_to_host(part) for part in _encode(values, dtype, rms.get(layer))]
        gpu = next((values.device for values in tokens.values() if values.is_cuda), None)
        self._copied = torch.cuda.current_stream(gpu).record_event() if gpu else None

    def result(self) -> dict[int, Encoded]:
        """Wait for the copy; returns every layer's encoded tokens.

        Raises:
            JobError: a value is not finite, or overflows the format; the message names sample and layer.
        """
        if self._copied:
            self._copied.synchronize()
        for layer, (fits, *_) in self._parts.items():
            if not fits:
                raise self._not_storable(layer)
        return {layer: Encoded(*map(_as_array, stored)) for layer, (_, *stored) in self._parts.items()}

    def _not_storable(self, layer: int) -> JobError:
        values, dtype = self._tokens[layer], self._dtype
        fits = _fits(values, dtype)
        if dtype in CODES:
            fits &= _fits(values / self._rms[layer], dtype)
        sample, token, channel = (~fits).nonzero()[0].tolist()
        value = values[sample, token, channel]
        return JobError(
            f"sample {self._ids[sample]!r}, layer {layer}, token {token}, channel {channel}: "
            f"the value {value:g} cannot be stored as {dtype}; "
            + (_too_large(dtype) if value.isfinite() else _NON_FINITE)
        )


def rounding_error(
    tokens: Float[Tensor, "samples tokens dim"], dtype: Dtype, rms: Rms | None = None
) -> Float[Tensor, "samples tokens dim"]:
    """The largest difference between a decoded value and the one that was encoded.

    Args:
        tokens: decoded values; for int8 and int4 whole tokens, because their largest values set the steps.
        rms: of the layer; int8 and int4 only.
    """
    if dtype not in CODES:
        return tokens.abs() * _ROUNDING[dtype]
    if rms is None:
        raise ValueError(f"{dtype} needs the per-channel rms of the layer")
    knee, relative = CODES[dtype].knee, _by_scale(tokens / rms, dtype).abs()
    scale = _scale_of(relative.amax(dim=-1, keepdim=True), dtype)
    # Half a step, (q + knee / 2 + 0.5) * scale, where q (q + knee) * scale is the relative value.
    steps = ((relative / scale + (knee / 2) ** 2).sqrt() + 0.5) * scale
    if dtype == "int4":
        steps += CODES[dtype].largest * _SMALLEST_SCALE / 2  # a subnormal scale may be so much smaller than needed
    return steps.flatten(-2) * rms


def _too_large(dtype: Dtype) -> str:
    wider = [name for name in ("bfloat16", "float32", "int8") if name != dtype]
    return f"choose store.dtype {' or '.join(wider)}"


_NON_FINITE = "the backbone computed it: check its weights, or set extract.precision to float32"


def _encode(tokens: Float[Tensor, "samples tokens dim"], dtype: Dtype, rms: Rms | None) -> list[Tensor]:
    """[whether all values fit the format, the encoded values, for int8 the scale of every token]."""
    extremes = torch.stack(torch.aminmax(tokens))  # NaN if any value is
    if dtype not in CODES:
        return [_fits(extremes, dtype).all(), tokens.to(_TORCH_DTYPE[dtype])]
    if rms is None:
        raise ValueError(f"{dtype} needs the per-channel rms of the layer")
    most, knee, relative = CODES[dtype].most, CODES[dtype].knee, _by_scale(tokens / rms, dtype)
    codes = relative.abs()
    largest = codes.amax(dim=-1, keepdim=True)
    scale = _scale_of(largest, dtype)
    # solve q (q + knee) = |relative| / scale for q, in place
    codes /= scale
    codes.add_((knee / 2) ** 2).sqrt_().sub_(knee / 2)
    codes.round_().clamp_max_(most).copysign_(relative)
    fits = _fits(extremes, dtype).all() & _fits(largest, dtype).all()
    if dtype == "int4":
        return [fits, _packed(codes, scale)]
    return [fits, codes.flatten(-2).to(torch.int8), scale.flatten(-3)]


def _by_scale(
    relative: Float[Tensor, "samples tokens dim"], dtype: Dtype
) -> Float[Tensor, "samples tokens scales channels"]:
    """Those values together that share a scale."""
    dim = relative.shape[-1]
    channels = block_size(dim) if dtype == "int4" else dim
    return relative.reshape(*relative.shape[:-1], dim // channels, channels)


def _scale_of(largest: Float[Tensor, "*shape"], dtype: Dtype) -> Float[Tensor, "*shape"]:
    """The scale at which a value has the largest code; clamped, so that zeros, or subnormals, can be divided by it."""
    scale = largest / CODES[dtype].largest
    return scale.clamp_min(_TINY) if dtype == "int8" else scale.half().float().clamp_min(_SMALLEST_SCALE)


def _packed(
    codes: Float[Tensor, "samples tokens blocks channels"], scale: Float[Tensor, "samples tokens blocks 1"]
) -> UInt8[Tensor, "samples tokens width"]:
    """The blocks of int4."""
    low, high = (codes.to(torch.int8).view(torch.uint8) & 0xF).chunk(2, dim=-1)
    return torch.cat([scale.half().view(torch.uint8), low | high << 4], dim=-1).flatten(-2)


def _fits(values: Float[Tensor, "*shape"], dtype: Dtype) -> Bool[Tensor, "*shape"]:
    return values.abs() < _LIMIT[dtype] if dtype in CODES else values.to(_TORCH_DTYPE[dtype]).isfinite()


def _to_host(values: Tensor) -> Tensor:
    """Copy to the host; from a GPU to pinned memory, without waiting for it."""
    if not values.is_cuda:
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _as_array(values: Tensor) -> Any:
    """As numpy; bfloat16 as its bit pattern in uint16, because zarr-python has no bfloat16."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
