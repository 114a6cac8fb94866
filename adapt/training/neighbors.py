"""Gives nearest-neighbor models their samples."""

import time
from collections.abc import Sequence
from typing import Any

from torch.nn import functional as F

from adapt.training.candidate import Candidate
from adapt.training.linear_solver import ProbeData, judge_head, readout_of, require_finite
from adapt.training.objective import Objective


def take_neighbors(candidates: Sequence[Candidate], data: ProbeData, objective: Objective, description: str) -> float:
    """Give every candidate the training rows, which all share.

    Args:
        candidates: of `knn`, with the same layers and pooling.
        data: the rows, and those that the candidates are evaluated on.
        objective: its loss ranks the candidates where scores are equal.
        description: not shown, since nothing is trained.

    Returns:
        seconds a candidate.

    Raises:
        JobError: a feature is not finite.
    """
    require_finite(data.features)
    started, readout = time.perf_counter(), readout_of(candidates[0])
    samples = F.normalize(readout.standardized(data.features), dim=1)
    classes = readout.head.out_features
    labels = data.labels if objective.multi_label else F.one_hot(data.labels, classes)
    for candidate in candidates:
        head: Any = readout_of(candidate).head
        head.fill(samples, labels.to(samples.dtype), objective.multi_label)
        candidate.keep(judge_head(candidate, data, objective), 1)
    return (time.perf_counter() - started) / len(candidates)
