"""One shard of the extraction: its samples through the frozen backbone, to what is stored of them."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8

from extract.forward.device import keep_freed_memory
from extract.forward.encoding import Encoding
from extract.forward.frozen_forward import Batch, FrozenForward
from extract.sources.open_source import ImageSplit
from store.arrays import MISSING, SKIPPED, STORED
from store.dtypes import Encoded
from store.errors import UserError
from store.layout import in_groups
from store.schema import Schema


@dataclass(frozen=True)
class ExtractedShard:
    """What is to be committed of a shard, and the time that it took from its samples to encoded tokens."""

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
        on_gpu = forward.device.type == "cuda"
        self._ahead = 1 if on_gpu else 0  # batches under way on the GPU while one is placed
        self._largest = max(1, schema.shard_samples // 4) if on_gpu else schema.shard_samples  # so that there are some

    def extract(
        self, split: str, numbers: Sequence[int], advance: Callable[[int], None] = lambda _: None
    ) -> Iterator[ExtractedShard]:
        """Compute shards, in order; the next one's samples are decoded meanwhile. `advance` hears of samples done.

        Raises:
            UserError: a sample cannot be decoded, and such are not to be skipped.
            JobError: a value cannot be stored.
        """
        images, shards = self._splits[split], self._schema.shards(split)
        groups = [in_groups(shards.rows(number), self._forward.batch_size(self._largest)) for number in numbers]
        batches = self._forward.batches(images, [group for shard in groups for group in shard])
        fillings, begun, started = deque[_Filling](), deque[_Begun](), time.perf_counter()
        for number, shard in zip(numbers, groups, strict=True):
            fillings.append(_Filling(shards.rows(number)))
            for batch in islice(batches, len(shard)):
                begun.extend(self._begin(batch, images, fillings[-1]))
                while len(begun) > self._ahead:
                    begun.popleft().place()
                advance(len(batch.rows) + len(batch.failed))
                started = yield from self._finish(fillings, started)
        while begun:
            begun.popleft().place()
        yield from self._finish(fillings, started)

    def _begin(self, batch: Batch, images: ImageSplit, filling: "_Filling") -> Iterator["_Begun"]:
        filling.skip(list(batch.failed), report_failures(batch, images, self._skip))
        if batch.images is not None:
            ids = [images.ids[row] for row in batch.rows]
            encoding = Encoding(self._forward(batch.images), ids, self._schema.dtype, self._rms)
            yield _Begun(filling, batch.rows, encoding)

    def _finish(self, fillings: deque["_Filling"], started: float) -> Generator[ExtractedShard, None, float]:
        """The shards that are full by now, in order; when the next one was begun."""
        while fillings and fillings[0].is_full:
            filling = fillings.popleft()
            tokens = filling.tokens or self._zeros(len(filling.status))
            yield ExtractedShard(tokens, filling.status, filling.skipped, time.perf_counter() - started)
            started = time.perf_counter()
        return started

    def _zeros(self, n_rows: int) -> dict[int, Encoded]:
        """Of a shard in which no sample could be decoded."""
        zeros = torch.zeros(n_rows, self._schema.token_layout.num_tokens, self._schema.dim, device=self._forward.device)
        tokens = dict.fromkeys(self._schema.layers, zeros)
        return Encoding(tokens, [], self._schema.dtype, self._rms).result()


class _Filling:
    """A shard of some rows as its batches arrive; skipped rows keep zeros."""

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

    def place(self, rows: Sequence[int], tokens: Mapping[int, Encoded]) -> None:
        places = self._places(rows)
        for layer, part in tokens.items():
            if layer not in self.tokens:
                self.tokens[layer] = Encoded(*(self._empty(array) for array in _arrays(part)))
            for whole, array in zip(_arrays(self.tokens[layer]), _arrays(part), strict=True):
                whole[places] = array
        self.status[places] = STORED

    def _places(self, rows: Sequence[int]) -> list[int]:
        return [row - self._first for row in rows]

    def _empty(self, like: np.ndarray) -> np.ndarray:
        return np.zeros((len(self.status), *like.shape[1:]), like.dtype)


@dataclass(frozen=True)
class _Begun:
    """A batch under way, and where it is to go."""

    filling: _Filling
    rows: Sequence[int]
    encoding: Encoding

    def place(self) -> None:
        self.filling.place(self.rows, self.encoding.result())


def _arrays(encoded: Encoded) -> list[np.ndarray]:
    return [array for array in (encoded.values, encoded.scale) if array is not None]


def report_failures(batch: Batch, split: ImageSplit, skip: bool) -> dict[str, str]:
    """Id -> reason of the samples of a batch that cannot be decoded; UserError unless these are to be skipped."""
    if batch.failed and not skip:
        raise UserError(next(iter(batch.failed.values())))
    return {split.ids[row]: reason for row, reason in batch.failed.items()}
