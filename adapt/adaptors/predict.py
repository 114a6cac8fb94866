"""Classifies images and videos; adaptors of one backbone share its forward pass."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapt.adaptors.items import GivenItems, Items, read_items
from adapt.adaptors.prediction import Prediction
from adapt.adaptors.trained import TrainedAdaptor, require_same_backbone, shared_logits
from adapt.training.metrics import average_views
from extract.images.decode import without_remedy
from extract.sources.open_source import SampleSplit
from extract.sources.videos import expand_views
from store.console.progress import progress
from store.errors import JobError, UserError
from store.layout import in_groups

OnError = Literal["fail", "skip"]
_AHEAD = 1  # batches that a GPU computes while the logits of an earlier one are copied


def predict(
    adaptors: Sequence[TrainedAdaptor], items: Items, top: int | None = None, on_error: OnError = "fail"
) -> list[list[Prediction]]:
    """Classify images, or videos by the mean logits of their views if the adaptors were trained on clips.

    Files are decoded as an extraction decodes them. Adaptors that read tokens share one forward pass of the backbone;
    those that train inside it have a pass of their own, and share the decoded images.

    Args:
        adaptors: of one backbone.
        items: paths, PIL images and arrays (height, width, 3) of uint8 in any mix, or a single one.
        top: how many of the most probable classes are kept; all by default.
        on_error: whether a file that cannot be read ends everything, or gets a prediction that names the error.

    Returns:
        for every adaptor, the predictions in the order of the items.

    Raises:
        UserError: the adaptors have different backbones, an item is no image, or a file cannot be read.
        JobError: an output is not finite.
    """
    if top is not None and top < 1:
        raise UserError(f"top is {top}; give a number of classes, 1 or more")
    if not adaptors:
        raise UserError("there is no adaptor to predict with; give at least one")
    require_same_backbone([adaptor.name for adaptor in adaptors], [adaptor.card for adaptor in adaptors])
    answers = compute_answers(adaptors, read_items(items, adaptors[0].card.clips), on_error)
    return [
        list(_predictions(adaptor, answers, logits, top))
        for adaptor, logits in zip(adaptors, answers.logits, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The logits of all adaptors.

    Attributes:
        names: of all items.
        logits: those of each adaptor, on the CPU; the rows of `failed` have no meaning.
        failed: position of an item -> why it cannot be read.
    """

    names: tuple[str, ...]
    logits: list[Float[Tensor, "items classes"]]
    failed: dict[int, str]


def compute_answers(adaptors: Sequence[TrainedAdaptor], items: GivenItems, on_error: OnError = "fail") -> Answers:
    """Logits of all items; those of the views of a video are averaged. Raises what `predict` raises."""
    positions, failed = list(items.samples), dict(items.failed)
    _refuse(failed, on_error)
    views = expand_views(list(items.samples.values()), items.views)
    split = SampleSplit(views, np.zeros(len(views), np.int64))
    by_row = [torch.zeros(len(views), len(adaptor.card.classes)) for adaptor in adaptors]
    for rows, logits, undecodable in _run(adaptors, split, "images" if items.views == 1 else "views"):
        newly_failed = {positions[row // items.views]: without_remedy(why) for row, why in undecodable.items()}
        _refuse(newly_failed, on_error)
        failed |= newly_failed
        if rows:
            for whole, part in zip(by_row, logits, strict=True):
                whole[rows] = part
    found = [torch.zeros(len(items.names), whole.shape[1]) for whole in by_row]
    for of_items, whole in zip(found, by_row, strict=True):
        of_items[positions] = average_views(whole, items.views)
    return Answers(names=items.names, logits=found, failed=failed)


_Batch = tuple[list[int], list[Tensor], dict[int, str]]  # rows, their logits by adaptor, row -> why it failed


def _run(adaptors: Sequence[TrainedAdaptor], split: SampleSplit, unit: str) -> Iterator[_Batch]:
    """Decode and classify all rows in batches, in order."""
    forward, pending = adaptors[0].forward, deque[_Batch]()
    groups = in_groups(range(len(split)), forward.batch_size(len(split)))
    with progress("predicting", len(split), unit) as advance:
        for batch in forward.batches(split, groups):
            if batch.images is None:
                pending.append(([], [], batch.failed))
            else:
                pending.append((list(batch.rows), shared_logits(adaptors, batch.images), batch.failed))
            while len(pending) > _AHEAD:
                yield _to_host(pending.popleft())
            advance(len(batch.rows) + len(batch.failed))
        while pending:
            yield _to_host(pending.popleft())


def _to_host(batch: _Batch) -> _Batch:
    rows, logits, failed = batch
    return rows, [part.cpu() for part in logits], failed


def _refuse(failed: dict[int, str], on_error: OnError) -> None:
    if failed and on_error == "fail":
        raise UserError(
            f"{failed[min(failed)]}. Repair or leave it out, or go on without such files: --on-error skip, from Python "
            'on_error="skip"'
        )


def _predictions(
    adaptor: TrainedAdaptor, answers: Answers, logits: Float[Tensor, "items classes"], top: int | None
) -> Iterator[Prediction]:
    for position, (name, probabilities) in enumerate(zip(answers.names, adaptor.classify(logits), strict=True)):
        if error := answers.failed.get(position):
            yield Prediction(name=name, adaptor=adaptor.name, error=error)
            continue
        if not probabilities.isfinite().all():
            raise JobError(f"{name}: the output of {adaptor.name} is not finite; check the weights of its backbone")
        classes = adaptor.card.classes
        yield Prediction.of(name, adaptor.name, classes=classes, probabilities=probabilities, top=top)
