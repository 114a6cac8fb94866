"""Tokens without a backbone: a whole store of random ones, and arrays encoded as a store keeps them."""

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


def write_store(
    folder: Path,
    samples: int,
    layers: int,
    grid: tuple[int, int],
    dim: int,
    shard_samples: int = 1024,
    dtype: Literal["int8", "float16"] = "int8",
) -> Store:
    """One training split of two classes; every sample has a class token and a grid of patches in every layer."""
    provenance = Provenance(
        backbone="made-up",
        model_kwargs={},
        weights_digest="",
        image_size=(3, 224, 224),
        preprocessing="",
        preprocessing_digest="",
        tokens="all",
        dtype=dtype,
        precision="float32",
        samples={},
        extraction_version=1,
    )
    schema = Schema(
        format_version=FORMAT_VERSION,
        dataset="made-up",
        classes=("a", "b"),
        multi_label=False,
        splits={"train": SplitInfo(num_samples=samples)},
        depth=layers,
        layers=tuple(range(layers)),
        dim=dim,
        num_prefix_tokens=1,
        num_class_tokens=1,
        grid=grid,
        shard_samples=shard_samples,
        compressor=None,
        provenance=provenance,
        tail_tensors=(),
    )
    listing = Listing(
        tuple(f"{row:06d}" for row in range(samples)), np.arange(samples) % 2, np.zeros((samples, 16), np.uint8)
    )
    store, draw = KeyValueStore(store_url(folder)), np.random.default_rng(0)
    rms = {k: np.ones(dim, np.float32) for k in schema.layers} if dtype == "int8" else {}
    create_store(store, schema, {"train": listing}, rms, {})
    writer, tokens = StoreWriter(store, schema), schema.token_layout.num_tokens
    for shard in schema.shards("train"):
        rows = len(schema.shards("train").rows(shard))
        values, *scales = _draw(draw, (rows, tokens, dim), dtype)
        encoded = {layer: Encoded(np.roll(values, layer, axis=0), *scales) for layer in schema.layers}  # all different
        writer.commit("train", shard, encoded, np.full(rows, STORED, np.uint8))
    return open_store(folder)


def _draw(draw: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> list[np.ndarray]:
    if dtype == "float16":
        return [draw.standard_normal(shape, np.float32).astype(np.float16)]
    return [draw.integers(-127, 128, shape, np.int8), draw.random(shape[:2], np.float32) / 2**14]


def encode(tokens: np.ndarray, dtype: Any, rms: np.ndarray | None = None) -> Encoded:
    """Of one layer; its samples are called 0, 1 and so on."""
    by_layer = {} if rms is None else {0: torch.from_numpy(rms)}
    return Encoding({0: torch.from_numpy(tokens)}, list(map(str, range(len(tokens)))), dtype, by_layer).result()[0]
