"""Makes stores of known values, small enough to be damaged byte by byte."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.made_up import encode
from store.address import store_url
from store.arrays import SKIPPED, STORED, open_schema, read_rms
from store.dtypes import CODES, Encoded, decode_numpy
from store.kvstore import KeyValueStore
from store.listing import Listing
from store.reader import Store, open_store
from store.schema import FORMAT_VERSION, Provenance, Schema, SplitInfo
from store.writer import StoreWriter, create_store

SIZES = {"train": 5, "test": 2}
LAYERS, TOKENS, DIM, SHARD = (0, 2), 5, 4, 2
RMS = {layer: np.array([1, 0.5, 3, 50], np.float32) for layer in LAYERS}
TAIL = {"norm.weight": np.linspace(0, 1, DIM, dtype=np.float32), "pool.q": np.ones((2, 3), np.float32)}


def provenance(**changes: Any) -> Provenance:
    """A provenance with some fields changed."""
    fields: dict[str, Any] = {
        "backbone": "vit_small",
        "model_kwargs": {"depth": 3},
        "weights_digest": "12ab",
        "image_size": (3, 32, 32),
        "preprocessing": "bicubic, 32 px",
        "preprocessing_digest": "34cd",
        "tokens": "all",
        "dtype": "float32",
        "precision": "float32",
        "samples": {"train": "56ef", "test": "78aa"},
        "extraction_version": 1,
    }
    return Provenance(**{**fields, **changes})


def schema(dtype: str = "float32", compressor: str | None = None, multi_label: bool = False, **changes: Any) -> Schema:
    """A schema of two small splits, with some fields changed."""
    fields: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dataset": "drawn",
        "classes": ("blé", "green", "red"),
        "multi_label": multi_label,
        "splits": {name: SplitInfo(num_samples=n) for name, n in SIZES.items()},
        "depth": 3,
        "layers": LAYERS,
        "dim": DIM,
        "num_prefix_tokens": 1,
        "num_class_tokens": 1,
        "grid": (2, 2),
        "shard_samples": SHARD,
        "compressor": compressor,
        "provenance": provenance(dtype=dtype),
        "tail_tensors": tuple(TAIL),
    }
    return Schema(**{**fields, **changes})


def listing(split: str, multi_label: bool = False, marks_validation: bool = False) -> Listing:
    """Ids, labels and digests of a split; with marks, every second sample is for validation."""
    n = SIZES[split]
    labels = (np.arange(3 * n).reshape(n, 3) % 2).astype(np.uint8) if multi_label else np.arange(n, dtype=np.int64) % 3
    digests = np.arange(16 * n, dtype=np.uint8).reshape(n, 16)
    ids = tuple(f"{split}/ünïcode {row}.png" for row in range(n))
    return Listing(ids, labels, digests, np.arange(n) % 2 == 1 if marks_validation else None)


def values(split: str, layer: int) -> np.ndarray:
    """Tokens (samples, tokens, dim) float32 of a split: no zeros, one massive channel."""
    draw = np.random.default_rng([layer, len(split)])
    drawn = draw.normal(2, 1, (SIZES[split], TOKENS, DIM)) * RMS[layer]
    return drawn.astype(np.float32)


def expected(split: str, layer: int, dtype: str) -> np.ndarray:
    """The tokens that a store of that dtype returns."""
    return decode_numpy(encode(values(split, layer), dtype, RMS[layer]), dtype, RMS[layer])


def kvstore_at(path: Path | str) -> KeyValueStore:
    """The keys of the store at a path or URL."""
    return KeyValueStore(store_url(path))


def create(path: Path | str, wanted: Schema) -> StoreWriter:
    """Create the store unless it exists, as the extraction job does."""
    kvstore = kvstore_at(path)
    if open_schema(kvstore) is None:
        listings = {s: listing(s, wanted.multi_label, wanted.marks_validation(s)) for s in SIZES}
        create_store(kvstore, wanted, listings, RMS if wanted.dtype in CODES else {}, TAIL)
    return StoreWriter(kvstore, wanted)


def commit(
    path: Path | str, writer: StoreWriter, wanted: Schema, split: str, shard: int, skip: Collection[int]
) -> None:
    """Commit one shard; `skip` are its rows that cannot be decoded."""
    rows = wanted.shards(split).rows(shard)
    part = slice(rows.start, rows.stop)
    rms = read_rms(kvstore_at(path), wanted)
    tokens: dict[int, Encoded] = {}
    for layer in wanted.layers:
        encoded = encode(values(split, layer)[part], wanted.dtype, rms.get(layer))
        for row in set(skip) & set(rows):
            encoded.values[row - rows.start] = 0
        tokens[layer] = encoded
    status = np.array([SKIPPED if row in skip else STORED for row in rows], np.uint8)
    writer.add_to_log(
        {"extract_seconds": 1.0}, {listing(split).ids[row]: "it is no image" for row in set(skip) & set(rows)}
    )
    writer.commit(split, shard, tokens, status)


def complete(path: Path | str, wanted: Schema, skip: Collection[int] = ()) -> Store:
    """Create or resume a store, and commit its missing shards; `skip` are rows of train that cannot be decoded."""
    writer = create(path, wanted)
    for split in wanted.splits:
        for shard in writer.missing_shards(split):
            commit(path, writer, wanted, split, shard, skip if split == "train" else ())
    return open_store(path)


def contents(path: Path) -> dict[str, bytes]:
    """The content of every file except the log, by path."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in files if "_log" not in f.relative_to(path).parts}
