"""Rows x layers out of a store."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Integer, Shaped

from store.address import store_url
from store.arrays import MISSING, SKIPPED, read_log, read_rms, read_status, require_store
from store.backend import Folder, check_process, wait
from store.chunks import Picked
from store.errors import JobError, UserError
from store.failures import NEEDS_REPLACING, OutageError
from store.formats import Encoded, decode_numpy
from store.layer import Layer
from store.schema import Schema
from store.writer import Listing

_SHARD_OF_FILE = re.compile(r"/c/(\d+)[/\"]")  # in the name of the file that tensorstore complains of

Rows = Sequence[int] | Integer[np.ndarray, "rows"] | slice


@dataclass(frozen=True)
class Pending:
    """Reads under way; `result` waits for them."""

    _futures: Mapping[int, Any]  # by layer
    _split: str
    _place: str

    def result(self) -> dict[int, Encoded]:
        """Layer -> stored values (rows, tokens, dim) and, for int8, scales (rows, tokens)."""
        return {layer: Encoded(*self._wait(layer)) for layer in self._futures}

    def _wait(self, layer: int) -> list[Any]:
        try:
            parts: list[Any] = wait([self._futures[layer]], f"read layer {layer} of {self._place}{self._split}")[0]
            return parts
        except OutageError:
            raise
        except JobError as error:
            shards = _SHARD_OF_FILE.findall(str(error))
            place = f"shard {shards[-1]} of {self._split}: " if shards else ""
            raise JobError(f"{place}{error}") from error


class Store:
    """A token store, open for reading.

    Rows number the samples of a split in the order of the source, skipped samples left out. Every chunk's checksum is
    checked before its first use in this process, and again once its file has changed; a missing or damaged one is an
    error that names its file, never zeros.
    """

    def __init__(self, path: str | Path) -> None:
        self.url = store_url(path)
        self._folder = Folder(self.url)
        self.schema: Schema = require_store(self._folder)
        self._opened: dict[tuple[str, int], Layer] = {}
        self._status = {split: read_status(self._folder, self.schema, split) for split in self.schema.splits}
        self._kept = {split: np.flatnonzero(status != SKIPPED) for split, status in self._status.items()}

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        """A worker process opens the store anew."""
        return type(self), (self.url,)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.schema.splits)

    @property
    def layers(self) -> tuple[int, ...]:
        """Stored layers as absolute block indices."""
        return self.schema.layers

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.schema.classes

    def num_samples(self, split: str) -> int:
        """Samples of a split that can be read (skipped ones are not counted)."""
        return len(self._rows(split))

    def missing_shards(self, split: str) -> list[int]:
        """Shards not yet committed; an empty list where the split is complete."""
        self._check_split(split)
        shards = self.schema.shards(split)
        return [shard for shard in shards if self._status[split][shards.rows(shard).start] == MISSING]

    def require_complete(self) -> None:
        """Refuse to go on with a store that an interrupted extraction left behind."""
        for split in self.splits:
            if missing := self.missing_shards(split):
                lacking = f"lacks {len(missing)} of {len(self.schema.shards(split))} shards of {split}"
                raise JobError(f"{self._folder.place} {lacking}; finish it with `sidecache extract`")
            if not self.num_samples(split):
                raise JobError(f"{self._folder.place} holds no sample of {split}: none of them could be decoded")

    def labels(self, split: str) -> Shaped[np.ndarray, "samples ..."]:
        """Class indices (samples,) int64, or multi-label 0/1 (samples, classes) uint8; in row order.

        Raises:
            UserError: there is no such split.
            JobError: the labels are missing or damaged. So too for `sample_ids` and `skipped`.
        """
        rows = self._rows(split)
        labels: np.ndarray = self._of_all(split, "label", self._folder.read_array(f"{split}/label"))[rows]
        classes, multi_label = len(self.classes), self.schema.multi_label
        dtype, shape, legal = ("uint8", [classes], 2) if multi_label else ("int64", [], classes)
        fits = labels.dtype == dtype and [*labels.shape[1:]] == shape
        if not fits or (labels.size and not 0 <= labels.min() <= labels.max() < legal):
            raise JobError(
                f"{self._folder.place}{split}/label holds {labels.dtype} {labels.shape}, legal are {dtype} from 0 to "
                f"{legal - 1}; {NEEDS_REPLACING}"
            )
        return labels

    def sample_ids(self, split: str) -> list[str]:
        """Ids, in row order."""
        rows = self._rows(split)
        ids = self._of_all(split, "sample_id", self._folder.read_strings(f"{split}/sample_id"))
        return [ids[row] for row in rows]

    def listing(self, split: str) -> Listing:
        """Ids, labels and digests, in row order; errors as of `labels`."""
        stored = self._of_all(split, "sample_digest", self._folder.read_array(f"{split}/sample_digest"))
        digests: np.ndarray = stored[self._rows(split)]
        return Listing(tuple(self.sample_ids(split)), self.labels(split), digests)

    def skipped(self, split: str) -> dict[str, str]:
        """Id -> reason of every sample that could not be decoded."""
        self._check_split(split)
        ids = self._of_all(split, "sample_id", self._folder.read_strings(f"{split}/sample_id"))
        reasons = self.log.get("skipped", {})
        return {ids[row]: reasons.get(ids[row], "") for row in np.flatnonzero(self._status[split] == SKIPPED)}

    @property
    def log(self) -> dict[str, Any]:
        """Times and reasons: what happened, as opposed to what is stored."""
        return read_log(self._folder)

    @cached_property
    def rms(self) -> dict[int, Float32[np.ndarray, "dim"]]:
        """Layer -> per-channel RMS (dim,), int8 stores only; else empty."""
        return read_rms(self._folder, self.schema)

    def tail_arrays(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """The tensors of the backbone's frozen tail, by name."""
        return {name: self._folder.read_array(f"tail/{name}") for name in self.schema.tail_tensors}

    def read(
        self, split: str, rows: Rows, layers: Sequence[int] | None = None
    ) -> dict[int, Float32[np.ndarray, "rows tokens dim"]]:
        """Decoded tokens of some rows, in the order asked for.

        Args:
            split: one of `splits`.
            rows: indices below `num_samples(split)`, or a slice.
            layers: absolute block indices; all stored ones by default.

        Returns:
            layer -> float32 array (rows, tokens, dim).

        Raises:
            UserError: a split, row or layer that does not exist; or this process was forked from one that used a store.
            JobError: a chunk is missing, not extracted yet, or fails its checksum; the message names shard or file.
        """
        encoded = self.fetch(split, rows, layers).result()
        return {k: decode_numpy(v, self.schema.dtype, self.rms.get(k)) for k, v in encoded.items()}

    def fetch(self, split: str, rows: Rows, layers: Sequence[int] | None = None) -> Pending:
        """Start reading, and return at once; arguments and errors as of `read`, for stored values not yet decoded."""
        check_process()
        stored = self._stored_rows(split, rows)
        wanted = self.schema.check_layers(list(self.layers if layers is None else layers))
        opened = {layer: self._layer(split, layer) for layer in wanted}
        picked = Picked.of(stored, self.schema.shard_samples)
        return Pending({k: layer.fetch(stored, picked) for k, layer in opened.items()}, split, self._folder.place)

    def dataset(self, split: str, layers: Sequence[int] | None = None) -> "StoreDataset":
        """A map-style dataset for `torch.utils.data.DataLoader`: `({layer: (tokens, dim)}, label)`."""
        return StoreDataset(self, split, layers)

    def n_bytes(self) -> int:
        """Bytes on the disk, all files counted; for a remote store, the bytes of all samples before compression."""
        stored = self._folder.n_bytes()
        if stored is not None:
            return stored
        return self.schema.bytes_per_sample * sum(info.num_samples for info in self.schema.splits.values())

    def _of_all(self, split: str, name: str, values: Any) -> Any:
        """An array of the listing, which must be of all samples; of more where the store has grown since."""
        if len(values) < self.schema.splits[split].num_samples:
            raise JobError(
                f"{self._folder.place}{split}/{name} lists {len(values):,} samples, the store holds "
                f"{self.schema.splits[split].num_samples:,}; {NEEDS_REPLACING}"
            )
        return values

    def _layer(self, split: str, layer: int) -> Layer:
        if (split, layer) not in self._opened:
            self._opened[split, layer] = Layer(self._folder, self.schema, split, layer)
        return self._opened[split, layer]

    def _check_split(self, split: str) -> None:
        self.schema.shards(split)

    def _rows(self, split: str) -> Int[np.ndarray, "samples"]:
        self._check_split(split)
        return self._kept[split]

    def _stored_rows(self, split: str, rows: Rows) -> Int[np.ndarray, "rows"]:
        known = self._rows(split)
        stored = known[rows] if isinstance(rows, slice) else known[_indices(rows, len(known), split)]
        missing = stored[self._status[split][stored] == MISSING]
        if missing.size:
            shard = int(missing[0]) // self.schema.shard_samples
            raise JobError(
                f"shard {shard} of {split} in {self._folder.place} is not extracted yet; run `sidecache extract`"
            )
        return stored


