"""Watches what a job trains, validates and tests on, by content, and lists every leak between the three.

Rows are known by their tokens: a wrong index, split or label shows wherever it was made.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import adapt.job.trial_batch
import adapt.job.trial_run
import adapt.training.evaluation
import adapt.training.trials
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.image_batches import ImageBatches
from adapt.features.online import OnlineFeatures
from adapt.features.pooled import PooledFeatures
from adapt.training.candidate import Candidate
from adapt.training.linear_solver import ProbeData
from adapt.training.objective import Objective
from adapt.training.row_draw import RowDraw, draw_rows
from adapt.training.seed_part import SeedPart
from adapt.training.stacks import CandidateStack
from extract.sources.open_source import SampleSplit
from store.reader import Store

Row = tuple[str, int]  # a split and a row of it


class SplitReads:
    """Records every read of the test split: tokens, pooled tokens, images and labels.

    Attributes:
        too_early: what was read before a pass is evaluated.
        evaluated: for every pass that was evaluated, the rows that were read, ascending.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.too_early: list[str] = []
        self.evaluated: list[list[int]] = []
        self._now: list[int] | None = None
        record = adapt.job.trial_batch._record
        monkeypatch.setattr(adapt.job.trial_batch, "_record", lambda *args: self._evaluate(record(*args)))
        for features in (StreamedFeatures, ResidentFeatures, OnlineFeatures, ImageBatches):
            self._watch(monkeypatch, features, "labels", lambda _, split: split)
            self._watch(monkeypatch, features, "batches", lambda _, split, *rest, **more: split)
        self._watch(monkeypatch, PooledFeatures, "require", lambda _, split, *rest: split)
        self._watch(
            monkeypatch, Store, "fetch", lambda _, split, rows, *rest: split, lambda _, split, rows, *rest: rows
        )
        self._watch(
            monkeypatch, SampleSplit, "__getitem__", lambda it, row: it.ids[row].split("/")[0], lambda _, k: [k]
        )

    @property
    def is_evaluating(self) -> bool:
        """Whether the test split may be read now."""
        return self._now is not None

    def _evaluate(self, recorded: Iterator[Any]) -> Iterator[Any]:
        rows: list[int] = []
        while True:
            self._now = rows
            try:
                result = next(recorded, None)
            finally:
                self._now = None
            if result is None:
                self.evaluated.append(sorted(rows))
                return
            yield result

    def _watch(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        split_of: Callable[..., str],
        rows_of: Callable[..., Any] = lambda *_: [],
    ) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if split_of(*args, **kwargs) == "test":
                if self._now is None:
                    self.too_early.append(f"{owner.__name__}.{name}")
                else:
                    self._now += list(rows_of(*args, **kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


class WatchedTraining:
    """Watches a job of methods that train from a float32 store.

    Attributes:
        trained: rows of the training split that each seed was trained on, in steps or by the solver.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config, store: Store) -> None:
        self._layer, self._faults = store.layers[-1], dict[str, None]()
        self._labels = {split: torch.from_numpy(store.labels(split)) for split in store.splits}
        every = {split: np.arange(store.num_samples(split)) for split in store.splits}
        self._tokens = {split: torch.from_numpy(store.read(split, rows)[self._layer]) for split, rows in every.items()}
        self._row_of = {
            values.numpy().tobytes(): (split, row)
            for split, tokens in self._tokens.items()
            for row, values in enumerate(tokens)
        }
        draw = RowDraw.of(config, for_search=True)
        self._drawn = {seed: draw_rows(self._labels["train"], draw, seed=seed) for seed in config.train.seeds}
        self._refits, self._seed_of = config.train.refit, dict[int, int]()
        self.trained: dict[int, set[int]] = {seed: set() for seed in config.train.seeds}
        self._reads = SplitReads(monkeypatch)
        self._watch(monkeypatch, CandidateStack, "add_gradients", self._see_part)
        self._watch(monkeypatch, adapt.training.evaluation, "predict_group", self._see_prediction)
        self._watch(monkeypatch, adapt.training.trials, "solve_heads", self._see_probe)
        self._watch(monkeypatch, Objective, "judge", self._see_judgment)
        self._watch(monkeypatch, adapt.job.trial_run, "evaluate", self._see_evaluation)

    @property
    def faults(self) -> list[str]:
        """Every kind of leak that was seen, each once."""
        found = [*self._faults]
        if self._reads.too_early:
            found.append(f"the test split was read before the evaluation, by {self._reads.too_early[0]}")
        once = list(range(len(self._labels["test"])))
        repeated = [rows for rows in self._reads.evaluated if rows != once]
        return found + [
            f"an evaluation read {len(rows)} rows of the test split, not each row once" for rows in repeated
        ]

    @staticmethod
    def _watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, see: Callable[..., None]) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            see(*args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def _fault(self, text: str) -> None:
        self._faults[text] = None

    def _rows_of(self, inputs: dict[int, Tensor]) -> list[Row]:
        return [self._row_of[values.numpy().tobytes()] for values in inputs[self._layer]]

    def _see_part(self, stack: CandidateStack, part: SeedPart) -> None:
        rows = self._rows_of(part.inputs)
        self._require_trainable(rows, stack.candidates[0])
        self._require_labels(rows, part.targets[0][1], "trained")

    def _see_probe(self, candidates: Sequence[Candidate], data: ProbeData, objective: Objective, *_: Any) -> None:
        rows, val_rows = (self._pooled_rows(candidates[0], values) for values in (data.features, data.val_features))
        self._require_trainable(rows, candidates[0])
        self._require_validation(val_rows, candidates[0])
        self._require_labels(rows, data.labels, "trained")
        self._require_labels(val_rows, data.val_labels, "validated")
        self._seed_of[id(objective)] = candidates[0].data.seed

    def _pooled_rows(self, candidate: Candidate, values: Tensor) -> list[Row]:
        """The rows whose pooled tokens are nearest."""
        readout: Any = candidate.model.readout
        pooled = {split: readout.pool(readout.normalize(tokens)) for split, tokens in self._tokens.items()}
        known = [(split, row) for split, of_split in pooled.items() for row in range(len(of_split))]
        return [known[k] for k in torch.cdist(values, torch.cat([*pooled.values()])).argmin(dim=1).tolist()]

    def _see_prediction(self, candidates: Sequence[Candidate], inputs: Any, *_: Any) -> None:
        rows = self._rows_of(inputs)
        if self._reads.is_evaluating:
            if any(split != "test" for split, _ in rows):
                self._fault("a row of the training split was evaluated as one of the test split")
            return
        self._require_validation(rows, candidates[0])
        self._seed_of[id(candidates[0].data.objective)] = candidates[0].data.seed

    def _see_judgment(self, objective: Objective, _: Tensor, labels: Tensor) -> None:
        _, val_rows = self._drawn[self._seed_of[id(objective)]]
        if not torch.equal(labels, self._labels["train"][torch.from_numpy(val_rows)]):
            self._fault("validated with labels that are not those of the rows for validation")

    def _see_evaluation(self, _: Tensor, labels: Tensor) -> None:
        if not torch.equal(labels, self._labels["test"]):
            self._fault("evaluated with labels that are not those of the test split")

    def _require_trainable(self, rows: Iterable[Row], candidate: Candidate) -> None:
        training, validation = self._drawn[candidate.data.seed]
        legal = {*training.tolist()}
        if self._refits and not len(candidate.data.val_rows):
            legal |= {*validation.tolist()}
        for split, row in rows:
            if split != "train":
                self._fault("trained on a row of the test split")
            elif row not in legal:
                self._fault("trained on a row for validation")
            else:
                self.trained[candidate.data.seed].add(row)

    def _require_validation(self, rows: Iterable[Row], candidate: Candidate) -> None:
        _, validation = self._drawn[candidate.data.seed]
        for split, row in rows:
            if split != "train" or row not in validation:
                self._fault(f"validated on a row of the {split} split that is not for validation")

    def _require_labels(self, rows: Iterable[Row], labels: Tensor, verb: str) -> None:
        for (split, row), label in zip(rows, labels, strict=True):
            if not torch.equal(label, self._labels[split][row]):
                self._fault(f"{verb} with the label of another row")
