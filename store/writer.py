"""Creates a store and commits shards to it.

Order is the protocol. Creation writes everything that is known before the first forward pass and the root group last:
a folder without root attributes is no store yet. A shard writes its layers, waits until they are durable, and then its
rows of `status`: a shard counts from that moment on, and a crash at any instant leaves it either whole or missing.

The checksum of a chunk says that it is whole, not whose it is. So `shard_digest` keeps a CRC-32 of every layer of a
shard, over the rows' status, values and scales: `verify` compares it and finds files that were exchanged. Reading rows
does not: it would need the whole shard.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Shaped, UInt8

from store.arrays import (
    DIGEST,
    LOG,
    MARKS,
    MISSING,
    STATUS,
    STORED,
    holds_plain_rows,
    layer_arrays,
    layer_digest,
    layer_name,
    read_log,
    read_status,
    shard_arrays,
    shard_file,
)
from store.dtypes import STORED_DTYPE, Encoded
from store.errors import JobError
from store.io_errors import NEEDS_REPLACING, AccessError
from store.kvstore import KeyValueStore, wait
from store.local.plain_shard import PlainShard
from store.lock import Guard
from store.schema import Schema


@dataclass(frozen=True)
class Listing:
    """What is known of a split's samples before any of them is decoded."""

    ids: tuple[str, ...]
    labels: Shaped[np.ndarray, "samples ..."]
    digests: UInt8[np.ndarray, "samples 16"]


def create_store(
    folder: KeyValueStore,
    schema: Schema,
    listings: Mapping[str, Listing],
    rms: Mapping[int, Float32[np.ndarray, "dim"]],
    tail: Mapping[str, Float32[np.ndarray, "..."]],
) -> None:
    """Write a store without samples. Safe to repeat after a crash; the root group is written last.

    Args:
        listings: ids, labels and digests of every split of the schema.
        rms: layer -> per-channel RMS (dim,), int8 stores only.
        tail: the arrays that `schema.tail_tensors` names.

    Raises:
        JobError: the disk refused, or shards of another store lie there already.
    """
    _refuse_old_marks(folder, schema)
    for split, listing in listings.items():
        _create_split(folder, schema, split, listing)
        folder.write_group(split, {})
    for group, arrays in (("rms", {layer_name(k): v for k, v in rms.items()}), ("tail", dict(tail))):
        for name, values in arrays.items():
            dimensions = ["channel"] if values.ndim == 1 else [f"dim_{axis}" for axis in range(values.ndim)]
            folder.write_array(f"{group}/{name}", values, dimensions)
        folder.write_group(group, {})
    folder.write_group(LOG, {"extract_seconds": 0.0, "skipped": {}})
    folder.write_group("", schema.model_dump(mode="json"))


def _refuse_old_marks(folder: KeyValueStore, schema: Schema) -> None:
    """Marks without a root group are left from a store that somebody took apart; here they would vouch for its data."""
    for split in schema.splits:
        if folder.has_keys(f"{split}/status/c"):
            raise JobError(
                f"{folder.place}{split} holds shards of a store that is gone; delete that folder, or choose another "
                "store.path"
            )


def _create_split(folder: KeyValueStore, schema: Schema, split: str, listing: Listing) -> None:
    for name, metadata in shard_arrays(schema, split).items():
        folder.create_array(f"{split}/{name}", metadata)
    write_listing(folder, split, listing)


def write_listing(folder: KeyValueStore, group: str, listing: Listing) -> None:
    """What is known of a split's samples, below its group."""
    folder.write_array(f"{group}/label", listing.labels, ["sample", "class"][: listing.labels.ndim])
    folder.write_array(f"{group}/sample_digest", listing.digests, ["sample", "byte"])
    folder.write_strings(f"{group}/sample_id", listing.ids, "sample")


def read_listing(folder: KeyValueStore, group: str) -> Listing:
    """The inverse of `write_listing`.

    Raises:
        JobError: some of it is missing or damaged, or its parts do not fit together.
    """
    ids = tuple(folder.read_strings(f"{group}/sample_id"))
    labels, digests = folder.read_array(f"{group}/label"), folder.read_array(f"{group}/sample_digest")
    if not len(ids) == len(labels) == len(digests) or digests.dtype != np.uint8 or digests.shape[1:] != (16,):
        raise JobError(
            f"{folder.place}{group} lists {len(ids)} ids, {len(labels)} labels and digests of shape {digests.shape}, "
            f"which do not fit together; {NEEDS_REPLACING}"
        )
    return Listing(ids, labels, digests)


