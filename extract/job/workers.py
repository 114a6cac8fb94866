"""Describes the workers of a section of the configuration: how many processes, and where they run."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The dask workers that compute the tasks of a job.

    Attributes:
        section: of the configuration that asks for them, `extract` or `train`; messages name its options.
        count: processes on this machine; with a scheduler, workers to wait for before the start.
        scheduler: address of a dask scheduler that is already running; None for workers on this machine.
    """

    section: str
    count: int
    scheduler: str | None

    @property
    def are_needed(self) -> bool:
        """Whether the job uses workers at all; one process is the job itself."""
        return self.count > 1 or self.scheduler is not None

    @property
    def threads(self) -> int | None:
        """Threads of a worker on this machine, an equal share of the cores; None where a scheduler has the workers."""
        return None if self.scheduler else max(1, (os.cpu_count() or 1) // self.count)
