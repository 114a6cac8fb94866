"""Trains a batch of trials as a unit, in this process or in a worker, which opens the features of the job itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapt.config.pipeline import Config
from adapt.job.feature_set import FeatureSet, Log, open_features
from adapt.job.inputs import Inputs
from adapt.job.trial_batch import TrialBatch, run_batch
from adapt.report.fingerprint import digest
from adapt.training.callbacks import Callback
from adapt.training.scores import Score
from extract.backbones.backbone import Backbone
from extract.forward.device import resolve_device, resolve_precision
from extract.sources.open_source import ImageSource

# Features by the digest of their configuration: in a worker those of its last unit, in a job's own process its own.
_opened: dict[str, FeatureSet] = {}


@dataclass(frozen=True, kw_only=True)
class BatchUnit:
    """A batch of trials, to be trained anywhere.

    Args:
        batch: the trials.
        own_source: samples of the user, instead of `data:`.
        own_backbone: module of the user, instead of `backbone:`.
        callbacks: follow the training; in this process only.
    """

    batch: TrialBatch
    own_source: ImageSource | None = None
    own_backbone: Backbone | None = None
    callbacks: Sequence[Callback] = ()

    @property
    def name(self) -> str:
        """The methods and seeds, for messages."""
        return self.batch.name

    def run(self, log: Log, device: str) -> list[Score]:
        """Train the batch; see `adapt.job.trial_batch.run_batch`.

        Args:
            log: is called with lines for the user.
            device: to train on, instead of `train.device`.
        """
        config = self.batch.config
        here = config.model_copy(update={"train": config.train.model_copy(update={"device": device})})
        if _key(here) not in _opened:
            _opened.clear()
            _opened[_key(here)] = open_features(here, Inputs(here, self.own_source, self.own_backbone), log)
        return run_batch(self.batch, _opened[_key(here)], self.callbacks)


@dataclass(frozen=True)
class ResolvePrecision:
    """Asks where trials are trained for the precision that `auto` means there.

    Args:
        precision: of the configuration.
    """

    precision: str
    name: str = "precision"

    def run(self, log: Log, device: str) -> str:
        """The precision of training on this device."""
        return resolve_precision(self.precision, resolve_device(device))


@contextmanager
def opened_for_units(config: Config, features: FeatureSet) -> Iterator[None]:
    """Let the units of this process use features that are open already, until the block ends."""
    _opened[_key(config)] = features
    try:
        yield
    finally:
        _opened.pop(_key(config), None)  # a resident training split may take much of the memory


def _key(config: Config) -> str:
    return digest(config.model_dump(mode="json"))