def _indices(rows: Sequence[int] | Integer[np.ndarray, "rows"], total: int, split: str) -> Integer[np.ndarray, "rows"]:
    """Whole numbers only: a mask of booleans would otherwise read as rows 0 and 1."""
    wanted = np.asarray(rows) if len(rows) else np.zeros(0, np.int64)
    if wanted.dtype.kind not in "iu" or wanted.ndim != 1 or not ((wanted >= 0) & (wanted < total)).all():
        raise UserError(f"rows must be a list of indices from 0 to {total - 1} in {split!r}, got {rows!r}")
    return wanted


class StoreDataset:
    """Samples of one split in PyTorch's map-style protocol.

    Workers of a DataLoader must not be forked: pass `multiprocessing_context="forkserver"` or `"spawn"`.
    """

    def __init__(self, store: Store, split: str, layers: Sequence[int] | None) -> None:
        self._store, self._split, self._layers = store, split, layers
        self._labels = store.labels(split)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[dict[int, Float32[np.ndarray, "tokens dim"]], Any]:
        if not 0 <= row < len(self):  # IndexError is what ends a loop over the dataset
            raise IndexError(f"row {row} is outside 0 to {len(self) - 1}")
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[dict[int, Float32[np.ndarray, "tokens dim"]], Any]]:
        tokens = self._store.read(self._split, rows, self._layers)
        return [({k: v[i] for k, v in tokens.items()}, self._labels[row]) for i, row in enumerate(rows)]


def open_store(path: str | Path) -> Store:
    """Open a token store by folder or URL.

    Raises:
        JobError: there is no store, or it is damaged or cannot be read; the message names the file.
        UserError: the path is empty, or what lies there is something else or of another format.
    """
    return Store(path)
