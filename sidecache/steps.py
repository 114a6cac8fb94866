"""The steps of a job that the public functions and the commands share: extract, train, report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from adapt.config.pipeline import Config
from adapt.job.checks import require_trainable
from adapt.job.executor import Executor
from adapt.job.extraction import OnChanged, at_store, extract
from adapt.job.inputs import Inputs
from adapt.job.training_job import train
from adapt.methods.registry import find_method
from adapt.planning.preset_choice import require_preset, resolve_preset
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.report.table import print_table
from adapt.run_dir.config_file import configured_methods, read_config
from adapt.run_dir.results import Row, read_results
from adapt.training.callbacks import Callback
from adapt.training.distributed import own_run_dir, world
from extract.backbones.backbone import Backbone
from extract.job.extraction import Extraction
from extract.sources.open_source import ImageSource
from sidecache.messages import log
from store.console.terminal import Terminal
from store.errors import UserError

_EXTRACTING = Lock()  # the parts of a study are extracted one after the other, also where they are trained in parallel


@dataclass(frozen=True, kw_only=True)
class OwnParts:
    """What a caller from Python gives in place of sections of the configuration, or beside it.

    Args:
        source: samples, instead of `data:`.
        backbone: module, instead of `backbone:`.
        callbacks: follow the training.
    """

    source: ImageSource | None = None
    backbone: Backbone | None = None
    callbacks: Sequence[Callback] = ()


def run_job(
    config: Config, executor: Executor, own: OwnParts = OwnParts(), on_changed: OnChanged = "fail"
) -> list[Row]:
    """Extract, train and report; see `sidecache.run`."""
    _require_callable(config, own)
    require_trainable(config, own.backbone)  # before the extraction spends hours
    with own_run_dir(config.run_dir) as run_dir:
        own_config = config.model_copy(update={"run_dir": run_dir})
        with _EXTRACTING:
            inputs = Inputs(own_config, own.source, own.backbone)
            own_config = resolve_preset(own_config, inputs, log)
            require_trainable(own_config, own.backbone)  # a pilot that ran for other methods may have chosen
            own_config, inputs = extract_first(own_config, inputs, on_changed)
        return train_and_report(own_config, inputs, executor, own.callbacks)


def train_job(config: Config, executor: Executor, own: OwnParts = OwnParts()) -> list[Row]:
    """Train and report; see `sidecache.train`."""
    _require_callable(config, own)
    config = require_preset(config, own.source.name if own.source else "")
    with own_run_dir(config.run_dir) as run_dir:
        own_config = config.model_copy(update={"run_dir": run_dir})
        return train_and_report(own_config, Inputs(own_config, own.source, own.backbone), executor, own.callbacks)


def _require_callable(config: Config, own: OwnParts) -> None:
    if own.callbacks and (config.train.workers > 1 or config.train.scheduler):
        raise UserError(
            "callbacks are called in this process, but train.workers or train.scheduler trains in others; leave both "
            "out, or use train.tensorboard, which works there too"
        )


def extract_first(config: Config, inputs: Inputs, on_changed: OnChanged = "fail") -> tuple[Config, Inputs]:
    """Extract what the store lacks, on rank 0; features that are computed online need no store.

    Returns:
        configuration and inputs for training from the store that was extracted to.
    """
    if config.train.feature_source == "online":
        return config, inputs
    here, path = world(), config.store.path
    if here.is_main_process:
        extraction = extract(config, inputs, on_changed)
        log_extraction(extraction, config)
        path = extraction.path
    extracted = at_store(config, here.broadcast(path))
    # methods that train from features of a store with all splits need neither images nor weights: free their memory
    trains_backbone = any(find_method(method.name).trains_backbone for method in config.parsed_methods())
    if not trains_backbone and "test" in config.store.splits:
        return extracted, Inputs(extracted, inputs.own_source, inputs.own_backbone)
    if extracted.store.path != config.store.path:
        return extracted, inputs.at(extracted)
    return extracted, inputs


def train_and_report(
    config: Config, inputs: Inputs, executor: Executor, callbacks: Sequence[Callback] = ()
) -> list[Row]:
    """Train all methods, and write results and report to the run directory."""
    rows = train(config, inputs, executor, log=log, callbacks=callbacks)
    write_run_report(config.run_dir)
    return rows


def log_extraction(extraction: Extraction, config: Config) -> None:
    """Log what an extraction did."""
    store = extraction.store
    if extraction.path != config.store.path:
        log(
            f"samples have changed: {config.store.path} is left as it is, {extraction.path} takes its place; to train "
            f"from that one later, set store.path={extraction.path}"
        )
    if skipped := sum(len(store.skipped(split)) for split in store.splits):
        log(f"{skipped:,} samples could not be decoded and are left out; `sidecache inspect` lists them")
    if extraction.shards_written:
        retried = f"; {extraction.retries} shards were started again" if extraction.retries else ""
        log(f"extracted {extraction.samples_written:,} samples in {extraction.seconds:.1f} s{retried}")
    else:
        log(f"nothing to extract: {store.url} is complete")


def write_run_report(run_dir: Path) -> None:
    """Write report.html of a run directory."""
    text, title = read_config(run_dir)
    write_report(run_dir, _reported(run_dir), text, title)


def print_results(run_dir: Path) -> None:
    """Print the table of results, on rank 0."""
    if not world().is_main_process:
        return
    print_table(_reported(run_dir).comparisons(), Terminal())
    log(f"results: {run_dir / 'results.json'}, report: {run_dir / 'report.html'}")


def _reported(run_dir: Path) -> ReportedRows:
    return ReportedRows.of_run(run_dir, read_results(run_dir), configured_methods(run_dir))
