"""Shows how far the training of a whole job is."""

from collections.abc import Iterator
from contextlib import contextmanager

from adapt.config.pipeline import Config
from adapt.job.trial_count import trials_of
from adapt.run_dir.results import Row
from adapt.training.callbacks import EpochEvent
from store.console.progress import Advance, progress


class JobProgress:
    """A callback that counts the epochs of all trials of a job; solved methods have none.

    Args:
        advance: shows them.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_epoch(self, event: EpochEvent) -> None:
        """Count an epoch of a trial."""
        self._advance(1)

    def on_trial(self, row: Row) -> None:
        """Nothing: its epochs are counted already."""


@contextmanager
def job_progress(config: Config) -> Iterator[JobProgress]:
    """Show the epochs of a job's trials until the block ends, above the passes that train them.

    Epochs that were trained before, or that a search leaves out, are not known in advance, so that the end may come
    earlier than it is shown.
    """
    total = sum(trials.epochs for trials in trials_of(config) if trials.in_steps or trials.end_to_end)
    with progress("whole job", round(total), "epochs") as advance:
        yield JobProgress(advance)
