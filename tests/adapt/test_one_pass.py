"""Candidates of any methods and seeds train in one pass as each would alone, and each seed on its own rows.

Candidates that are computed one by one end with the same bits, those that are stacked within 1e-4. Validation reads the
rows of all seeds together, in other batches than for one seed, so that losses agree to 1e-5.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_features import MadeFeatures, make_candidate, make_rows, train
from method_cases import CASES

import adapt.training.checkpoint
import adapt.training.evaluation
from adapt.config.trials import Trial
from adapt.features.pooled import PooledFeatures
from adapt.methods.registry import find_method
from adapt.training.candidate import Candidate
from adapt.training.checkpoint import Checkpoint, TrainingProgress
from adapt.training.evaluation import predict_split
from adapt.training.row_draw import RowDraw
from adapt.training.seed_part import SeedPart
from adapt.training.settings import Settings
from adapt.training.stacks import CandidateStack, stacked_forward
from adapt.training.trials import Entry, TrainingData, train_entries
from store.errors import JobError

SEEDS = (0, 3)
POINTS = ((0, 0.01), (0, 0.003), (3, 0.01))  # seed and learning rate; the first two may be stacked
SETTINGS = Settings(epochs=2, batch_size=9, shuffle_block=4, mixup=0.3, feature_noise=0.1)
FEATURES = MadeFeatures(total=24, at_once=7)  # so that every batch is cut into parts
ROWS = {seed: make_rows(FEATURES, seed) for seed in SEEDS}
DATA = TrainingData(PooledFeatures(FEATURES))
IN_STEPS = [(method, options) for method, options, *_ in CASES if not find_method(method).solved]
RESULT = ("score", "loss", "best_epoch", "epochs", "train_loss")


def with_dropout(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with dropout where the method has any."""
    names = [name for name in find_method(method).options.model_fields if name.endswith("dropout")]
    return dict.fromkeys(names, 0.2) | options


def all_candidates() -> list[Candidate]:
    """Every case with two seeds and learning rates."""
    return [
        make_candidate(ROWS[seed], lr, method, **with_dropout(method, options))
        for method, options in IN_STEPS
        for seed, lr in POINTS
    ]


@pytest.fixture(scope="module")
def together() -> list[Candidate]:
    candidates = all_candidates()
    train(candidates, FEATURES, SETTINGS)
    return candidates


def assert_equal_results(ours: Candidate, theirs: Candidate, exact: bool) -> None:
    for name in RESULT:
        expected = pytest.approx(getattr(theirs, name), rel=1e-5 if exact else 1e-4, nan_ok=True)
        assert getattr(ours, name) == expected, name
    for name, values in theirs.trained_state().items():
        if exact:
            assert torch.equal(ours.trained_state()[name], values), name
        else:
            torch.testing.assert_close(ours.trained_state()[name], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(len(IN_STEPS)), ids=[f"{name}-{options}" for name, options in IN_STEPS])
def test_a_candidate_of_any_method_trains_as_it_would_alone(together: list[Candidate], number: int) -> None:
    """Also with dropout, batches in parts, blocks of rows, and others that read other layers."""
    group = slice(3 * number, 3 * number + 3)
    for ours, alone in zip(together[group], all_candidates()[group], strict=True):
        exact = stacked_forward([alone]) is None
        train([alone], FEATURES, SETTINGS)
        assert_equal_results(ours, alone, exact)


def test_the_seeds_of_a_method_end_differently(together: list[Candidate]) -> None:
    """So that the tests above compare different things."""
    for ours, other in zip(together[::3], together[2::3], strict=True):
        assert ours.data.seed != other.data.seed
        assert ours.train_loss != other.train_loss


@pytest.mark.parametrize("stop_after", [(1, 0), (1, 1)])
def test_an_interrupted_pass_of_many_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: tuple[int, int]
) -> None:
    save, chosen = Checkpoint.save, slice(0, None, 8)  # of all methods and both seeds
    stops = iter([True])

    def save_then_stop(checkpoint: Checkpoint, progress: TrainingProgress) -> None:
        save(checkpoint, progress)
        if (progress.epochs, progress.steps) == stop_after and next(stops, False):
            raise KeyboardInterrupt

    whole = all_candidates()[chosen]
    train(whole, FEATURES, SETTINGS)
    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(adapt.training.checkpoint, "_SHARE_OF_TIME", 1e9)
    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(all_candidates()[chosen], FEATURES, SETTINGS, checkpoint=tmp_path / "state.pt")
    resumed = all_candidates()[chosen]
    train(resumed, FEATURES, SETTINGS, checkpoint=tmp_path / "state.pt")
    for ours, theirs in zip(resumed, whole, strict=True):
        assert_equal_results(ours, theirs, exact=True)


