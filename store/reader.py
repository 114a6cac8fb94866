"""Rows x layers out of a store."""

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Integer, Shaped

from store.address import store_url
from store.arrays import (
    MISSING,
    SKIPPED,
    Listed,
    Marks,
    open_schema,
    read_listed,
    read_log,
    read_rms,
    require_marks,
)
from store.dtypes import Encoded, decode_numpy
from store.errors import JobError, UserError
from store.io_errors import NEEDS_REPLACING, OutageError
from store.kvstore import KeyValueStore, check_process, wait
from store.layer_reader import Layer
from store.local.chunks import Picked
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
    _check: Callable[[Sequence[Encoded]], None]  # of what was read; raises JobError

    def result(self) -> dict[int, Encoded]:
        """Layer -> stored values (rows, tokens, dim) and, for int8, scales (rows, tokens)."""
        found = {layer: Encoded(*self._wait(layer)) for layer in self._futures}
        self._check(list(found.values()))
        return found

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

    A store that grows while it is open keeps the samples and layers that it had when it was opened; so does a copy that
    is sent to a worker process.
    """

    def __init__(self, path: str | Path) -> None:
        url = store_url(path)
        self.__setstate__((url, *require_marks(KeyValueStore(url))))

    def __getstate__(self) -> tuple[str, Schema, Marks]:
        return self.url, self.schema, self._status

    def __setstate__(self, state: tuple[str, Schema, Marks]) -> None:
        """A copy in another process has the same rows, whatever has become of the store."""
        self.url, self.schema, self._status = state
        self._folder = KeyValueStore(self.url)
        self._opened: dict[tuple[str, int], Layer] = {}
        self._kept = {split: np.flatnonzero(status != SKIPPED) for split, status in self._status.items()}

    def snapshot(self) -> dict[str, Any]:
        """What the store held when it was opened, in values that JSON has, for processes that are to see the same."""
        marks = {split: b64encode(status.tobytes()).decode() for split, status in self._status.items()}
        return {"url": self.url, "schema": self.schema.model_dump(mode="json"), "marks": marks}

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> "Store":
        """The inverse of `snapshot`, in any process that reaches the store."""
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
        labels: np.ndarray = self._read_listed(self._folder.read_array, split, "label")[rows]
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
        ids = self._read_listed(self._folder.read_strings, split, "sample_id")
        return [ids[row] for row in rows]

    def listing(self, split: str) -> Listing:
        """Ids, labels and digests, in row order; errors as of `labels`."""
        rows = self._rows(split)
        digests: np.ndarray = self._read_listed(self._folder.read_array, split, "sample_digest")[rows]
        return Listing(tuple(self.sample_ids(split)), self.labels(split), digests)

    def skipped(self, split: str) -> dict[str, str]:
        """Id -> reason of every sample that could not be decoded."""
        self._check_split(split)
        ids = self._read_listed(self._folder.read_strings, split, "sample_id")
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
        futures = {k: layer.fetch(stored, picked) for k, layer in opened.items()}
        return Pending(futures, split, self._folder.place, partial(self._refuse_lost, split, stored))

    def dataset(self, split: str, layers: Sequence[int] | None = None) -> "StoreDataset":
        """A map-style dataset for `torch.utils.data.DataLoader`: `({layer: (tokens, dim)}, label)`."""
        return StoreDataset(self, split, layers)

    def n_bytes(self) -> int:
        """Bytes on the disk, all files counted; for a remote store, the bytes of all samples before compression."""
        stored = self._folder.n_bytes()
        if stored is not None:
            return stored
        return self.schema.bytes_per_sample * sum(info.num_samples for info in self.schema.splits.values())

    def _layer(self, split: str, layer: int) -> Layer:
        if (split, layer) not in self._opened:
            self._opened[split, layer] = self._open_layer(split, layer)
        return self._opened[split, layer]

    def _open_layer(self, split: str, layer: int) -> Layer:
        try:
            opened = Layer(self._folder, self.schema, split, layer)
        except OutageError:
            raise
        except JobError:
            self._require_not_replaced()
            raise
        if opened.has_grown:
            self._require_not_replaced()
        return opened

    def _refuse_lost(self, split: str, stored: Int[np.ndarray, "rows"], read: Sequence[Encoded]) -> None:
        """Refuse zeros in place of a row that could not be decoded when it was extracted again, as the store grew.

        That happens to the rows of a part-filled shard alone.
        """
        part_filled = np.flatnonzero(stored >= self._first_of_part_filled(split))
        for values in (encoded.values for encoded in read if part_filled.size):
            zero = part_filled[values[part_filled, 0, 0] == 0]  # the others are not: most rows are looked at no further
            lost = [row for row in zero.tolist() if not values[row].any()]
            if lost and open_schema(self._folder) != self.schema:
                raise JobError(
                    f"row {stored[lost[0]]} of {split} in {self._folder.place} could not be decoded when the store "
                    "grew, which extracted it again; open the store again"
                )

    def _first_of_part_filled(self, split: str) -> int:
        shard_samples = self.schema.shard_samples
        return len(self._status[split]) // shard_samples * shard_samples

    def _read_listed(self, read: Callable[[str], Listed], split: str, name: str) -> Listed:
        """What is known of a split's samples, in the order of their rows; of a store that has grown, of all it has."""
        found, n = read_listed(read, f"{split}/{name}"), len(self._status[split])
        if len(found) != n:
            self._require_not_replaced()
        if len(found) < n:
            raise JobError(
                f"{self._folder.place}{split}/{name} lists {len(found):,} samples, the store holds {n:,}; "
                + NEEDS_REPLACING
            )
        return found

    def _require_not_replaced(self) -> None:
        """Refuse another store than was opened; it may have grown."""
        now = open_schema(self._folder)
        if now is None or not self.schema.may_grow_into(now):
            raise JobError(f"{self._folder.place} is not the store any more that was opened; open it again")

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
