"""Opens the store of a job, or creates it."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from extract.config import DataConfig
from extract.forward import FrozenForward
from extract.shard import encode_layers, report_failures
from extract.sources import ImageSource, ImageSplit
from store.arrays import holds_samples, open_schema
from store.backend import Folder
from store.errors import JobError
from store.formats import channel_rms
from store.groups import in_groups
from store.progress import progress
from store.schema import Schema, require_same
from store.space import free_bytes
from store.writer import Listing, create_store

CALIBRATION_SAMPLES = 256


def open_or_create(
    folder: Folder,
    wanted: Schema,
    source: ImageSource,
    forward: FrozenForward,
    listings: Mapping[str, Listing],
    data: DataConfig,
) -> Schema:
    stored = open_schema(folder)
    if stored is not None and holds_samples(folder, stored):
        require_same(stored, wanted, folder.place)
        return stored
    if stored == wanted:
        return wanted
    if stored is not None:  # left by a job that failed before its first shard: there is nothing in it to lose
        folder.clear()
    require_space(folder, wanted, {split: list(wanted.shards(split)) for split in wanted.splits})
    rms = _calibrate(source.splits["train"], forward, data) if wanted.dtype == "int8" else {}
    tail = forward.backbone.tail.arrays() if forward.backbone.tail else {}
    create_store(folder, wanted, listings, rms, tail)
    return wanted


def _calibrate(split: ImageSplit, forward: FrozenForward, data: DataConfig) -> dict[int, np.ndarray]:
    """Per-channel RMS of every layer from 256 training samples, drawn by a fixed hash of their ids."""
    order = sorted(range(len(split)), key=lambda row: hashlib.blake2b(split.ids[row].encode()).digest())
    rows = sorted(order[:CALIBRATION_SAMPLES])
    squares: dict[int, list[np.ndarray]] = {layer: [] for layer in forward.layers}  # (dim,) of every sample
    with progress("calibrating int8", len(rows), "samples") as advance:
        for batch in forward.batches(split, in_groups(rows, forward.batch_size)):
            report_failures(batch, split, data.on_error == "skip")
            if batch.images is not None:
                tokens = forward(batch.images)
                encode_layers(tokens, [split.ids[row] for row in batch.rows], "float32", {})  # refuses NaN and infinity
                for layer, values in tokens.items():
                    squares[layer].extend(values.double().square().mean(dim=1).cpu().numpy())
            advance(len(batch.rows) + len(batch.failed))
    if not any(squares.values()):
        raise JobError("none of the training samples can be decoded, so the int8 format cannot be calibrated")
    return {layer: channel_rms(np.mean(means, axis=0)) for layer, means in squares.items()}


def require_space(folder: Folder, schema: Schema, missing: Mapping[str, Sequence[int]]) -> None:
    """Refuse a job that cannot fit, before it starts."""
    rows = sum(len(schema.shards(split).rows(shard)) for split, shards in missing.items() for shard in shards)
    n_bytes, free = rows * schema.bytes_per_sample, free_bytes(folder.url)
    if free is not None and schema.compressor is None and n_bytes > free:
        raise JobError(
            f"{rows:,} samples need {n_bytes / 2**30:,.1f} GiB at {folder.place}, {free / 2**30:,.1f} GiB are free; "
            "store fewer layers (store.layers), fewer tokens (store.tokens) or one byte a value (store.dtype: int8)"
        )
