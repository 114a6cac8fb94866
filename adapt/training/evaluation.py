"""Computes logits of several candidates in one pass over the rows of a split."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapt.training.batch_order import Rows
from adapt.training.batches import Batches, as_model_input, select
from adapt.training.candidate import Candidate, union_of_layers
from adapt.training.metrics import average_views
from adapt.training.seed_rows import mask_of
from adapt.training.stacks import grouped, predict_group
from extract.forward.device import synchronize
from store.layout import in_groups

Compute = Callable[[Sequence[Candidate], Any, torch.device, str], Iterable[Tensor]]


@torch.no_grad()
def predict_logits(
    candidates: Sequence[Candidate],
    inputs: Batches,
    split: str,
    rows: Sequence[Rows],
    precision: str = "float32",
    compute: Compute | None = None,
) -> list[Float[Tensor, "rows outputs"]]:
    """Logits of every candidate on its rows, on the CPU, (0, 0) for no rows; each row is read once for all of them.

    Args:
        candidates: the models.
        inputs: features or images.
        split: name of the split.
        rows: the rows of every candidate, ascending.
        precision: of autocast.
        compute: what is computed of candidates that are stacked; None: their logits.
    """
    logits: list[list[Tensor]] = [[] for _ in candidates]
    for candidate in candidates:
        candidate.model.to(inputs.device).eval()
    layers, n_rows = union_of_layers(candidates), len(inputs.labels(split))
    by_rows: dict[int, list[list[int]]] = {}  # the candidates of a seed have the same array
    for group in grouped(candidates):
        by_rows.setdefault(id(rows[group[0]]), []).append(group)
    seeds = [(mask_of(rows[groups[0][0]], n_rows), groups) for groups in by_rows.values()]
    read = in_groups(np.unique(np.concatenate(rows)), inputs.samples_at_once(layers))
    for part, read_values in inputs.batches(split, read, layers):
        values = as_model_input(read_values)
        for mask, groups in seeds:
            index = np.flatnonzero(mask[part])
            if not len(index):
                continue
            own = select(values, index, len(part))
            for group in groups:
                predicted = (compute or predict_group)([candidates[k] for k in group], own, inputs.device, precision)
                for k, of_candidate in zip(group, predicted, strict=True):
                    logits[k].append(of_candidate.to("cpu", non_blocking=True))
    synchronize(inputs.device)  # the copies are asynchronous
    return [torch.cat(parts) if parts else torch.empty(0, 0) for parts in logits]


def predict_split(
    candidates: Sequence[Candidate], inputs: Batches, split: str, precision: str = "float32"
) -> list[Float[Tensor, "samples classes"]]:
    """Logits of every candidate on a whole split; those of the views of a sample are averaged."""
    rows = np.arange(len(inputs.labels(split)))
    logits = predict_logits(candidates, inputs, split, [rows] * len(candidates), precision=precision)
    return [average_views(of_candidate, inputs.views) for of_candidate in logits]
