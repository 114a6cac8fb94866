"""What a store of a source's tokens says of itself, known before the first sample is decoded."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from extract.backbones.backbone import Backbone, digests
from extract.forward.frozen_forward import FrozenForward
from extract.forward.threads import thread_pool
from extract.sources.open_source import ImageSource, ImageSplit
from extract.sources.videos import decoder_info
from store.config import StoreConfig
from store.console.progress import progress
from store.layout import describe_tokens, reduced_layout, resolve_layers
from store.schema import FORMAT_VERSION, Provenance, Schema, SplitInfo
from store.writer import Listing

EXTRACTION_VERSION = 1  # raise by hand whenever our own code changes a stored value


def list_split(name: str, split: ImageSplit) -> Listing:
    """Ids, labels and digests of all samples; every file is read."""
    with progress(f"checking {name}", len(split), "samples") as advance, thread_pool(os.cpu_count(), "digest") as pool:
        digested = []
        for digest in pool.map(split.digest, range(len(split))):
            digested.append(np.frombuffer(digest, np.uint8))
            advance(1)
    digests_array = np.stack(digested) if digested else np.zeros((0, 16), np.uint8)
    return Listing(tuple(split.ids), np.asarray(split.labels), digests_array)


def sample_digests(listings: Mapping[str, Listing]) -> dict[str, str]:
    """Split -> a digest of its samples: their ids, labels and contents, in their order."""
    return {split: _listing_digest(listing) for split, listing in listings.items()}


def _listing_digest(listing: Listing) -> str:
    digest = hashlib.blake2b("\0".join(listing.ids).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(listing.labels).tobytes())
    digest.update(listing.digests.tobytes())
    return digest.hexdigest()


def wanted_schema(
    source: ImageSource, forward: FrozenForward, listings: Mapping[str, Listing], store: StoreConfig
) -> Schema:
    """What the store of a job should say of itself."""
    backbone = forward.backbone
    facts = {
        "samples": sample_digests(listings),
        "precision": forward.precision,
        "sampling": source.sampling,
        "drawn": source.drawn,
        "decoder_digest": decoder_info().digest if source.is_decoded_here else "",
        **digests(backbone),
    }
    rows = {split: len(listing.ids) for split, listing in listings.items()}
    schema = schema_for(backbone, store, source.name, source.classes, source.multi_label, rows, source.views, facts)
    libraries = decoder_info().versions if source.is_decoded_here else {}
    tail = tuple(backbone.tail.arrays()) if backbone.tail else ()
    return schema.model_copy(update={"libraries": libraries, "tail_tensors": tail})


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
        facts: what the provenance says beside names and shapes: digests, samples, precision, sampling, drawn, decoder.
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
        num_class_tokens=layout.num_class_tokens,
        grid=layout.grid,
        prefix_sets=layout.prefix_sets,
        views=views,
        shard_samples=-(-store.shard_samples // views) * views,  # no sample across two shards
        compressor=store.compressor,
        provenance=provenance,
        tail_tensors=(),
    )
