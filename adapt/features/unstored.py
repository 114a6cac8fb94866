"""Splits that a store lacks: the frozen backbone computes them when they are read, as the store would hold them.

What is read once need not be stored. The samples go through the backbone in the batches of an extraction, and their
tokens are encoded in the format of the store, so that results are those that a store of all splits gives.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from adapt.features.feature_source import Rows
from extract.forward.frozen_forward import decode_batches, preprocess
from extract.job.extraction_job import ExtractionJob
from extract.job.shard_extractor import ShardExtractor
from extract.sources.store_order import OrderedSplit
from store.console.progress import progress
from store.dtypes import Encoded
from store.errors import Note, UserError
from store.layout import in_groups
from store.schema import Schema, SplitInfo

_DECODED_AT_ONCE = 16
_MAX_SHOWN = 10


class UnstoredSplits:
    """The splits of a source that a store lacks.

    Args:
        job: the samples, the backbone and the settings by which the store would be completed.
        schema: of the store with these splits.
        rms: layer -> per-channel RMS (dim,) of the store; int8 and int4 only.
    """

    def __init__(self, job: ExtractionJob, schema: Schema, rms: Mapping[int, Float32[np.ndarray, "dim"]]) -> None:
        self._job, self.schema, self._rms = job, schema, rms
        self._rows: dict[str, Rows] = {}

    def rows(self, split: str) -> Rows:
        """The source's rows of a split, without samples that cannot be decoded.

        With `on_error: skip` all are decoded to find these, which a warning lists. Otherwise the first of them ends the
        job when the split is read.

        Raises:
            UserError: none can be decoded.
        """
        if split not in self._rows:
            every = np.arange(len(self._job.source.splits[split]))
            self._rows[split] = self._without_undecodable(split, every) if self._job.skips_undecodable else every
        return self._rows[split]

    def samples(self, split: str) -> OrderedSplit:
        """The samples of these rows."""
        return OrderedSplit(self._job.source.splits[split], self.rows(split))

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Their labels."""
        return torch.from_numpy(self.samples(split).labels)

    def shards(self, split: str, layers: Sequence[int]) -> Iterator[dict[int, Encoded]]:
        """Run a split through the backbone once: the encoded tokens of all its rows, shard by shard.

        Raises:
            UserError: a sample cannot be decoded.
            JobError: a value cannot be stored.
        """
        samples, source = self.samples(split), self._job.source
        job = replace(
            self._job,
            source=replace(source, splits={**source.splits, split: samples}),
            data=self._job.data.model_copy(update={"on_error": "fail"}),
        )
        splits = {split: SplitInfo(num_samples=len(samples))}
        schema = self.schema.model_copy(update={"layers": tuple(layers), "splits": splits})
        extractor = ShardExtractor(job, schema, {layer: self._rms[layer] for layer in layers if layer in self._rms})
        with progress(f"computing {split}", len(samples), "samples") as advance:
            for shard in extractor.extract(split, list(schema.shards(split)), advance):
                yield shard.tokens

    def _without_undecodable(self, split: str, rows: Rows) -> Rows:
        samples, failed = self._job.source.splits[split], dict[int, str]()

        def decode(sample: Any, row: int) -> Tensor:
            preprocess(self._job.backbone.transform, sample, samples.ids[row])
            return torch.empty(0)  # pixels are not kept

        with progress(f"decoding {split}", len(rows), "samples") as advance:
            for batch in decode_batches(samples, in_groups(rows.tolist(), _DECODED_AT_ONCE), decode):
                failed |= batch.failed
                advance(len(batch.rows) + len(batch.failed))
        if len(failed) == len(rows):
            raise UserError(f"no sample of {split} can be decoded: {next(iter(failed.values()))}")
        if failed:
            reasons = list(failed.values())
            more = ["..."] if len(reasons) > _MAX_SHOWN else []
            lines = "".join(f"\n  {reason}" for reason in [*reasons[:_MAX_SHOWN], *more])
            warnings.warn(f"{len(failed):,} samples of {split} are left out:{lines}", Note, stacklevel=2)
        return np.setdiff1d(rows, list(failed))
