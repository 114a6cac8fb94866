"""Decides how long a worker may take for a task, and whether a task is started again after an error."""

from dataclasses import dataclass
from typing import Literal

RETRIES = 3  # of a task, for any cause
_SLOWEST_FACTOR = 10


@dataclass(frozen=True, kw_only=True)
class RetryRules:
    """How long a worker may take for a task, and which errors are worth another try.

    Attributes:
        setting: name of the option that sets the time limit, for messages.
        seconds: the time limit; `auto` is ten times as long as the slowest task so far.
        least_seconds: minimum of `auto`.
        first_seconds: of `auto`, until a task is finished.
        retry_job_errors: whether a task is started again after a JobError, which may be a fault of its machine.
    """

    setting: str
    seconds: float | Literal["auto"]
    least_seconds: float
    first_seconds: float
    retry_job_errors: bool

    def limit(self, slowest: float) -> float:
        """Seconds that a worker may take for a task; `slowest` is 0 until one is finished."""
        if self.seconds != "auto":
            return self.seconds
        return max(self.least_seconds, _SLOWEST_FACTOR * slowest) if slowest else self.first_seconds
