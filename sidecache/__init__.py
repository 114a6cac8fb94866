"""sidecache: run a frozen vision transformer once, keep its per-layer tokens, then train adaptors in seconds.

The public names for `import sidecache as sc`. They are loaded when first used, so that `sidecache --help` does not wait
for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapt.across_runs.runs import results
    from adapt.adaptor import Adaptor, load_adaptor
    from adapt.config.load_config import load_config
    from adapt.config.pipeline import Config
    from adapt.config.study import Study, load_study
    from adapt.create import create_model
    from adapt.job.extraction import OnChanged
    from adapt.methods.from_features.linear_probe import LinearProbe, LinearProbeOptions
    from adapt.methods.from_features.losa import LoSA, LoSAOptions
    from adapt.methods.in_backbone.merge import merge, unmerge
    from adapt.run_dir.predictions import Predictions, read_predictions
    from adapt.run_dir.results import Row
    from adapt.study.results import StudyResult
    from extract.backbones.backbone import Backbone, TappedBackbone
    from extract.job.extraction import Extraction
    from extract.sources.open_source import ImageSource
    from extract.sources.user_datasets import from_datasets
    from sidecache.studies import run_study
    from store.errors import JobError, UserError
    from store.reader import Store, open_store

__version__ = "0.1.0"

_MODULES = {
    "Adaptor": "adapt.adaptor",
    "Config": "adapt.config.pipeline",
    "JobError": "store.errors",
    "LinearProbe": "adapt.methods.from_features.linear_probe",
    "LinearProbeOptions": "adapt.methods.from_features.linear_probe",
    "LoSA": "adapt.methods.from_features.losa",
    "LoSAOptions": "adapt.methods.from_features.losa",
    "Predictions": "adapt.run_dir.predictions",
    "Store": "store.reader",
    "Study": "adapt.config.study",
    "StudyResult": "adapt.study.results",
    "TappedBackbone": "extract.backbones.backbone",
    "UserError": "store.errors",
    "create_model": "adapt.create",
    "from_datasets": "extract.sources.user_datasets",
    "load_adaptor": "adapt.adaptor",
    "load_config": "adapt.config.load_config",
    "load_study": "adapt.config.study",
    "main": "sidecache.entry_point",
    "merge": "adapt.methods.in_backbone.merge",
    "open_store": "store.reader",
    "read_predictions": "adapt.run_dir.predictions",
    "results": "adapt.across_runs.runs",
    "run_study": "sidecache.studies",
    "unmerge": "adapt.methods.in_backbone.merge",
}
__all__ = [
    "Adaptor",
    "Config",
    "JobError",
    "LinearProbe",
    "LinearProbeOptions",
    "LoSA",
    "LoSAOptions",
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
    "load_config",
    "load_study",
    "merge",
    "open_store",
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
    check_main_script(config)
    from adapt.job.extraction import extract as extract_to_store
    from adapt.job.inputs import Inputs
    from extract.forward.device import configure_process

    configure_process()
    return extract_to_store(config, Inputs(config, source, backbone), on_changed)


def train(config: "Config", source: "ImageSource | None" = None, backbone: "Backbone | None" = None) -> "list[Row]":
    """Train every method of a configuration from every seed; write results.json, results.csv and report.html.

    Arguments and errors are those of `extract`.

    Returns:
        a row for every trained trial, those of earlier calls included.
    """
    from adapt.job.inputs import Inputs
    from adapt.training.distributed import own_run_dir
    from extract.forward.device import configure_process
    from sidecache.steps import train_and_report

    configure_process()
    with own_run_dir(config.run_dir) as run_dir:
        own_config = config.model_copy(update={"run_dir": run_dir})
        return train_and_report(own_config, Inputs(own_config, source, backbone))


def run(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    on_changed: "OnChanged" = "fail",
) -> "list[Row]":
    """Run the whole job: `extract` what the store lacks, `train` what is not trained yet, write results and report.

    Arguments and errors are those of `extract`, the returned rows those of `train`.
    """
    if config.train.feature_source != "online":
        check_main_script(config)
    from adapt.job.checks import require_trainable
    from adapt.job.inputs import Inputs
    from adapt.training.distributed import own_run_dir
    from extract.forward.device import configure_process
    from sidecache.steps import extract_first, train_and_report

    configure_process()
    require_trainable(config, backbone)  # before the extraction spends hours
    with own_run_dir(config.run_dir) as run_dir:
        own_config = config.model_copy(update={"run_dir": run_dir})
        own_config, inputs = extract_first(own_config, Inputs(own_config, source, backbone), on_changed)
        return train_and_report(own_config, inputs)


def check_main_script(config: "Config") -> None:
    """Refuse a script without main guard if processes will be started, which import it. Done before torch is loaded."""
    if config.extract.workers > 1 and not config.extract.scheduler:
        from extract.job.main_guard import require_main_guard

        require_main_guard()
