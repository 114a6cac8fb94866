"""Builds the schema that a job's store must have, before the first sample is decoded."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from extract.backbones.backbone import Backbone, digests
from extract.forward.threads import thread_pool
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import ImageSplit
from extract.sources.videos import decoder_info
from store.config import StoreConfig
from store.console.progress import progress
from store.dtypes import block_size
from store.errors import UserError
from store.layout import describe_tokens, reduced_layout, resolve_layers
from store.listing import Listing
from store.schema import AUGMENTED, FORMAT_VERSION, Provenance, Schema, SplitInfo

EXTRACTION_VERSION = 1  # raise by hand whenever our own code changes a stored value


def list_split(name: str, split: ImageSplit) -> Listing:
    """Ids, labels and digests of all samples; every file is read."""
    with progress(f"checking {name}", len(split), "samples") as advance, thread_pool(os.cpu_count(), "digest") as pool:
        rows = []
        for digest in pool.map(split.digest, range(len(split))):
            rows.append(np.frombuffer(digest, np.uint8))
            advance(1)
    sample_digests = np.stack(rows) if rows else np.zeros((0, 16), np.uint8)
    return Listing(tuple(split.ids), np.asarray(split.labels), sample_digests, split.validation)


def list_splits(splits: Mapping[str, ImageSplit]) -> dict[str, Listing]:
    """The listing of every split; the files of augmented views are those of `train`, and not read again."""
    listings = {name: list_split(name, split) for name, split in splits.items() if name != AUGMENTED}
    if augmented := splits.get(AUGMENTED):
        train = listings["train"]
        repeated = np.repeat(train.digests, len(augmented) // len(train.ids), axis=0)
        listings[AUGMENTED] = Listing(tuple(augmented.ids), np.asarray(augmented.labels), repeated)
    return listings


def sample_digests(listings: Mapping[str, Listing]) -> dict[str, str]:
    """Split -> digest of the ids, labels, contents and validation marks of its samples, in their order."""
    return {split: _listing_digest(listing) for split, listing in listings.items()}


def _listing_digest(listing: Listing) -> str:
    digest = hashlib.blake2b("\0".join(listing.ids).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(listing.labels).tobytes())
    digest.update(listing.digests.tobytes())
    if listing.validation is not None:
        digest.update(listing.validation.tobytes())
    return digest.hexdigest()


def schema_of(job: ExtractionJob, listings: Mapping[str, Listing]) -> Schema:
    """The schema of the store that a job makes."""
    source, backbone = job.source, job.backbone
    precision = job.forward(job.layers).precision  # before `digests`: it moves the backbone to its device
    facts = {
        "samples": sample_digests(listings),
        "precision": precision,
        "sampling": source.sampling,
        "drawn": source.drawn,
        "augmentation": source.augmentation,
        "decoder_digest": decoder_info().digest if source.is_decoded_here else "",
        **digests(backbone),
    }
    dataset = DatasetInfo(
        name=source.name,
        classes=source.classes,
        multi_label=source.multi_label,
        views=source.views,
        rows={split: len(listing.ids) for split, listing in listings.items()},
        val_split=source.val_split,
    )
    schema = schema_for(backbone, job.store, dataset, facts)
    libraries = decoder_info().versions if source.is_decoded_here else {}
    tail = tuple(backbone.tail.arrays()) if backbone.tail else ()
    return schema.model_copy(update={"libraries": libraries, "tail_tensors": tail})


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A dataset's part of a schema; `rows` are the rows of every split, `views` of them per sample.

    `val_split` is the source's split that validates; empty if validation samples are drawn.
    """

    name: str
    classes: tuple[str, ...]
    multi_label: bool
    views: int
    rows: Mapping[str, int]
    val_split: str = ""


def schema_for(backbone: Backbone, store: StoreConfig, dataset: DatasetInfo, facts: Mapping[str, Any]) -> Schema:
    """The schema of a store of a backbone's tokens, without the libraries and the tensors of the backbone's tail.

    Args:
        facts: the fields of the provenance that `backbone` and `store` do not give: digests, samples, precision,
            sampling, drawn, augmentation, decoder_digest.

    Raises:
        UserError: the tokens cannot be reduced or encoded in this way.
    """
    if store.dtype == "int4" and not block_size(backbone.dim):
        raise UserError(
            f"store.dtype: int4 takes widths that are a multiple of 4, and the tokens of {backbone.name} have "
            f"{backbone.dim} channels; choose int8"
        )
    layout = reduced_layout(backbone.layout, store.tokens)
    return Schema(
        format_version=FORMAT_VERSION,
        dataset=dataset.name,
        classes=dataset.classes,
        multi_label=dataset.multi_label,
        splits={split: SplitInfo(num_samples=n) for split, n in dataset.rows.items()},
        depth=backbone.depth,
        layers=resolve_layers(store.layers, backbone.depth),
        dim=backbone.dim,
        num_prefix_tokens=layout.num_prefix_tokens,
        num_class_tokens=layout.num_class_tokens,
        grid=layout.grid,
        prefix_sets=layout.prefix_sets,
        views=dataset.views,
        shard_samples=-(-store.shard_samples // dataset.views) * dataset.views,  # all views of a sample in one shard
        compressor=store.compressor,
        provenance=_provenance(backbone, store, facts),
        tail_tensors=(),
        val_split=dataset.val_split,
    )


def _provenance(backbone: Backbone, store: StoreConfig, facts: Mapping[str, Any]) -> Provenance:
    return Provenance(
        backbone=backbone.name,
        model_kwargs=backbone.model_kwargs,
        image_size=backbone.image_size,
        preprocessing=backbone.preprocessing,
        tokens=describe_tokens(store.tokens),
        dtype=store.dtype,
        extraction_version=EXTRACTION_VERSION,
        **facts,
    )
