"""Reads tokens, labels and ids from a store."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from store.address import store_url
from store.array_io import read_array, read_strings
from store.arrays import (
    LABEL,
    MISSING,
    SAMPLE_DIGEST,
    SAMPLE_ID,
    SKIPPED,
    VALIDATION,
    Status,
    open_schema,
    read_log,
    read_rms,
    read_schema_and_status,
)
from store.compare import may_grow_into
from store.dataset import StoreDataset
from store.dtypes import Encoded, decode_numpy
from store.errors import JobError
from store.io_errors import NEEDS_REPLACING, OutageError
from store.kvstore import KeyValueStore, check_process
from store.layer_reader import LayerReader, PendingRead
from store.listing import Listing, Values, as_marks, label_fault, read_while_growing
from store.local.chunks import SelectedRows
from store.row_indices import RowIndices, check_indices
from store.schema import Schema


class Store:
    """A token store, open for reading.

    Rows number the samples of a split in the order of the source, without the skipped ones. Every chunk's checksum is
    compared before its first use in this process, and again after its file changed; a missing or damaged chunk is an
    error that names its file, never zeros. If the store grows while it is open, its samples and layers stay those at
    the time of opening, also in a copy that is sent to a worker process.
    """

    def __init__(self, path: str | Path) -> None:
        url = store_url(path)
        self.__setstate__((url, *read_schema_and_status(KeyValueStore(url))))

    def __getstate__(self) -> tuple[str, Schema, Status]:
        return self.url, self.schema, self._status

    def __setstate__(self, state: tuple[str, Schema, Status]) -> None:
        """Restore a copy in another process: it has the same rows, even if the store has grown."""
        self.url, self.schema, self._status = state
        self._kvstore = KeyValueStore(self.url)
        self._layer_readers: dict[tuple[str, int], LayerReader] = {}
        self._readable_rows = {split: np.flatnonzero(status != SKIPPED) for split, status in self._status.items()}

    def snapshot(self) -> dict[str, Any]:
        """The schema and status as of opening, as JSON values, for other processes that are to read the same rows."""
        marks = {split: b64encode(status.tobytes()).decode() for split, status in self._status.items()}
        return {"url": self.url, "schema": self.schema.model_dump(mode="json"), "marks": marks}

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> "Store":
        """Open the store of a `snapshot`, in any process that can access it."""
        marks = {split: np.frombuffer(b64decode(text), np.uint8) for split, text in snapshot["marks"].items()}
        store = cls.__new__(cls)
        store.__setstate__((snapshot["url"], Schema.parse(snapshot["schema"], snapshot["url"]), marks))
        return store

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.schema.splits)

    @property
    def layers(self) -> tuple[int, ...]:
        """Stored layers, as absolute block indices."""
        return self.schema.layers

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.schema.classes

    def num_samples(self, split: str) -> int:
        """The number of samples of a split, without the skipped ones."""
        return len(self.array_rows(split))

    def missing_shards(self, split: str) -> list[int]:
        """The shards that are not committed yet; empty if the split is complete."""
        shards = self.schema.shards(split)
        return [shard for shard in shards if self._status[split][shards.rows(shard).start] == MISSING]

    def require_complete(self) -> None:
        """Refuse a store that an interrupted extraction left incomplete.

        Raises:
            JobError: it lacks shards, or all samples of a split were skipped.
        """
        for split in self.splits:
            if missing := self.missing_shards(split):
                lacking = f"{len(missing)} of {len(self.schema.shards(split))} shards of {split}"
                raise JobError(f"{self._kvstore.place} lacks {lacking}; finish it with `sidecache extract`")
            if not self.num_samples(split):
                raise JobError(f"{self._kvstore.place} has no sample of {split}: none of them could be decoded")

    def labels(self, split: str) -> Shaped[np.ndarray, "samples ..."]:
        """Labels in row order: class indices (samples,) int64, or multi-label 0/1 (samples, classes) uint8.

        Raises:
            UserError: there is no such split.
            JobError: the labels are missing or damaged.
        """
        rows = self.array_rows(split)
        labels: np.ndarray = self._read_listing_array(read_array, split, LABEL)[rows]
        if fault := label_fault(labels, self.schema, len(rows)):
            raise JobError(f"{self._kvstore.place}{split}/label {fault}; {NEEDS_REPLACING}")
        return labels

    def sample_ids(self, split: str) -> list[str]:
        """Ids in row order; raises as `labels`."""
        rows = self.array_rows(split)
        ids = self._read_listing_array(read_strings, split, SAMPLE_ID)
        return [ids[row] for row in rows]

    def listing(self, split: str) -> Listing:
        """Ids, labels and digests in row order; raises as `labels`."""
        rows = self.array_rows(split)
        digests: np.ndarray = self._read_listing_array(read_array, split, SAMPLE_DIGEST)[rows]
        validation = self._validation_marks() if self.schema.marks_validation(split) else None
        return Listing(tuple(self.sample_ids(split)), self.labels(split), digests, validation)

    def validation_rows(self) -> Int[np.ndarray, "_"] | None:
        """Rows of `train` that are the source's own validation split, ascending; None without; raises as `labels`."""
        return np.flatnonzero(self._validation_marks()) if self.schema.marks_validation("train") else None

    def skipped(self, split: str) -> dict[str, str]:
        """Id -> reason for every sample that could not be decoded; raises as `labels`."""
        self.schema.shards(split)  # raises for an unknown split
        ids = self._read_listing_array(read_strings, split, SAMPLE_ID)
        reasons = self.log.get("skipped", {})
        return {ids[row]: reasons.get(ids[row], "") for row in np.flatnonzero(self._status[split] == SKIPPED)}

    @property
    def log(self) -> dict[str, Any]:
        """The extraction's log: costs by name, and why samples were skipped."""
        return read_log(self._kvstore)

    @cached_property
    def rms(self) -> dict[int, Float32[np.ndarray, "dim"]]:
        """Layer -> per-channel RMS (dim,) of an int8 or int4 store; empty for other formats."""
        return read_rms(self._kvstore, self.schema)

    def tail_arrays(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """The tensors of the backbone's own read-out (final norm, attention pool), by name."""
        return {name: read_array(self._kvstore, f"tail/{name}") for name in self.schema.tail_tensors}

    def read(
        self, split: str, rows: RowIndices, layers: Sequence[int] | None = None
    ) -> dict[int, Float32[np.ndarray, "rows tokens dim"]]:
        """Read the tokens of some rows, decoded, in the order of the request.

        Args:
            split: one of `splits`.
            rows: indices below `num_samples(split)`, or a slice.
            layers: absolute block indices; all stored ones by default.

        Returns:
            layer -> float32 array (rows, tokens, dim).

        Raises:
            UserError: the split, a row or a layer does not exist; or this process was forked from one with a store.
            JobError: a chunk is missing, not extracted yet, or fails its checksum; the message names shard or file.

        Example:
            >>> store = open_store("runs/digits/cache.zarr")
            >>> tokens = store.read("train", [3, 0, 8], layers=[store.layers[-1]])
            >>> tokens[store.layers[-1]].shape[0]
            3
        """
        encoded = self.fetch(split, rows, layers).result()
        return {k: decode_numpy(v, self.schema.dtype, self.rms.get(k)) for k, v in encoded.items()}

    def fetch(self, split: str, rows: RowIndices, layers: Sequence[int] | None = None) -> PendingRead:
        """Start to read stored values, not decoded, and return at once; arguments and errors are those of `read`."""
        check_process()
        stored = self._stored_rows(split, rows)
        wanted = self.schema.check_layers(list(self.layers if layers is None else layers))
        readers = {layer: self._layer_reader(split, layer) for layer in wanted}
        selected = SelectedRows.of(stored, self.schema.shard_samples)
        return PendingRead(
            futures={layer: reader.fetch(stored, selected) for layer, reader in readers.items()},
            split=split,
            place=self._kvstore.place,
            check=partial(self._refuse_lost, split, stored),
        )

    def dataset(self, split: str, layers: Sequence[int] | None = None) -> StoreDataset:
        """A map-style dataset of samples `({layer: (tokens, dim)}, label)`; arguments and errors are those of `read`.

        Example:
            >>> dataset = open_store("runs/digits/cache.zarr").dataset("train", layers=[0])
            >>> tokens, label = dataset[0]
            >>> list(tokens)
            [0]
        """
        return StoreDataset(partial(self.read, split, layers=layers), self.labels(split))

    def n_bytes(self) -> int:
        """Bytes of all files; for a store that is not in a local folder, of all samples before compression."""
        n_bytes, n_samples = self._kvstore.n_bytes(), sum(info.num_samples for info in self.schema.splits.values())
        return self.schema.bytes_per_sample * n_samples if n_bytes is None else n_bytes

    def _layer_reader(self, split: str, layer: int) -> LayerReader:
        if reader := self._layer_readers.get((split, layer)):
            return reader
        try:
            reader = LayerReader(self._kvstore, self.schema, split, layer)
        except OutageError:
            raise
        except JobError:
            self._require_not_replaced()
            raise
        if reader.has_grown:
            self._require_not_replaced()
        return self._layer_readers.setdefault((split, layer), reader)

    def _refuse_lost(self, split: str, stored: Int[np.ndarray, "rows"], read: Sequence[Encoded]) -> None:
        """Refuse the zeros of a row that could not be decoded when growth extracted its part-filled shard again."""
        first = len(self._status[split]) // self.schema.shard_samples * self.schema.shard_samples
        part_filled = np.flatnonzero(stored >= first)  # positions in the request
        for values in (encoded.values for encoded in read if part_filled.size):
            zero = part_filled[values[part_filled, 0, 0] == 0]  # one value excludes most rows
            lost = [row for row in zero.tolist() if not values[row].any()]
            if lost and open_schema(self._kvstore) != self.schema:
                raise JobError(
                    f"row {stored[lost[0]]} of {split} in {self._kvstore.place} could not be decoded when the store "
                    "grew, which extracted it again; open the store again"
                )

    def _read_listing_array(self, read: Callable[[KeyValueStore, str], Values], split: str, name: str) -> Values:
        """An array of a split's listing, for all stored rows; longer if the store has grown."""
        path, n = f"{split}/{name}", len(self._status[split])
        values = read_while_growing(read, self._kvstore, path)
        if len(values) != n:
            self._require_not_replaced()
        if len(values) < n:
            lists = f"{self._kvstore.place}{path} lists {len(values):,} samples"
            raise JobError(f"{lists}, the store has {n:,}; {NEEDS_REPLACING}")
        return values

    def _validation_marks(self) -> Bool[np.ndarray, "samples"]:
        """Whether each row of `train` is for validation."""
        rows = self.array_rows("train")
        values: np.ndarray = self._read_listing_array(read_array, "train", VALIDATION)[rows]
        return as_marks(values, len(rows), f"{self._kvstore.place}train/{VALIDATION}")

    def _require_not_replaced(self) -> None:
        """Refuse to read if the store was replaced by another one; it may have grown."""
        current = open_schema(self._kvstore)
        if current is None or not may_grow_into(self.schema, current):
            raise JobError(f"{self._kvstore.place} was replaced by another store; open it again")

    def array_rows(self, split: str) -> Int[np.ndarray, "samples"]:
        """For every row of a split, its row of the arrays, in which skipped samples have one too."""
        self.schema.shards(split)  # raises for an unknown split
        return self._readable_rows[split]

    def _stored_rows(self, split: str, rows: RowIndices) -> Int[np.ndarray, "rows"]:
        """The rows of the arrays for rows of a request, which leave out skipped samples."""
        readable = self.array_rows(split)
        stored = readable[rows] if isinstance(rows, slice) else readable[check_indices(rows, len(readable), split)]
        missing = stored[self._status[split][stored] == MISSING]
        if missing.size:
            shard = f"shard {missing[0] // self.schema.shard_samples} of {split} in {self._kvstore.place}"
            raise JobError(f"{shard} is not extracted yet; run `sidecache extract`")
        return stored


def open_store(path: str | Path) -> Store:
    """Open a token store, by folder or URL.

    Raises:
        JobError: there is no store, or it is damaged or cannot be read; the message names the file.
        UserError: the path is empty, or there is something else, or a store of another format.

    Example:
        >>> store = open_store("runs/digits/cache.zarr")
        >>> store.splits
        ('train', 'test')
        >>> store.num_samples("train") == len(store.labels("train"))
        True
    """
    return Store(path)
