"""Writes stores of random tokens, which need no backbone, and encodes arrays as a store does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from extract.forward.encoding import Encoding
from store.address import store_url
from store.arrays import STORED
from store.dtypes import Encoded
from store.kvstore import KeyValueStore
from store.listing import Listing
from store.reader import Store, open_store
from store.schema import FORMAT_VERSION, Provenance, Schema, SplitInfo
from store.writer import StoreWriter, create_store


@dataclass(frozen=True, kw_only=True)
class StoreShape:
    """A training split of two classes; a sample has a class token and a grid of patches in every layer."""

    samples: int
    layers: int
    grid: tuple[int, int]
    dim: int
    shard_samples: int = 1024
    dtype: Literal["int8", "float16"] = "int8"


def write_store(folder: Path, shape: StoreShape) -> Store:
    """Write a store of this shape and open it."""
    schema, samples = _schema(shape), shape.samples
    kvstore, generator = KeyValueStore(store_url(folder)), np.random.default_rng(0)
    ids = tuple(f"{row:06d}" for row in range(samples))
    listing = Listing(ids, np.arange(samples) % 2, np.zeros((samples, 16), np.uint8))
    rms = {layer: np.ones(shape.dim, np.float32) for layer in schema.layers} if shape.dtype == "int8" else {}
    create_store(kvstore, schema, {"train": listing}, rms=rms, tail={})
    writer, shards = StoreWriter(kvstore, schema), schema.shards("train")
    for shard in shards:
        rows = len(shards.rows(shard))
        values, *scales = _draw(generator, (rows, schema.token_layout.num_tokens, shape.dim), shape.dtype)
        encoded = {layer: Encoded(np.roll(values, layer, axis=0), *scales) for layer in schema.layers}  # all different
        writer.commit("train", shard, encoded, np.full(rows, STORED, np.uint8))
    return open_store(folder)


def _schema(shape: StoreShape) -> Schema:
    provenance = Provenance(
        backbone="made-up",
        model_kwargs={},
        weights_digest="",
        image_size=(3, 224, 224),
        preprocessing="",
        preprocessing_digest="",
        tokens="all",
        dtype=shape.dtype,
        precision="float32",
        samples={},
        extraction_version=1,
    )
    return Schema(
        format_version=FORMAT_VERSION,
        dataset="made-up",
        classes=("a", "b"),
        multi_label=False,
        splits={"train": SplitInfo(num_samples=shape.samples)},
        depth=shape.layers,
        layers=tuple(range(shape.layers)),
        dim=shape.dim,
        num_prefix_tokens=1,
        num_class_tokens=1,
        grid=shape.grid,
        shard_samples=shape.shard_samples,
        compressor=None,
        provenance=provenance,
        tail_tensors=(),
    )


def _draw(generator: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> list[np.ndarray]:
    """Stored values, and the scale of every token for int8."""
    if dtype == "float16":
        return [generator.standard_normal(shape, np.float32).astype(np.float16)]
    return [generator.integers(-127, 128, shape, np.int8), generator.random(shape[:2], np.float32) / 2**14]


def encode(tokens: np.ndarray, dtype: Any, rms: np.ndarray | None = None) -> Encoded:
    """Encode the tokens of one layer, (samples, tokens, dim)."""
    ids, by_layer = list(map(str, range(len(tokens)))), {} if rms is None else {0: torch.from_numpy(rms)}
    return Encoding({0: torch.from_numpy(tokens)}, ids, dtype, by_layer).result()[0]
