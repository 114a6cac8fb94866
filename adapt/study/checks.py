"""Finds the parts of a study that cannot start, before the first of the others does."""

from collections.abc import Callable

from adapt.config.pipeline import Config
from adapt.failures import explain_failure
from adapt.job.checks import require_trainable, require_weights
from extract.sources.open_source import open_source


class StartChecks:
    """Checks of the parts of a study; the samples of a data set are listed once for all its parts."""

    def __init__(self) -> None:
        self._listed: dict[str, str | None] = {}

    def methods(self, config: Config) -> str | None:
        """Why the methods cannot be trained on the backbone; None if they can."""
        return failure_of(lambda: require_trainable(config))

    def inputs(self, config: Config) -> str | None:
        """Why there are no weights or no samples; None if there are."""
        key = config.data.model_dump_json()
        if key not in self._listed:
            self._listed[key] = failure_of(lambda: open_source(config.data))
        return failure_of(lambda: require_weights(config.backbone)) or self._listed[key]


def failure_of(work: Callable[[], object]) -> str | None:
    """Do some work; return why it failed, or None if it succeeded.

    An interrupt, a closed standard output and a defect of this program are raised.
    """
    try:
        work()
    except BrokenPipeError:
        raise
    except Exception as error:
        reason = explain_failure(error)
        if reason is None:
            raise
        return reason
    return None
