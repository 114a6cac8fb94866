"""The extraction job: find what is missing, run the frozen backbone over it, commit shard after shard."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from extract.backbone import Backbone, TokensByLayer, digests
from extract.config import DataConfig, ExtractConfig
from extract.forward import Batch, FrozenForward
from extract.sources import ImageSource, ImageSplit
from extract.threads import thread_pool
from store.backend import Folder, store_url
from store.config import Dtype, StoreConfig
from store.errors import JobError, UserError
from store.formats import Encoded, NotStorableError, channel_rms, encode
from store.groups import in_groups
from store.layout import describe_tokens, reduced_layout, resolve_layers
from store.lock import hold
from store.progress import progress
from store.reader import Store, open_store
from store.schema import FORMAT_VERSION, Provenance, Schema, SplitInfo, require_same
from store.space import free_bytes
from store.writer import SKIPPED, STORED, Listing, StoreWriter, create_store, holds_samples, open_schema, read_rms

EXTRACTION_VERSION = 1  # raise by hand whenever our own code changes a stored value
CALIBRATION_SAMPLES = 256


@dataclass(frozen=True)
class Extraction:
    """What one run of the job did."""

    store: Store
    shards_written: int
    samples_written: int
    seconds: float


def extract_tokens(
    source: ImageSource, backbone: Backbone, data: DataConfig, store: StoreConfig, config: ExtractConfig
) -> Extraction:
    """Bring a store to completion: only its missing shards are extracted, none where it is whole.

    Raises:
        UserError: the store there was made from something else; a sample cannot be decoded (`on_error: fail`).
        JobError: a value cannot be stored, the disk refuses or is too small, another job is at work on the store.
    """
    started = time.perf_counter()
    forward = FrozenForward(backbone, resolve_layers(store.layers, backbone.depth), store.tokens, config)
    listings = {name: _list_split(name, split) for name, split in source.splits.items()}
    folder = Folder(store_url(store.path))
    wanted = _wanted_schema(source, forward, listings, store)
    n_shards = n_samples = 0
    if not _is_complete(folder, wanted):  # which a store on a read-only disk may be
        with hold(folder) as lock:
            schema = _open_or_create(folder, wanted, source, forward, listings, data)
            writer = StoreWriter(folder, schema, lock)
            missing = {split: writer.missing_shards(split) for split in schema.splits}
            _require_space(folder, schema, missing)
            job = _Job(source, forward, schema, folder, writer, data.on_error == "skip")
            n_shards, n_samples = sum(map(len, missing.values())), job.run(missing, started)
    return Extraction(open_store(store.path), n_shards, n_samples, time.perf_counter() - started)


def _is_complete(folder: Folder, wanted: Schema) -> bool:
    stored = open_schema(folder)
    if stored is None or not holds_samples(folder, stored):
        return False
    require_same(stored, wanted, folder.place)
    return not any(StoreWriter(folder, stored).missing_shards(split) for split in stored.splits)


def _list_split(name: str, split: ImageSplit) -> Listing:
    with progress(f"checking {name}", len(split), "samples") as advance, thread_pool(os.cpu_count(), "digest") as pool:
        digested = []
        for digest in pool.map(split.digest, range(len(split))):
            digested.append(np.frombuffer(digest, np.uint8))
            advance(1)
    digests_array = np.stack(digested) if digested else np.zeros((0, 16), np.uint8)
    return Listing(tuple(split.ids), np.asarray(split.labels), digests_array)


def _listing_digest(listing: Listing) -> str:
    digest = hashlib.blake2b("\0".join(listing.ids).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(listing.labels).tobytes())
    digest.update(listing.digests.tobytes())
    return digest.hexdigest()


def _wanted_schema(
    source: ImageSource, forward: FrozenForward, listings: Mapping[str, Listing], store: StoreConfig
) -> Schema:
    backbone = forward.backbone
    facts = {
        "samples": {split: _listing_digest(listing) for split, listing in listings.items()},
        "precision": forward.precision,
        "sampling": source.sampling,
        **digests(backbone),
    }
    rows = {split: len(listing.ids) for split, listing in listings.items()}
    schema = schema_for(backbone, store, source.name, source.classes, source.multi_label, rows, source.views, facts)
    return schema.model_copy(update={"tail_tensors": tuple(backbone.tail.arrays()) if backbone.tail else ()})


def schema_for(
    backbone: Backbone,
    store: StoreConfig,
    dataset: str,
    classes: tuple[str, ...],
    multi_label: bool,
    rows: Mapping[str, int],
    views: int,
    facts: Mapping[str, Any],
) -> Schema:
    """What a store of a backbone's tokens says of itself, but for the backbone's tail.

    Args:
        rows: of every split.
        facts: what the provenance says beside names and shapes: digests, samples, precision, sampling.
    """
    layout = reduced_layout(backbone.layout, store.tokens)
    provenance = Provenance(
        backbone=backbone.name,
        model_kwargs=backbone.model_kwargs,
        image_size=backbone.image_size,
        preprocessing=backbone.preprocessing,
        tokens=describe_tokens(store.tokens),
        dtype=store.dtype,
        extraction_version=EXTRACTION_VERSION,
        **facts,
    )
    return Schema(
        format_version=FORMAT_VERSION,
        dataset=dataset,
        classes=classes,
        multi_label=multi_label,
        splits={split: SplitInfo(num_samples=n) for split, n in rows.items()},
        depth=backbone.depth,
        layers=resolve_layers(store.layers, backbone.depth),
        dim=backbone.dim,
        num_prefix_tokens=layout.num_prefix_tokens,
        grid=layout.grid,
        prefix_sets=layout.prefix_sets,
        views=views,
        shard_samples=-(-store.shard_samples // views) * views,  # no sample across two shards
        compressor=store.compressor,
        provenance=provenance,
        tail_tensors=(),
    )


def _open_or_create(
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
    _require_space(folder, wanted, {split: list(wanted.shards(split)) for split in wanted.splits})
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
            _report_failures(batch, split, data.on_error == "skip")
            if batch.images is not None:
                tokens = forward(batch.images)
                encode_layers(tokens, [split.ids[row] for row in batch.rows], "float32", {})  # refuses NaN and infinity
                for layer, values in tokens.items():
                    squares[layer].extend(values.double().square().mean(dim=1).cpu().numpy())
            advance(len(batch.rows) + len(batch.failed))
    if not any(squares.values()):
        raise JobError("none of the training samples can be decoded, so the int8 format cannot be calibrated")
    return {layer: channel_rms(np.mean(means, axis=0)) for layer, means in squares.items()}


def _report_failures(batch: Batch, split: ImageSplit, skip: bool) -> dict[str, str]:
    if batch.failed and not skip:
        raise UserError(next(iter(batch.failed.values())))
    return {split.ids[row]: reason for row, reason in batch.failed.items()}


def _require_space(folder: Folder, schema: Schema, missing: Mapping[str, Sequence[int]]) -> None:
    """Refuse a job that cannot fit, before it starts."""
    rows = sum(len(schema.shards(split).rows(shard)) for split, shards in missing.items() for shard in shards)
    n_bytes, free = rows * schema.bytes_per_sample, free_bytes(folder.url)
    if free is not None and schema.compressor is None and n_bytes > free:
        raise JobError(
            f"{rows:,} samples need {n_bytes / 2**30:,.1f} GiB at {folder.place}, {free / 2**30:,.1f} GiB are free; "
            "store fewer layers (store.layers), fewer tokens (store.tokens) or one byte a value (store.dtype: int8)"
        )


@dataclass(frozen=True)
class _Shard:
    """What is to be committed of a shard, and the time that reading its samples and the forward pass took."""

    tokens: dict[int, Encoded]
    status: UInt8[np.ndarray, "rows"]
    skipped: dict[str, str]
    forward_seconds: float


class _Job:
    """Extracts missing shards; a shard is written while the next one is computed."""

    def __init__(
        self,
        source: ImageSource,
        forward: FrozenForward,
        schema: Schema,
        folder: Folder,
        writer: StoreWriter,
        skip: bool,
    ) -> None:
        self._source, self._forward, self._schema, self._writer, self._skip = source, forward, schema, writer, skip
        self._rms = read_rms(folder, schema)

    def run(self, missing: Mapping[str, Sequence[int]], started: float) -> int:
        """Extract and commit all missing shards; returns the number of samples written."""
        written, lap = 0, started
        with thread_pool(1, "commit") as pool:
            commit: Future[None] | None = None
            for split, shards in missing.items():
                total = sum(len(self._schema.shards(split).rows(shard)) for shard in shards)
                with progress(f"extracting {split}", total, "samples") as advance:
                    for number in shards:
                        shard = self._extract_shard(split, number, advance)
                        if commit:
                            commit.result()
                        now = time.perf_counter()
                        commit = pool.submit(self._commit, split, number, shard, now - lap)
                        lap, written = now, written + int((shard.status == STORED).sum())
            if commit:
                commit.result()
        return written

    def _commit(self, split: str, number: int, shard: _Shard, seconds: float) -> None:
        # The log goes first: a crash in between must not lose why samples were skipped.
        spent = {"extract_seconds": seconds, "forward_seconds": shard.forward_seconds}
        self._writer.add_to_log(spent, shard.skipped)
        self._writer.commit(split, number, shard.tokens, shard.status)

    def _extract_shard(self, split: str, number: int, advance: Callable[[int], None]) -> _Shard:
        images, rows = self._source.splits[split], self._schema.shards(split).rows(number)
        buffers: dict[int, Encoded] = {}
        status = np.full(len(rows), STORED, np.uint8)
        skipped: dict[str, str] = {}
        seconds, started = 0.0, time.perf_counter()
        for batch in self._forward.batches(images, in_groups(rows, self._forward.batch_size)):
            skipped |= _report_failures(batch, images, self._skip)
            status[[row - rows.start for row in batch.failed]] = SKIPPED
            tokens = {} if batch.images is None else self._forward(batch.images)
            seconds += time.perf_counter() - started
            encoded = self._encode(tokens, [images.ids[row] for row in batch.rows])
            _place(buffers, encoded, [row - rows.start for row in batch.rows], len(rows))
            advance(len(batch.rows) + len(batch.failed))
            started = time.perf_counter()
        for layer in set(self._schema.layers) - set(buffers):  # a shard in which no sample could be decoded
            zeros = np.zeros((len(rows), self._schema.token_layout.num_tokens, self._schema.dim), np.float32)
            buffers[layer] = encode(zeros, self._schema.dtype, self._rms.get(layer))
        return _Shard(buffers, status, skipped, seconds)

    def _encode(self, tokens: TokensByLayer, ids: Sequence[str]) -> dict[int, Encoded]:
        return encode_layers(tokens, ids, self._schema.dtype, self._rms)


def encode_layers(
    tokens: TokensByLayer, ids: Sequence[str], dtype: Dtype, rms: Mapping[int, np.ndarray]
) -> dict[int, Encoded]:
    """Every layer as it is stored; a value that cannot be stored is a JobError that names sample and layer."""
    encoded = {}
    for layer, values in tokens.items():
        try:
            encoded[layer] = encode(values.cpu().numpy(), dtype, rms.get(layer))
        except NotStorableError as error:
            sample, token, channel = error.index
            raise JobError(
                f"sample {ids[sample]!r}, layer {layer}, token {token}, channel {channel}: the value {error.value} "
                f"cannot be stored as {error.dtype}; "
                + (_too_large(error.dtype) if np.isfinite(error.value) else _NON_FINITE)
            ) from error
    return encoded


def _too_large(dtype: str) -> str:
    wider = [name for name in ("bfloat16", "float32", "int8") if name != dtype]
    return f"choose store.dtype {' or '.join(wider)}"


_NON_FINITE = "the backbone itself yields it: check its weights, or set extract.precision to float32"


def _place(buffers: dict[int, Encoded], encoded: Mapping[int, Encoded], rows: Sequence[int], total: int) -> None:
    """Copy a batch into the shard's buffers, which start as zeros: what a skipped row keeps."""
    for layer, part in encoded.items():
        if layer not in buffers:
            scale = None if part.scale is None else np.zeros((total, *part.scale.shape[1:]), part.scale.dtype)
            buffers[layer] = Encoded(np.zeros((total, *part.values.shape[1:]), part.values.dtype), scale)
        whole = buffers[layer]
        whole.values[rows] = part.values
        if whole.scale is not None:
            whole.scale[rows] = part.scale
