"""One shard of the extraction: its samples through the frozen backbone, to what is stored of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from extract.backbone import TokensByLayer
from extract.forward import Batch, FrozenForward
from extract.sources import ImageSplit
from store.arrays import SKIPPED, STORED
from store.config import Dtype
from store.errors import JobError, UserError
from store.formats import Encoded, NotStorableError, encode
from store.groups import in_groups
from store.schema import Schema


@dataclass(frozen=True)
class ExtractedShard:
    """What is to be committed of a shard, and the time that reading its samples and the forward pass took."""

    tokens: dict[int, Encoded]
    status: UInt8[np.ndarray, "rows"]
    skipped: dict[str, str]
    forward_seconds: float


class ShardExtractor:
    """Computes shards of a store, each from its own samples alone: batches do not reach across shards.

    Args:
        splits: in the order of the store.
        rms: of every layer, int8 stores only.
        skip: note samples that cannot be decoded, instead of failing.
    """

    def __init__(
        self,
        splits: Mapping[str, ImageSplit],
        forward: FrozenForward,
        schema: Schema,
        rms: Mapping[int, np.ndarray],
        skip: bool,
    ) -> None:
        self._splits, self._forward, self._schema, self._rms, self._skip = splits, forward, schema, rms, skip

    def extract(self, split: str, number: int, advance: Callable[[int], None] = lambda _: None) -> ExtractedShard:
        """Compute one shard; `advance` hears of every sample that is done.

        Raises:
            UserError: a sample cannot be decoded, and such are not to be skipped.
            JobError: a value cannot be stored.
        """
        images, rows = self._splits[split], self._schema.shards(split).rows(number)
        buffers: dict[int, Encoded] = {}
        status = np.full(len(rows), STORED, np.uint8)
        skipped: dict[str, str] = {}
        seconds, started = 0.0, time.perf_counter()
        for batch in self._forward.batches(images, in_groups(rows, self._forward.batch_size)):
            skipped |= report_failures(batch, images, self._skip)
            status[[row - rows.start for row in batch.failed]] = SKIPPED
            tokens = {} if batch.images is None else self._forward(batch.images)
            seconds += time.perf_counter() - started
            encoded = encode_layers(tokens, [images.ids[row] for row in batch.rows], self._schema.dtype, self._rms)
            _place(buffers, encoded, [row - rows.start for row in batch.rows], len(rows))
            advance(len(batch.rows) + len(batch.failed))
            started = time.perf_counter()
        for layer in set(self._schema.layers) - set(buffers):  # a shard in which no sample could be decoded
            zeros = np.zeros((len(rows), self._schema.token_layout.num_tokens, self._schema.dim), np.float32)
            buffers[layer] = encode(zeros, self._schema.dtype, self._rms.get(layer))
        return ExtractedShard(buffers, status, skipped, seconds)


def report_failures(batch: Batch, split: ImageSplit, skip: bool) -> dict[str, str]:
    """Id -> reason of the samples of a batch that cannot be decoded; UserError unless these are to be skipped."""
    if batch.failed and not skip:
        raise UserError(next(iter(batch.failed.values())))
    return {split.ids[row]: reason for row, reason in batch.failed.items()}


def encode_layers(
    tokens: TokensByLayer, ids: Sequence[str], dtype: Dtype, rms: Mapping[int, np.ndarray]
) -> dict[int, Encoded]:
    """Every layer as it is stored; a value that cannot be stored is a JobError that names sample and layer."""
    encoded = {}
    for layer, values in tokens.items():
        try:
            encoded[layer] = encode(values.cpu().numpy(), dtype, rms.get(layer))
        except NotStorableError as error:
            sample, token, channel = error.index
            raise JobError(
                f"sample {ids[sample]!r}, layer {layer}, token {token}, channel {channel}: the value {error.value} "
                f"cannot be stored as {error.dtype}; "
                + (_too_large(error.dtype) if np.isfinite(error.value) else _NON_FINITE)
            ) from error
    return encoded


def _too_large(dtype: str) -> str:
    wider = [name for name in ("bfloat16", "float32", "int8") if name != dtype]
    return f"choose store.dtype {' or '.join(wider)}"


_NON_FINITE = "the backbone itself yields it: check its weights, or set extract.precision to float32"


def _place(buffers: dict[int, Encoded], encoded: Mapping[int, Encoded], rows: Sequence[int], total: int) -> None:
    """Copy a batch into the shard's buffers, which start as zeros: what a skipped row keeps."""
    for layer, part in encoded.items():
        if layer not in buffers:
            scale = None if part.scale is None else np.zeros((total, *part.scale.shape[1:]), part.scale.dtype)
            buffers[layer] = Encoded(np.zeros((total, *part.values.shape[1:]), part.values.dtype), scale)
        whole = buffers[layer]
        whole.values[rows] = part.values
        if whole.scale is not None:
            whole.scale[rows] = part.scale
