"""Extracts the store of a configuration, or a new store beside it if its samples have changed."""

from collections.abc import Iterator
from itertools import count
from typing import Literal

from adapt.config.pipeline import Config
from adapt.job.checks import require_rows
from adapt.job.inputs import Inputs
from extract.job.extraction import Extraction, ShardsBySplit, extract_tokens
from extract.job.extraction_job import ExtractionJob
from store.errors import ChangedError, OtherStoreError

OnChanged = Literal["fail", "new-store"]


def extract(config: Config, inputs: Inputs, on_changed: OnChanged = "fail") -> Extraction:
    """Complete the store of a configuration; `Extraction.path` is the store that was completed.

    Args:
        on_changed: `fail`, or `new-store`: if samples that the store holds are gone or changed, leave it as it is and
            extract to a store beside it, which is new or has exactly these samples.

    Raises:
        ChangedError: samples that the store holds are gone or changed (`on_changed: fail`).
        UserError: there are too few training samples to train and validate on.
        UserError, JobError: as of `extract_tokens`.
    """
    require_rows(config, inputs.source)  # before hours of extraction
    try:
        return extract_tokens(extraction_job(config, inputs))
    except ChangedError:
        if on_changed == "fail":
            raise
    for path in _paths_beside(config.store.path):
        other = at_store(config, path)
        try:
            return extract_tokens(extraction_job(other, inputs.at(other)))
        except OtherStoreError:
            continue
    raise AssertionError("_paths_beside never ends")


def repair(config: Config, inputs: Inputs, damaged: ShardsBySplit) -> Extraction:
    """Extract damaged shards of a store again, by the job that made it.

    Raises:
        UserError, JobError: as of `extract_tokens`; the job has other samples, another backbone or format than the
            store, which is then left as it is.
    """
    return extract_tokens(extraction_job(config, inputs), damaged)


def at_store(config: Config, path: str) -> Config:
    """The configuration with another store.path."""
    return config.model_copy(update={"store": config.store.model_copy(update={"path": path})})


def extraction_job(config: Config, inputs: Inputs) -> ExtractionJob:
    """What the store of a configuration is made from."""
    return ExtractionJob(
        source=inputs.source,
        backbone=inputs.backbone,
        data=config.data,
        store=config.store,
        extract=config.extract,
        backbone_config=None if inputs.own_backbone else config.backbone,
    )


def _paths_beside(path: str) -> Iterator[str]:
    """`a/cache-2.zarr`, `a/cache-3.zarr` ... for `a/cache.zarr`."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    stem, dot, ending = name.rpartition(".")
    if not stem:  # a name without an ending, or with a leading dot only
        stem, dot, ending = name, "", ""
    return (f"{folder}{slash}{stem}-{number}{dot}{ending}" for number in count(2))
