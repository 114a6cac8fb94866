"""One shard of the extraction: its samples through the frozen backbone, to what is stored of them."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8

from extract.encoding import Encoding
from extract.forward import Batch, FrozenForward
from extract.sources import ImageSplit
from store.arrays import SKIPPED, STORED
from store.errors import UserError
from store.formats import Encoded
from store.groups import in_groups
from store.heap import keep_freed_memory
from store.schema import Schema


@dataclass(frozen=True)
class ExtractedShard:
    """What is to be committed of a shard, and the time that its samples, their forward pass and encoding took."""

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
        self._splits, self._forward, self._schema, self._skip = splits, forward, schema, skip
        self._rms = {layer: torch.from_numpy(values).to(forward.device) for layer, values in rms.items()}
        keep_freed_memory()
        self._ahead = 1 if forward.device.type == "cuda" else 0  # batches under way on the GPU while one is placed

    def extract(
        self, split: str, numbers: Sequence[int], advance: Callable[[int], None] = lambda _: None
    ) -> Iterator[ExtractedShard]:
        """Compute shards, in order; the next one's samples are decoded meanwhile. `advance` hears of samples done.

        Raises:
            UserError: a sample cannot be decoded, and such are not to be skipped.
            JobError: a value cannot be stored.
        """
        images, shards = self._splits[split], self._schema.shards(split)
        batch_size = self._forward.batch_size(self._schema.shard_samples)
        groups = [in_groups(shards.rows(number), batch_size) for number in numbers]
        batches = self._forward.batches(images, [group for shard in groups for group in shard])
        for number, shard in zip(numbers, groups, strict=True):
            yield self._fill(images, shards.rows(number), islice(batches, len(shard)), advance)

    def _fill(
        self, images: ImageSplit, rows: range, batches: Iterator[Batch], advance: Callable[[int], None]
    ) -> ExtractedShard:
        filling = _Filling(len(rows))
        begun: deque[tuple[list[int], Encoding]] = deque()
        started = time.perf_counter()
        for batch in batches:
            failed = report_failures(batch, images, self._skip)
            filling.skip([row - rows.start for row in batch.failed], failed)
            if batch.images is not None:
                ids = [images.ids[row] for row in batch.rows]
                encoding = Encoding(self._forward(batch.images), ids, self._schema.dtype, self._rms)
                begun.append(([row - rows.start for row in batch.rows], encoding))
            while len(begun) > self._ahead:
                filling.place(*begun.popleft())
            advance(len(batch.rows) + len(batch.failed))
        while begun:
            filling.place(*begun.popleft())
        seconds = time.perf_counter() - started - filling.seconds
        return ExtractedShard(filling.tokens or self._zeros(len(rows)), filling.status, filling.skipped, seconds)

    def _zeros(self, n_rows: int) -> dict[int, Encoded]:
        """Of a shard in which no sample could be decoded."""
        zeros = torch.zeros(n_rows, self._schema.token_layout.num_tokens, self._schema.dim, device=self._forward.device)
        tokens = dict.fromkeys(self._schema.layers, zeros)
        return Encoding(tokens, [], self._schema.dtype, self._rms).result()


class _Filling:
    """A shard as its batches arrive; skipped rows keep zeros."""

    def __init__(self, n_rows: int) -> None:
        self.tokens: dict[int, Encoded] = {}
        self.status = np.full(n_rows, STORED, np.uint8)
        self.skipped: dict[str, str] = {}
        self.seconds = 0.0  # spent here on copying

    def skip(self, rows: Sequence[int], reasons: Mapping[str, str]) -> None:
        self.status[rows] = SKIPPED
        self.skipped |= reasons

    def place(self, rows: Sequence[int], encoding: Encoding) -> None:
        encoded = encoding.result()
        started = time.perf_counter()
        for layer, part in encoded.items():
            if layer not in self.tokens:
                self.tokens[layer] = Encoded(*(self._empty(array) for array in _arrays(part)))
            for whole, array in zip(_arrays(self.tokens[layer]), _arrays(part), strict=True):
                whole[rows] = array
        self.seconds += time.perf_counter() - started

    def _empty(self, like: np.ndarray) -> np.ndarray:
        return np.zeros((len(self.status), *like.shape[1:]), like.dtype)


def _arrays(encoded: Encoded) -> list[np.ndarray]:
    return [array for array in (encoded.values, encoded.scale) if array is not None]


def report_failures(batch: Batch, split: ImageSplit, skip: bool) -> dict[str, str]:
    """Id -> reason of the samples of a batch that cannot be decoded; UserError unless these are to be skipped."""
    if batch.failed and not skip:
        raise UserError(next(iter(batch.failed.values())))
    return {split.ids[row]: reason for row, reason in batch.failed.items()}
