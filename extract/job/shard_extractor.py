"""Computes shards of a store: their samples go through the frozen backbone, and the tokens are encoded for storage."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8

from extract.forward.encoding import Encoding
from extract.forward.frozen_forward import DecodedBatch
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import ImageSplit
from store.arrays import MISSING, SKIPPED, STORED
from store.dtypes import Encoded
from store.errors import UserError
from store.layout import in_groups
from store.schema import Schema


@dataclass(frozen=True)
class ExtractedShard:
    """The encoded tokens and status of a shard; `forward_seconds` is the time from reading its samples to encoding."""

    tokens: dict[int, Encoded]
    status: UInt8[np.ndarray, "rows"]
    skipped: dict[str, str]
    forward_seconds: float


class ShardExtractor:
    """Computes shards, each from its own samples alone: no batch spans two shards.

    Args:
        job: its source is in the order of the store.
        schema: of the store, or of layers that are added to it.
        rms: layer -> per-channel RMS (dim,), int8 and int4 stores only.

    Attributes:
        precision: of the forward pass.
    """

    def __init__(self, job: ExtractionJob, schema: Schema, rms: Mapping[int, np.ndarray]) -> None:
        self.schema, self._splits, self._skip = schema, job.source.splits, job.skips_undecodable
        self._forward = job.forward(schema.layers)
        self.precision = self._forward.precision
        self._rms = {layer: torch.from_numpy(values).to(self._forward.device) for layer, values in rms.items()}
        on_gpu = self._forward.device.type == "cuda"
        self._ahead = 1 if on_gpu else 0  # batches that the GPU computes while an earlier one is copied into its shard
        # on a GPU a shard is at least four batches, so that there are some to overlap
        self._max_batch = max(1, schema.shard_samples // 4) if on_gpu else schema.shard_samples

    def extract(
        self, split: str, numbers: Sequence[int], advance: Callable[[int], None] = lambda _: None
    ) -> Iterator[ExtractedShard]:
        """Compute shards in order; samples of the next shard are decoded meanwhile.

        Args:
            advance: called with the number of samples of every finished batch.

        Raises:
            UserError: a sample cannot be decoded (`on_error: fail`).
            JobError: a value cannot be stored.
        """
        images, shards = self._splits[split], self.schema.shards(split)
        groups = [in_groups(shards.rows(number), self._forward.batch_size(self._max_batch)) for number in numbers]
        batches = self._forward.batches(images, [group for shard in groups for group in shard])
        partial, pending, started = deque[_PartialShard](), deque[_PendingBatch](), time.perf_counter()
        for number, shard in zip(numbers, groups, strict=True):
            partial.append(_PartialShard(shards.rows(number)))
            for batch in islice(batches, len(shard)):
                # start this batch, then store those that are more than `_ahead` behind it
                pending.extend(self._start(batch, images, partial[-1]))
                while len(pending) > self._ahead:
                    pending.popleft().store()
                advance(len(batch.rows) + len(batch.failed))
                started = yield from self._finished(partial, started)
        while pending:
            pending.popleft().store()
        yield from self._finished(partial, started)

    def _start(self, batch: DecodedBatch, images: ImageSplit, shard: "_PartialShard") -> Iterator["_PendingBatch"]:
        """Start the forward pass and encoding of a batch; nothing if all its samples are skipped."""
        shard.skip(list(batch.failed), report_failures(batch, images, self._skip))
        if batch.images is not None:
            ids = [images.ids[row] for row in batch.rows]
            encoding = Encoding(self._forward(batch.images), ids, self.schema.dtype, self._rms)
            yield _PendingBatch(shard, batch.rows, encoding)

    def _finished(self, partial: deque["_PartialShard"], started: float) -> Generator[ExtractedShard, None, float]:
        """Yield the shards that are full, in order; returns when the next one was started."""
        while partial and partial[0].is_full:
            shard = partial.popleft()
            tokens = shard.tokens or self._zeros(len(shard.status))
            yield ExtractedShard(tokens, shard.status, shard.skipped, time.perf_counter() - started)
            started = time.perf_counter()
        return started

    def _zeros(self, n_rows: int) -> dict[int, Encoded]:
        """The tokens of a shard that has no sample that can be decoded."""
        zeros = torch.zeros(n_rows, self.schema.token_layout.num_tokens, self.schema.dim, device=self._forward.device)
        return Encoding(dict.fromkeys(self.schema.layers, zeros), [], self.schema.dtype, self._rms).result()


class _PartialShard:
    """The rows of a shard, filled batch by batch; skipped rows stay zero."""

    def __init__(self, rows: range) -> None:
        self.tokens: dict[int, Encoded] = {}
        self.status = np.full(len(rows), MISSING, np.uint8)
        self.skipped: dict[str, str] = {}
        self._first = rows.start

    @property
    def is_full(self) -> bool:
        return bool((self.status != MISSING).all())

    def skip(self, rows: Sequence[int], reasons: Mapping[str, str]) -> None:
        self.status[self._places(rows)] = SKIPPED
        self.skipped |= reasons

    def store(self, rows: Sequence[int], tokens: Mapping[int, Encoded]) -> None:
        places = self._places(rows)
        for layer, part in tokens.items():
            if layer not in self.tokens:
                self.tokens[layer] = Encoded(*(self._zeros_like(array) for array in _arrays(part)))
            for whole, array in zip(_arrays(self.tokens[layer]), _arrays(part), strict=True):
                whole[places] = array
        self.status[places] = STORED

    def _places(self, rows: Sequence[int]) -> list[int]:
        return [row - self._first for row in rows]

    def _zeros_like(self, part: np.ndarray) -> np.ndarray:
        return np.zeros((len(self.status), *part.shape[1:]), part.dtype)


@dataclass(frozen=True)
class _PendingBatch:
    """A batch that the device may still be computing, with the rows of the shard that it belongs to."""

    shard: _PartialShard
    rows: Sequence[int]
    encoding: Encoding

    def store(self) -> None:
        """Wait for the batch and copy it into its shard."""
        self.shard.store(self.rows, self.encoding.result())


def _arrays(encoded: Encoded) -> list[np.ndarray]:
    return [array for array in (encoded.values, encoded.scale) if array is not None]


def report_failures(batch: DecodedBatch, split: ImageSplit, skip: bool) -> dict[str, str]:
    """Id -> reason for the samples of a batch that cannot be decoded; raises UserError for the first unless `skip`."""
    if batch.failed and not skip:
        raise UserError(next(iter(batch.failed.values())))
    return {split.ids[row]: reason for row, reason in batch.failed.items()}
