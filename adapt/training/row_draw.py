"""Draws the rows of the training split to train on and to validate on; both are row numbers, never a stored split.

The draw may be limited to some samples of each class, or to a share of them: this subset is then the whole budget of
labels, and validation takes its samples from it. A source's own validation split is used whole instead.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from adapt.config.pipeline import Config
from adapt.training.batch_order import Rows
from store.errors import Note, UserError

Samples = Rows  # numbers of samples, each of which has one or several rows


@dataclass(frozen=True, kw_only=True)
class RowDraw:
    """The settings that determine, with a seed, which rows are trained on and which are for validation.

    Attributes:
        val_fraction: share of the samples that validation takes; None: it has the source's own validation split.
        shots: samples of each class that are used; None for all.
        fraction: share of each class's samples that is used; None for all.
        refit: whether validation rows are trained on too; the last epoch then counts.
    """

    val_fraction: float | None
    shots: int | None = None
    fraction: float | None = None
    refit: bool = False

    @classmethod
    def of(cls, config: Config, for_search: bool = False) -> "RowDraw":
        """The settings of a configuration; a search always keeps rows for validation."""
        return cls(
            refit=config.train.refit and not for_search,
            val_fraction=None if config.data.val_split is not None else config.data.val_fraction,
            shots=config.train.shots,
            fraction=None if config.train.fraction == 1.0 else config.train.fraction,
        )

    @property
    def conditions(self) -> dict[str, Any]:
        """The settings by name; all but `val_fraction` only where they are set."""
        subset = {"shots": self.shots, "fraction": self.fraction, "refit": self.refit}
        return {"val_fraction": self.val_fraction} | {name: value for name, value in subset.items() if value}

    def size(self, n_samples: int) -> int:
        """How many of a class's samples are used; at least one."""
        if self.shots is not None:
            return min(self.shots, n_samples)
        return n_samples if self.fraction is None else max(1, round(self.fraction * n_samples))

    def validation_size(self, n_samples: int) -> int:
        """How many of the used samples of a class are for validation; with `shots`, at least one if any remains."""
        assert self.val_fraction is not None
        wanted = round(self.val_fraction * n_samples)
        return wanted if self.shots is None else min(max(1, wanted), n_samples - 1)


def draw_rows(
    labels: Shaped[Tensor, "rows ..."],
    draw: RowDraw,
    *,
    seed: int,
    views: int = 1,
    validation_rows: Rows | None = None,
) -> tuple[Rows, Rows]:
    """Draw the rows to train on and the rows to validate on.

    A single-label split is stratified: every class gives the same share, or the same number of samples. The `views`
    consecutive rows of a sample stay together, so that validation never sees a video that is trained on.

    Args:
        labels: labels of all rows of the training split.
        draw: what is drawn.
        seed: seed of the draw.
        views: consecutive rows that show the same sample.
        validation_rows: the source's own validation split, then used for every seed; the rest is trained on.

    Returns:
        (training rows, validation rows), both ascending; all other rows are unused.

    Raises:
        UserError: there are too few samples for both parts, or the draw does not fit the labels.
    """
    values, generator = labels.numpy()[::views], np.random.default_rng(seed)
    own = None if validation_rows is None else validation_rows[::views] // views
    _check_draw(draw, values.ndim == 2, own)
    # draw the subset of every class, the whole class if all samples are used
    candidates = np.setdiff1d(np.arange(len(values)), () if own is None else own)
    used = [_sample(generator, group, draw.size(len(group))) for group in _by_class(values, candidates)]
    # draw validation from within the subset
    validation = own
    if validation is None:
        drawn = [generator.permutation(group)[: draw.validation_size(len(group))] for group in used]
        validation = np.sort(np.concatenate(drawn))
    training = np.setdiff1d(np.concatenate(used), validation)
    _require_both(draw, training, validation, sizes=[len(group) for group in used])
    return _rows_of(training, views), _rows_of(validation, views)


def warn_of_small_classes(
    labels: Shaped[Tensor, "rows ..."],
    draw: RowDraw,
    classes: Sequence[str],
    *,
    views: int = 1,
    validation_rows: Rows | None = None,
) -> None:
    """Warn of classes with fewer samples than `draw.shots`, of which all are used; arguments as of `draw_rows`.

    Args:
        classes: class names; a label is an index into them.
    """
    if draw.shots is None or labels.ndim == 2:
        return
    is_training = np.ones(len(labels), bool)
    if validation_rows is not None:
        is_training[validation_rows] = False
    counts = np.bincount(labels.numpy()[is_training], minlength=len(classes)) // views
    small = [f"{name} ({n})" for name, n in zip(classes, counts.tolist(), strict=True) if 0 < n < draw.shots]
    if small:
        warnings.warn(
            f"train.shots is {draw.shots}, but there are fewer training samples of {', '.join(small[:5])}"
            f"{', ...' if len(small) > 5 else ''}; all of them are used",
            Note,
            stacklevel=2,
        )


def _check_draw(draw: RowDraw, is_multi_label: bool, own_validation: Samples | None) -> None:
    if draw.val_fraction is None and own_validation is None:
        raise UserError("data.val_split is set, but these samples have no validation split of their own; remove it")
    if draw.shots is not None and is_multi_label:
        raise UserError(
            "train.shots counts the samples of each class, but these samples have several labels; use train.fraction"
        )
    if draw.shots == 1 and own_validation is None:
        raise UserError(
            "train.shots is 1, which leaves no sample of a class to validate on; use at least 2, or data.val_split"
        )


def _by_class(values: Shaped[np.ndarray, "samples ..."], candidates: Samples) -> list[Samples]:
    """The candidates of every class; all of them together if they are multi-label, or if there are none."""
    if values.ndim == 2 or not len(candidates):
        return [candidates]
    return [candidates[values[candidates] == k] for k in np.unique(values[candidates])]


def _sample(generator: np.random.Generator, group: Samples, size: int) -> Samples:
    """Some samples of a group, ascending; nothing is drawn if these are all."""
    return group if size == len(group) else np.sort(generator.permutation(group)[:size])


def _require_both(draw: RowDraw, training: Samples, validation: Samples, sizes: Sequence[int]) -> None:
    """Refuse a draw without training samples or without validation samples; `sizes` are those of the classes."""
    if len(training) and len(validation):
        return
    left = f"{len(training)} to train on and {len(validation)} to validate on; both must be at least 1"
    if draw.val_fraction is None:
        raise UserError(f"data.val_split leaves {left}")
    n_used = len(training) + len(validation)
    raise UserError(
        f"data.val_fraction {draw.val_fraction} of {n_used} training samples leaves {left}{_remedy(draw, sizes)}"
    )


def _remedy(draw: RowDraw, sizes: Sequence[int]) -> str:
    """The nearest share that works, if there is one."""
    assert draw.val_fraction is not None
    given = draw.val_fraction
    for fraction in sorted((k / 20 for k in range(1, 20)), key=lambda fraction: abs(fraction - given)):
        n_held = sum(replace(draw, val_fraction=fraction).validation_size(size) for size in sizes)
        if 0 < n_held < sum(sizes):
            return f"; {fraction:g} leaves {sum(sizes) - n_held} and {n_held}"
    return "; add training samples"


def _rows_of(samples: Samples, views: int) -> Rows:
    """The rows of all views of some samples."""
    rows: Rows = (samples[:, None] * views + np.arange(views)).ravel()
    return rows