class StoreWriter:
    """Commits shards to a store that exists; under a lock, only while that is still held.

    `marks` is where marks and digests of layers under way go; those of the store itself lie beside its values.
    """

    def __init__(self, folder: KeyValueStore, schema: Schema, lock: Guard | None = None, marks: str = "") -> None:
        self._folder, self._schema, self._lock, self._marks = folder, schema, lock, marks

    def missing_shards(self, split: str) -> list[int]:
        """Shards that carry no commit mark."""
        status, shards = read_status(self._folder, self._schema, split, self._marks), self._schema.shards(split)
        return [shard for shard in shards if status[shards.rows(shard).start] == MISSING]

    def commit(self, split: str, shard: int, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"]) -> None:
        """Make one shard durable, then mark it; arguments and errors are those of `write` and `mark`."""
        self.write(split, shard, tokens, status)
        self.mark(split, shard, status)

    def write(self, split: str, shard: int, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"]) -> None:
        """Make one shard's values durable; until it is marked it counts as missing.

        Args:
            tokens: layer -> encoded rows of the shard (rows, tokens, dim), zeros in skipped rows; every layer.
            status: STORED or SKIPPED for every row of the shard.

        Raises:
            JobError: the disk refused, or another job took the store over; the shard stays missing and the store as it
                was.
            ValueError: layers, shapes or dtypes are not those of the shard.
        """
        rows = self._schema.shards(split).rows(shard)
        self._check_shard(tokens, status, len(rows))
        self._check_lock()
        doing = f"write shard {shard} of {split} to {self._folder.place}"
        values = self._by_array(tokens)
        with ThreadPoolExecutor(1, "digest") as beside:
            digests = beside.map(lambda layer: layer_digest(tokens[layer], status), self._schema.layers)
            if holds_plain_rows(self._folder, self._schema):
                self._folder.write_files(self._files(split, shard, values), doing)
            else:
                self._write_arrays(split, shard, values, doing)
        wait([self._open(split, DIGEST)[shard].write(np.array(list(digests), np.uint32))], doing)

    def _by_array(self, tokens: Mapping[int, Encoded]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for layer in self._schema.layers:
            parts = [part for part in (tokens[layer].values, tokens[layer].scale) if part is not None]
            found |= zip(layer_arrays(self._schema, layer), parts, strict=True)
        return found

    def _files(
        self, split: str, shard: int, values: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, list[memoryview]]]:
        """A shard's files by key, each in pieces."""
        arrays, shard_samples = shard_arrays(self._schema, split), self._schema.shard_samples
        for name, part in values.items():
            layout = PlainShard(shard_samples, part[0].nbytes)
            yield f"{split}/{shard_file(name, arrays[name], shard)}", layout.pieces(part)

    def _write_arrays(self, split: str, shard: int, values: Mapping[str, np.ndarray], doing: str) -> None:
        rows = self._schema.shards(split).rows(shard)

        def begin() -> list[Any]:
            targets = {name: self._open(split, name)[rows.start : rows.stop] for name in values}
            return [
                target.write(values[name], can_reference_source_data_indefinitely=True)
                for name, target in targets.items()
            ]

        try:
            wait(begin(), doing)
        except AccessError as error:
            if not error.is_damage:
                raise
            self._remove_values(split, shard)
            wait(begin(), doing)

    def mark(self, split: str, shard: int, status: UInt8[np.ndarray, "rows"]) -> None:
        """Commit a shard whose values are durable, or with MISSING take its mark back.

        Raises:
            JobError: the disk refused, or another job took the store over.
        """
        self._check_lock()
        rows = self._schema.shards(split).rows(shard)
        target = self._open(split, STATUS)[rows.start : rows.stop]
        wait([target.write(status)], f"commit shard {shard} of {split} to {self._folder.place}")

    def log_and_mark(
        self,
        split: str,
        shard: int,
        status: UInt8[np.ndarray, "rows"],
        seconds: float,
        forward_seconds: float,
        skipped: Mapping[str, str],
    ) -> None:
        """Commit a shard whose values are durable. The log goes first: a crash in between must lose no reason.

        It counts what went forward as well: a sample does so again for layers that are added.
        """
        forward = {"forward_seconds": forward_seconds, "forward_samples": float((status == STORED).sum())}
        self.add_to_log({"extract_seconds": seconds, **forward}, skipped)
        self.mark(split, shard, status)

    def unmark(self, split: str, shards: Iterable[int]) -> None:
        """Make shards missing, so that the extraction replaces them: first the marks, then the files go.

        Raises:
            JobError: the disk refused, or another job took the store over; some of the shards may be missing already.
        """
        for shard in shards:
            self.mark(split, shard, np.full(len(self._schema.shards(split).rows(shard)), MISSING, np.uint8))
            self._remove_values(split, shard)

    def _remove_values(self, split: str, shard: int) -> None:
        """Of a shard without a mark: a damaged file would stop the write that is to replace it, if that reads it first.

        tensorstore does where the shard is part-filled.
        """
        for name in set(shard_arrays(self._schema, split)) - {STATUS}:
            place = self._marks if name in MARKS else ""
            self._folder.remove(f"{place}{split}/{name}/c/{shard}")

    def _open(self, split: str, name: str) -> ts.TensorStore:
        place = self._marks if name in MARKS else ""
        return self._folder.open_array(f"{place}{split}/{name}", shard_arrays(self._schema, split)[name])

    def _check_lock(self) -> None:
        if self._lock:
            self._lock.check()

    def _check_shard(self, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"], n_rows: int) -> None:
        """tensorstore would broadcast a wrong shape and convert a wrong dtype in silence."""
        schema = self._schema
        shape = (n_rows, schema.token_layout.num_tokens, schema.dim)
        if set(tokens) != set(schema.layers) or len(status) != n_rows or (status == MISSING).any():
            raise ValueError(f"this shard takes layers {schema.layers} and {n_rows} statuses")
        for layer, encoded in tokens.items():
            scaled = encoded.scale is not None and encoded.scale.shape == shape[:2]
            fits = encoded.values.shape == shape and encoded.values.dtype == STORED_DTYPE[schema.dtype]
            if not fits or scaled != (schema.dtype == "int8"):
                got = f"{encoded.values.dtype} {encoded.values.shape}"
                raise ValueError(f"layer {layer} of this shard takes {schema.dtype} values {shape}, got {got}")

    def add_to_log(self, costs: Mapping[str, float], skipped: Mapping[str, str]) -> None:
        """Add up costs by name, and samples skipped (id -> reason); outside every comparison of bytes."""
        self._check_lock()
        log = self.read_log()
        log |= {name: log.get(name, 0.0) + spent for name, spent in costs.items()}
        log["skipped"] = {**log.get("skipped", {}), **skipped}
        self._folder.write_group(LOG, log)

    def read_log(self) -> dict[str, Any]:
        """The attributes of the `_log` group."""
        return read_log(self._folder)
