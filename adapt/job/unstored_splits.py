"""Opens the splits that a job's store lacks, before the training that reads them at its end."""

from collections.abc import Callable, Sequence

from adapt.config.pipeline import Config
from adapt.features.unstored import UnstoredSplits
from adapt.job.extraction import extraction_job
from adapt.job.inputs import Inputs
from adapt.training.distributed import world
from extract.job.extraction_job import ExtractionJob
from extract.job.store_schema import list_split, schema_of
from store.compare import refuse_difference, require_same
from store.config import SPLITS
from store.errors import UserError
from store.reader import Store
from store.schema import Schema


def open_unstored(config: Config, inputs: Inputs, store: Store, log: Callable[[str], None]) -> UnstoredSplits | None:
    """The splits that a store lacks; None if it has all of them.

    Args:
        config: the configuration, which the store matches as far as it tells.
        inputs: samples and backbone, which are opened for splits that are not stored.
        store: the store.
        log: is called with what will be read at the end.

    Raises:
        UserError: samples or weights are gone, or are not those that the store was made from.
    """
    missing = [split for split in SPLITS if split not in store.splits]
    if not missing:
        return None
    try:
        job = _job(config, inputs, store)
    except UserError as error:
        raise UserError(
            f"the store {store.url} lacks the split {', '.join(missing)}, so that training needs its samples and the "
            f"backbone: {error}"
        ) from error
    here = world()
    whole = here.broadcast(_completed(store, job, missing).model_dump(mode="json") if here.is_main_process else None)
    schema = Schema.parse(whole, store.url)
    for split in missing:
        n_rows = schema.splits[split].num_samples
        log(f"{split} is not stored: its {n_rows:,} samples go through the backbone once, after the training")
    return UnstoredSplits(job, schema, store.rms)


def _job(config: Config, inputs: Inputs, store: Store) -> ExtractionJob:
    """The job that would complete the store, on the device of the training."""
    here = {"device": config.train.device, "precision": store.schema.provenance.precision}
    return extraction_job(config.model_copy(update={"extract": config.extract.model_copy(update=here)}), inputs)


def _completed(store: Store, job: ExtractionJob, splits: Sequence[str]) -> Schema:
    """The schema of the store with splits that it lacks; every file of their samples is read."""
    stored = store.schema
    refuse_difference({"classes": (stored.classes, job.source.classes)}, store.url)
    wanted = schema_of(job, {split: list_split(split, job.source.splits[split]) for split in splits})
    job.backbone.module.to("cpu")  # training has the GPU to itself until the splits are read
    require_same(stored, wanted, store.url)
    samples = stored.provenance.samples | wanted.provenance.samples
    provenance = stored.provenance.model_copy(update={"samples": samples})
    return stored.model_copy(update={"splits": stored.splits | wanted.splits, "provenance": provenance})
