"""Tokens to what a store keeps of them, on the device that computed them: the formats are those of `store.dtypes`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from extract.backbones.backbone import TokensByLayer
from store.config import Dtype
from store.dtypes import INT8_MAX, KNEE, LARGEST, Encoded
from store.errors import JobError

_NARROW = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INT8_LIMIT = torch.finfo(torch.float32).max / 2  # rounding to a step can double a value, which must not overflow
_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative error of the nearest value

Rms = Float[Tensor, "dim"]


class Encoding:
    """A batch on its way from the device to the host: nothing waits until the `result` is asked for.

    Args:
        tokens: layer -> (samples, tokens, dim) float32.
        ids: of the samples, for messages.
        rms: layer -> (dim,), in the tokens' own unit and on their device; int8 alone needs it. The error of a value
            coded q is then at most half a step, (|q| + KNEE / 2 + 0.5) * scale * rms. float16 and bfloat16 round to
            the nearest: a relative error of at most 2^-11 and 2^-8.

    Raises:
        ValueError: int8 without rms.
    """

    def __init__(self, tokens: TokensByLayer, ids: Sequence[str], dtype: Dtype, rms: Mapping[int, Rms]) -> None:
        self._tokens, self._ids, self._dtype, self._rms = tokens, ids, dtype, rms
        self._parts: dict[int, list[Tensor]] = {}
        for layer, values in tokens.items():
            self._parts[layer] = [_to_host(part) for part in _encode(values, dtype, rms.get(layer))]
        gpu = next((values.device for values in tokens.values() if values.is_cuda), None)
        self._arrived = torch.cuda.current_stream(gpu).record_event() if gpu else None

    def result(self) -> dict[int, Encoded]:
        """Every layer as it is stored.

        Raises:
            JobError: a value is not finite, or overflows the format; it names sample and layer.
        """
        if self._arrived:
            self._arrived.synchronize()
        for layer, (fits, *_) in self._parts.items():
            if not fits:
                raise self._not_storable(layer)
        return {layer: Encoded(*map(_as_array, stored)) for layer, (_, *stored) in self._parts.items()}

    def _not_storable(self, layer: int) -> JobError:
        values, dtype = self._tokens[layer], self._dtype
        fits = _fits(values, dtype)
        if dtype == "int8":
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
    """The most by which every value, as a store gives it back, may differ from the one that was encoded.

    Args:
        tokens: decoded values; of int8 whole tokens, as their largest value sets the step.
        rms: that of the layer; int8 alone needs it.
    """
    if dtype != "int8":
        return tokens.abs() * _ROUNDING[dtype]
    if rms is None:
        raise ValueError("int8 needs the per-channel rms of the layer")
    relative = (tokens / rms).abs()
    scale = (relative.amax(dim=-1, keepdim=True) / LARGEST).clamp_min(_TINY)
    # Half a step, (q + KNEE / 2 + 0.5) * scale * rms, where q (q + KNEE) * scale is the relative value.
    return ((relative / scale + (KNEE / 2) ** 2).sqrt() + 0.5) * scale * rms


def _too_large(dtype: Dtype) -> str:
    wider = [name for name in ("bfloat16", "float32", "int8") if name != dtype]
    return f"choose store.dtype {' or '.join(wider)}"


_NON_FINITE = "the backbone itself yields it: check its weights, or set extract.precision to float32"


def _encode(tokens: Float[Tensor, "samples tokens dim"], dtype: Dtype, rms: Rms | None) -> list[Tensor]:
    """Whether all values fit the format, the values themselves and, for int8, the scale of every token."""
    extremes = torch.stack(torch.aminmax(tokens))  # which are NaN if any value is
    if dtype != "int8":
        return [_fits(extremes, dtype).all(), tokens.to(_NARROW[dtype])]
    if rms is None:
        raise ValueError("int8 needs the per-channel rms of the layer")
    relative = tokens / rms
    codes = relative.abs()
    largest = codes.amax(dim=-1)
    # A token of zeros, or one so small that its scale is subnormal, needs a scale to divide by.
    scale = (largest / LARGEST).clamp_min(_TINY)
    codes /= scale[..., None]  # these are the steps that q (q + KNEE) is solved for, in place from here on
    codes.add_((KNEE / 2) ** 2).sqrt_().sub_(KNEE / 2)
    codes.round_().clamp_max_(INT8_MAX).copysign_(relative)
    return [_fits(extremes, dtype).all() & _fits(largest, dtype).all(), codes.to(torch.int8), scale]


def _fits(values: Float[Tensor, "*shape"], dtype: Dtype) -> Bool[Tensor, "*shape"]:
    return values.abs() < _INT8_LIMIT if dtype == "int8" else values.to(_NARROW[dtype]).isfinite()


def _to_host(values: Tensor) -> Tensor:
    """From a GPU the copy is begun and not waited for, which takes memory that the system leaves in its place."""
    if not values.is_cuda:
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _as_array(values: Tensor) -> Any:
    """zarr-python has no bfloat16: its bit pattern is kept."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