def test_the_test_logits_of_many_are_those_of_each_alone(together: list[Candidate]) -> None:
    chosen = together[::7]
    for ours, candidate in zip(predict_split(chosen, FEATURES, "test"), chosen, strict=True):
        (alone,) = predict_split([candidate], FEATURES, "test")
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


# The rows of a seed


class SeenRows:
    """Records the rows that each seed trains on, step by step, and validates on; the rows stand in the tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.features = MadeFeatures(total=48)
        for values in self.features.tokens.values():
            values[:, 2, 3] = torch.arange(48.0)
        self.rows = {seed: make_rows(self.features, seed) for seed in SEEDS}
        self.steps: dict[int, list[list[int]]] = {seed: [[]] for seed in SEEDS}
        self.validated: dict[int, list[int]] = defaultdict(list)
        self.mislabeled = 0
        add_gradients, step, predict = (
            CandidateStack.add_gradients,
            CandidateStack.step,
            adapt.training.evaluation.predict_group,
        )

        def add_seen(stack: CandidateStack, part: SeedPart) -> None:
            rows = part.inputs[4][:, 2, 3].long()
            self.steps[stack.seed][-1] += rows.tolist()
            self.mislabeled += int((part.targets[0][1] != self.features.of_rows[rows]).sum())
            add_gradients(stack, part)

        def step_seen(stack: CandidateStack, *args: Any, **more: Any) -> None:
            before = [candidate.trained_state() for candidate in stack.candidates]
            step(stack, *args, **more)
            if self.steps[stack.seed][-1]:
                self.steps[stack.seed].append([])
                return
            for candidate, state in zip(stack.candidates, before, strict=True):  # no row, no step
                assert all(torch.equal(values, state[name]) for name, values in candidate.trained_state().items())

        def predict_seen(candidates: Sequence[Candidate], inputs: Any, *rest: Any) -> Any:
            for candidate in candidates:
                self.validated[candidate.data.seed] += inputs[4][:, 2, 3].long().tolist()
            return predict(candidates, inputs, *rest)

        monkeypatch.setattr(CandidateStack, "add_gradients", add_seen)
        monkeypatch.setattr(CandidateStack, "step", step_seen)
        monkeypatch.setattr(adapt.training.evaluation, "predict_group", predict_seen)

    def train(self, settings: Settings) -> list[Candidate]:
        candidates = [make_candidate(self.rows[seed], method="attentive_probe") for seed in SEEDS]
        train(candidates, self.features, settings)
        for steps in self.steps.values():
            assert steps.pop() == []
        return candidates


@pytest.mark.parametrize("batch_size", [1, 5, 36, 100])
def test_every_seed_trains_on_its_own_rows_once_an_epoch_and_validates_on_its_own(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    seen = SeenRows(monkeypatch)
    seen.train(Settings(epochs=3, batch_size=batch_size))
    for seed, data in seen.rows.items():
        trained = [row for step in seen.steps[seed] for row in step]
        n_rows = len(data.rows)
        for epoch in range(3):
            assert sorted(trained[epoch * n_rows : (epoch + 1) * n_rows]) == data.rows.tolist()
        assert sorted(seen.validated[seed]) == sorted(data.val_rows.tolist() * 3)
    assert seen.mislabeled == 0
    assert not np.array_equal(seen.rows[0].rows, seen.rows[3].rows)


@pytest.mark.parametrize("batch_size", [5, 36, 100])
def test_an_epoch_has_as_many_steps_as_batches_of_the_training_rows(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Whose sizes vary around the batch size, since they are drawn from all rows."""
    seen = SeenRows(monkeypatch)
    seen.train(Settings(epochs=2, batch_size=batch_size))
    for seed, data in seen.rows.items():
        sizes = [len(step) for step in seen.steps[seed]]
        assert len(sizes) == 2 * -(-len(data.rows) // batch_size)
        assert sum(sizes) == 2 * len(data.rows)


def test_a_batch_without_a_row_of_a_seed_is_no_step_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first one: the rates of the schedule go on all the same."""
    seen = SeenRows(monkeypatch)
    candidates = seen.train(Settings(epochs=2, batch_size=1))
    for candidate in candidates:
        n_steps = len(seen.steps[candidate.data.seed])
        assert 20 < n_steps < 2 * len(candidate.data.rows)  # of 72 batches with one or two of 48 rows
        assert candidate.last_lr == pytest.approx(0.0, abs=1e-4)


# Entries


def entry(method: str, options: dict[str, Any], seed: int, lr: float | None = 0.01, **more: Any) -> Entry:
    parsed = find_method(method).options.model_validate(options)
    return Entry(
        method=method,
        trial=Trial(options=parsed, lr=lr, weight_decay=0.01),
        seed=seed,
        **{"settings": SETTINGS, **more},
    )


ENTRIES = [
    entry("linear_probe", {"pool": "mean"}, 0, None),
    entry("linear_probe", {"pool": "cls_mean"}, 3, None),
    entry("losa", {"rank": 4, "token_rank": 2, "dropout": 0.1}, 0),
    entry("losa", {"rank": 4, "token_rank": 2, "layers": [1, 4]}, 3),
    entry("ladder", {"reduction": 4, "layers": [1, 3]}, 0, settings=Settings(epochs=1, batch_size=8)),
    entry("attentive_probe", {}, 3, 1e30),
]


def test_entries_of_any_kind_train_together_as_alone() -> None:
    """Solved and trained ones, of other settings, that read other layers, and one that diverges."""
    trained = train_entries(ENTRIES, DATA, RowDraw(val_fraction=0.25))
    for one, ours in zip(ENTRIES, trained, strict=True):
        (alone,) = train_entries([one], TrainingData(PooledFeatures(FEATURES)), RowDraw(val_fraction=0.25))
        assert (ours.method, ours.data.seed, ours.lr) == (one.method, one.seed, one.trial.lr)
        assert ours.diverged == alone.diverged == (one.trial.lr == 1e30)
        if not ours.diverged:
            assert_equal_results(ours, alone, exact=stacked_forward([alone]) is None)
    assert [candidate.epochs for candidate in trained[2:]] == [2, 2, 1, 1]


def test_each_seed_is_standardized_by_its_own_rows() -> None:
    trained = train_entries(ENTRIES[:4], DATA, RowDraw(val_fraction=0.25))
    for ours in trained:
        readout: Any = ours.model.readout
        values = DATA.pooled.whole("train", readout)
        torch.testing.assert_close(readout.mean, values[torch.from_numpy(ours.data.rows)].mean(dim=0))


def test_a_refit_trains_on_all_rows_and_keeps_the_last_epoch() -> None:
    trained = train_entries(ENTRIES[:5], DATA, RowDraw(val_fraction=0.25, refit=True))
    for one, ours in zip(ENTRIES, trained, strict=False):
        assert ours.data.rows.tolist() == list(range(24))
        assert len(ours.data.val_rows) == 0
        readout: Any = ours.model.readout
        values = DATA.pooled.whole("train", readout)
        torch.testing.assert_close(readout.mean, values.mean(dim=0))
        assert np.isnan(ours.score)
        assert not ours.diverged
        if one.trial.lr:
            assert ours.best_epoch == one.settings.epochs
            assert all(torch.equal(values, ours.best[name]) for name, values in ours.trained_state().items())
    (lost,) = train_entries(ENTRIES[5:], DATA, RowDraw(val_fraction=0.25, refit=True))
    assert lost.diverged


def test_an_interrupted_pass_of_other_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    train_entries(ENTRIES[2:4], DATA, RowDraw(val_fraction=0.25), checkpoint=tmp_path / "pass")
    with pytest.raises(JobError, match="damaged; delete it to start again"):
        train_entries(ENTRIES[2:3], DATA, RowDraw(val_fraction=0.25), checkpoint=tmp_path / "pass")
