"""Creates a store and commits shards to it.

The order of the writes is the commit protocol. Creation writes the root group last: without it there is no store. A
shard's layers are written first, then, when they are durable, its rows of `status`. That write commits the shard, so a
crash at any moment leaves it either whole or missing.

A chunk's checksum detects damage, but not a whole file in another file's place. Therefore `shard_digest` has a CRC-32
of every layer of a shard, over the rows' status, values and scales. `verify` compares it; reading rows does not, since
that would need the whole shard.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, UInt8

from store.array_io import create_array, open_array, write_array
from store.arrays import (
    DIGEST,
    LOG,
    MISSING,
    STATUS,
    STORED,
    MarkPlace,
    holds_plain_rows,
    layer_arrays,
    layer_digest,
    layer_name,
    read_log,
    read_status,
    shard_arrays,
    shard_file,
)
from store.dtypes import STORED_DTYPE, Encoded, stored_width
from store.errors import JobError
from store.io_errors import AccessError
from store.kvstore import KeyValueStore, wait
from store.listing import Listing, write_listing
from store.local.plain_shard import PlainShard
from store.lock import Guard
from store.schema import Schema


def create_store(
    kvstore: KeyValueStore,
    schema: Schema,
    listings: Mapping[str, Listing],
    rms: Mapping[int, Float32[np.ndarray, "dim"]],
    tail: Mapping[str, Float32[np.ndarray, "..."]],
) -> None:
    """Write a store without tokens. It can be repeated after a crash.

    Args:
        listings: ids, labels and digests of the samples of every split.
        rms: layer -> per-channel RMS (dim,), int8 and int4 stores only.
        tail: the arrays that `schema.tail_tensors` names.

    Raises:
        JobError: the disk refused, or there are shards of another store.
    """
    refuse_old_marks(kvstore, schema.splits)
    for split, listing in listings.items():
        create_split(kvstore, schema, split, listing)
    for group, arrays in (("rms", {layer_name(k): v for k, v in rms.items()}), ("tail", dict(tail))):
        for name, values in arrays.items():
            dimensions = ["channel"] if values.ndim == 1 else [f"dim_{axis}" for axis in range(values.ndim)]
            write_array(kvstore, f"{group}/{name}", values, dimensions)
        kvstore.write_group(group, {})
    kvstore.write_group(LOG, {"extract_seconds": 0.0, "skipped": {}})
    kvstore.write_group("", schema.model_dump(mode="json"))


def refuse_old_marks(kvstore: KeyValueStore, splits: Iterable[str]) -> None:
    """Refuse commit marks of splits that no root group names: another store's, they would make its shards count here.

    Raises:
        JobError: there are some.
    """
    for split in splits:
        if kvstore.has_keys(f"{split}/{STATUS}/c"):
            raise JobError(
                f"{kvstore.place}{split} has shards of a store that is gone; delete that folder, or choose another "
                "store.path"
            )


def create_split(kvstore: KeyValueStore, schema: Schema, split: str, listing: Listing) -> None:
    """Write a split without tokens. It can be repeated after a crash."""
    for name, metadata in shard_arrays(schema, split).items():
        create_array(kvstore, f"{split}/{name}", metadata)
    write_listing(kvstore, split, listing)
    kvstore.write_group(split, {})


class StoreWriter:
    """Commits shards to an existing store.

    Args:
        lock: checked before each write; None only where no other job can write.
        marks: where commit marks and digests go.
    """

    def __init__(
        self,
        kvstore: KeyValueStore,
        schema: Schema,
        lock: Guard | None = None,
        marks: MarkPlace = MarkPlace.STORE,
    ) -> None:
        self._kvstore, self._schema, self._lock, self._marks = kvstore, schema, lock, marks

    def missing_shards(self, split: str) -> list[int]:
        """The shards of a split that are not committed."""
        status, shards = read_status(self._kvstore, self._schema, split, self._marks), self._schema.shards(split)
        return [shard for shard in shards if status[shards.rows(shard).start] == MISSING]

    def commit(self, split: str, shard: int, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"]) -> None:
        """Write one shard, then mark it; arguments and errors are those of `write` and `mark`."""
        self.write(split, shard, tokens, status)
        self.mark(split, shard, status)

    def write(self, split: str, shard: int, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"]) -> None:
        """Write one shard's values and make them durable; until it is marked the shard counts as missing.

        Args:
            tokens: layer -> encoded rows of the shard (rows, tokens, width), zeros in skipped rows; every layer.
            status: STORED or SKIPPED for every row of the shard.

        Raises:
            JobError: the disk refused, or the lock is lost; the shard stays missing.
            ValueError: layers, shapes or dtypes are not those of the shard.
        """
        rows = self._schema.shards(split).rows(shard)
        self._check_shard(tokens, status, len(rows))
        self._check_lock()
        doing = f"write shard {shard} of {split} to {self._kvstore.place}"
        values = self._by_array(tokens)
        with ThreadPoolExecutor(1, "digest") as pool:  # digests are computed while the values are written
            digests = pool.map(lambda layer: layer_digest(tokens[layer], status), self._schema.layers)
            if holds_plain_rows(self._kvstore, self._schema):
                self._kvstore.write_files(self._files(split, shard, values), doing)
            else:
                self._write_arrays(split, shard, values, doing)
        wait([self._open(split, DIGEST)[shard].write(np.array(list(digests), np.uint32))], doing)

    def _by_array(self, tokens: Mapping[int, Encoded]) -> dict[str, np.ndarray]:
        """Array -> values of the shard."""
        by_array: dict[str, np.ndarray] = {}
        for layer in self._schema.layers:
            parts = [part for part in (tokens[layer].values, tokens[layer].scale) if part is not None]
            by_array |= zip(layer_arrays(self._schema, layer), parts, strict=True)
        return by_array

    def _files(
        self, split: str, shard: int, values: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, list[memoryview]]]:
        """The keys of a shard's files, with the pieces of each file."""
        arrays, shard_samples = shard_arrays(self._schema, split), self._schema.shard_samples
        for name, part in values.items():
            layout = PlainShard(shard_samples, part[0].nbytes)
            yield f"{split}/{shard_file(name, arrays[name], shard)}", layout.pieces(part)

    def _write_arrays(self, split: str, shard: int, values: Mapping[str, np.ndarray], doing: str) -> None:
        """Write a shard through tensorstore; a damaged file that tensorstore reads first is removed."""
        rows = self._schema.shards(split).rows(shard)

        def start() -> list[Any]:
            targets = {name: self._open(split, name)[rows.start : rows.stop] for name in values}
            return [
                target.write(values[name], can_reference_source_data_indefinitely=True)
                for name, target in targets.items()
            ]

        try:
            wait(start(), doing)
        except AccessError as error:
            if not error.is_damage:
                raise
            self._remove_values(split, shard)
            wait(start(), doing)

    def mark(self, split: str, shard: int, status: UInt8[np.ndarray, "rows"]) -> None:
        """Commit a shard whose values are durable, or revoke that with a status of MISSING.

        Raises:
            JobError: the disk refused, or the lock is lost.
        """
        self._check_lock()
        rows = self._schema.shards(split).rows(shard)
        target = self._open(split, STATUS)[rows.start : rows.stop]
        wait([target.write(status)], f"commit shard {shard} of {split} to {self._kvstore.place}")

    def log_and_mark(
        self,
        split: str,
        shard: int,
        status: UInt8[np.ndarray, "rows"],
        seconds: float,
        forward_seconds: float,
        skipped: Mapping[str, str],
    ) -> None:
        """Add a shard's costs to the log, then commit it: a crash in between must not lose why samples were skipped.

        Args:
            seconds: wall time since the previous shard.
            forward_seconds: time from the shard's samples to its encoded tokens.
            skipped: sample id -> reason.
        """
        forward = {"forward_seconds": forward_seconds, "forward_samples": float((status == STORED).sum())}
        self.add_to_log({"extract_seconds": seconds, **forward}, skipped)
        self.mark(split, shard, status)

    def unmark(self, split: str, shards: Iterable[int]) -> None:
        """Make shards missing, so that the next extraction replaces them: first the mark is removed, then the files.

        Raises:
            JobError: the disk refused, or the lock is lost; some of the shards may be missing already.
        """
        for shard in shards:
            self.mark(split, shard, np.full(len(self._schema.shards(split).rows(shard)), MISSING, np.uint8))
            self._remove_values(split, shard)

    def _remove_values(self, split: str, shard: int) -> None:
        """Remove the files of a shard without a mark.

        tensorstore reads a part-filled shard before it writes it, so a damaged file would stop that write.
        """
        for name in set(shard_arrays(self._schema, split)) - {STATUS}:
            self._kvstore.remove(f"{self._marks.path(split, name)}/c/{shard}")

    def _open(self, split: str, name: str) -> ts.TensorStore:
        return open_array(self._kvstore, self._marks.path(split, name), shard_arrays(self._schema, split)[name])

    def _check_lock(self) -> None:
        if self._lock:
            self._lock.check()

    def _check_shard(self, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"], n_rows: int) -> None:
        """Compare layers, shapes and dtypes: tensorstore would broadcast and convert without an error."""
        schema = self._schema
        shape = (n_rows, schema.token_layout.num_tokens, stored_width(schema.dtype, schema.dim))
        if set(tokens) != set(schema.layers) or len(status) != n_rows or (status == MISSING).any():
            raise ValueError(f"this shard takes layers {schema.layers} and {n_rows} statuses")
        for layer, encoded in tokens.items():
            has_scale = encoded.scale is not None and encoded.scale.shape == shape[:2]
            fits = encoded.values.shape == shape and encoded.values.dtype == STORED_DTYPE[schema.dtype]
            if not fits or has_scale != (schema.dtype == "int8"):
                got = f"{encoded.values.dtype} {encoded.values.shape}"
                raise ValueError(f"layer {layer} of this shard takes {schema.dtype} values {shape}, got {got}")

    def add_to_log(self, costs: Mapping[str, float], skipped: Mapping[str, str]) -> None:
        """Add costs, by name, and skipped samples (id -> reason) to the log, which comparisons of stores leave out."""
        self._check_lock()
        log = read_log(self._kvstore)
        log |= {name: log.get(name, 0.0) + cost for name, cost in costs.items()}
        log["skipped"] = {**log.get("skipped", {}), **skipped}
        self._kvstore.write_group(LOG, log)
