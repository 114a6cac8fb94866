"""sidecache: run a frozen vision transformer once, keep its per-layer tokens, then train adaptors in seconds.

The public names for `import sidecache as sc`. They are loaded when first used, so that `sidecache --help` does not wait
for torch.
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapt.across_runs.runs import results
    from adapt.adaptors.adaptor import Adaptor
    from adapt.adaptors.files import load_adaptor, load_adaptors
    from adapt.adaptors.predict import predict
    from adapt.adaptors.prediction import Prediction
    from adapt.config.load_config import load_config
    from adapt.config.pipeline import Config, TrainConfig
    from adapt.config.study import Study, load_study
    from adapt.create import create_model
    from adapt.job.extraction import OnChanged
    from adapt.methods.from_features.linear_probe import LinearProbe, LinearProbeOptions
    from adapt.methods.from_features.losa import LoSA, LoSAOptions
    from adapt.methods.in_backbone.merge import merge, unmerge
    from adapt.run_dir.predictions import Predictions, read_predictions
    from adapt.run_dir.results import Row
    from adapt.study.results import StudyResult
    from adapt.training.callbacks import Callback, EpochEvent
    from extract.backbones.backbone import Backbone, TappedBackbone
    from extract.config import ExtractConfig
    from extract.job.extraction import Extraction
    from extract.sources.open_source import ImageSource
    from extract.sources.user_datasets import from_datasets
    from sidecache.studies import run_study
    from store.errors import JobError, UserError
    from store.reader import Store, open_store

__version__ = "0.1.0"

_MODULES = {
    "Adaptor": "adapt.adaptors.adaptor",
    "Callback": "adapt.training.callbacks",
    "Config": "adapt.config.pipeline",
    "EpochEvent": "adapt.training.callbacks",
    "JobError": "store.errors",
    "LinearProbe": "adapt.methods.from_features.linear_probe",
    "LinearProbeOptions": "adapt.methods.from_features.linear_probe",
    "LoSA": "adapt.methods.from_features.losa",
    "LoSAOptions": "adapt.methods.from_features.losa",
    "Prediction": "adapt.adaptors.prediction",
    "Predictions": "adapt.run_dir.predictions",
    "Store": "store.reader",
    "Study": "adapt.config.study",
    "StudyResult": "adapt.study.results",
    "TappedBackbone": "extract.backbones.backbone",
    "UserError": "store.errors",
    "create_model": "adapt.create",
    "from_datasets": "extract.sources.user_datasets",
    "load_adaptor": "adapt.adaptors.files",
    "load_adaptors": "adapt.adaptors.files",
    "load_config": "adapt.config.load_config",
    "load_study": "adapt.config.study",
    "main": "sidecache.entry_point",
    "merge": "adapt.methods.in_backbone.merge",
    "open_store": "store.reader",
    "predict": "adapt.adaptors.predict",
    "read_predictions": "adapt.run_dir.predictions",
    "results": "adapt.across_runs.runs",
    "run_study": "sidecache.studies",
    "unmerge": "adapt.methods.in_backbone.merge",
}
__all__ = [
    "Adaptor",
    "Callback",
    "Config",
    "EpochEvent",
    "JobError",
    "LinearProbe",
    "LinearProbeOptions",
    "LoSA",
    "LoSAOptions",
    "Prediction",
    "Predictions",
    "Store",
    "Study",
    "StudyResult",
    "TappedBackbone",
    "UserError",
    "create_model",
    "extract",
    "from_datasets",
    "load_adaptor",
    "load_adaptors",
    "load_config",
    "load_study",
    "merge",
    "open_store",
    "predict",
    "read_predictions",
    "results",
    "run",
    "run_study",
    "train",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sidecache' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def extract(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    on_changed: "OnChanged" = "fail",
) -> "Extraction":
    """Extract what the token store of a configuration lacks; a complete store is left as it is.

    Args:
        config: from `load_config`.
        source: your own samples instead of `data:`; see `from_datasets`.
        backbone: your own frozen module instead of `backbone:`; see `TappedBackbone`.
        on_changed: what to do if stored samples are gone or changed: `fail`, or extract to a `new-store` beside it.

    Returns:
        the open store (`.store`), its path (`.path`), and what this call wrote.

    Raises:
        UserError: the store was made from something else, or a sample cannot be decoded.
        JobError: a value cannot be stored, or a file cannot be written.
    """
    check_main_script(extract=config.extract)
    from adapt.job.extraction import extract as extract_to_store
    from adapt.job.inputs import Inputs
    from adapt.planning.preset_choice import resolve_preset
    from extract.forward.device import configure_process
    from sidecache.messages import log

    configure_process()
    inputs = Inputs(config, source, backbone)
    return extract_to_store(resolve_preset(config, inputs, log), inputs, on_changed)


def train(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    callbacks: "Sequence[Callback]" = (),
) -> "list[Row]":
    """Train every method of a configuration from every seed; write results.json, results.csv and report.html.

    Arguments and errors are those of `extract`, except:

    Args:
        callbacks: are called after every epoch and every trial; see `adapt.training.callbacks` and docs/search.md.

    Returns:
        a row for every trained trial, those of earlier calls included.
    """
    check_main_script(train=config.train)
    from adapt.job.executor import open_executor
    from extract.forward.device import configure_process
    from sidecache.messages import log
    from sidecache.steps import OwnParts, train_job

    configure_process()
    with open_executor(config.train, log) as executor:
        return train_job(config, executor, OwnParts(source=source, backbone=backbone, callbacks=callbacks))


def run(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    on_changed: "OnChanged" = "fail",
    callbacks: "Sequence[Callback]" = (),
) -> "list[Row]":
    """Run the whole job: `extract` what the store lacks, `train` what is not trained yet, write results and report.

    Arguments and errors are those of `extract` and `train`, the returned rows those of `train`.
    """
    if config.train.feature_source == "online":
        check_main_script(train=config.train)
    else:
        check_main_script(extract=config.extract, train=config.train)
    from adapt.job.executor import open_executor
    from extract.forward.device import configure_process
    from sidecache.messages import log
    from sidecache.steps import OwnParts, run_job

    configure_process()
    own = OwnParts(source=source, backbone=backbone, callbacks=callbacks)
    with open_executor(config.train, log) as executor:
        return run_job(config, executor, own, on_changed)


def check_main_script(**sections: "ExtractConfig | TrainConfig") -> None:
    """Refuse a script without main guard if processes will be started, which import it. Done before torch is loaded."""
    started = [name for name, section in sections.items() if section.workers > 1 and not section.scheduler]
    if started:
        from extract.job.main_guard import require_main_guard

        require_main_guard(f"{started[0]}.workers")
