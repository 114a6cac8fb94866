"""Times calls."""

import time
from collections.abc import Callable
from statistics import median

import torch

from extract.forward.device import synchronize

SECONDS = 0.5  # of one measurement; a call that takes longer is measured once


def lap(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a few calls after a warm-up; a first call that is long is enough on a CPU."""
    laps = [_seconds(work, device)]
    if laps[0] > SECONDS and device.type == "cpu":
        return laps[0]
    while sum(laps[1:]) < SECONDS:
        laps.append(_seconds(work, device))
    return median(laps[1:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
