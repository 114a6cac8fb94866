"""Successive halving: rungs, the share of each search that goes on, and the winner."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_features import MadeFeatures, make_candidate, make_rows, train
from torch import nn

from adapt.training.candidate import Candidate
from adapt.training.halving import drop_worst, rungs
from adapt.training.settings import Settings

EPOCHS, FACTOR, FIRST = st.integers(1, 2000), st.integers(2, 10), st.integers(1, 50)
FEATURES = MadeFeatures(total=12)
ROWS = make_rows(FEATURES)
CONTESTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans()), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ((27, 3, 1), [1, 3, 9]),
        ((30, 3, 1), [1, 3, 9, 27]),
        ((8, 2, 2), [2, 4]),
        ((5, 3, 5), []),
        ((1, 2, 1), []),
        ((9, 2, None), [3, 6]),
        ((10, 2, None), [4, 8]),
        ((20, 3, None), [7]),
        ((1, 2, None), []),
    ],
)
def test_rungs_are_as_in_the_paper(arguments: tuple[int, int, int | None], epochs: list[int]) -> None:
    assert [rung.epoch for rung in rungs(*arguments)] == epochs


@given(EPOCHS, FACTOR, FIRST)
def test_rungs_grow_by_the_factor_from_the_first_to_the_last_that_fits(epochs: int, factor: int, first: int) -> None:
    found = [rung.epoch for rung in rungs(epochs, factor, first)]
    assert found[:1] == ([first] if first < epochs else [])
    assert all(later == factor * earlier for earlier, later in itertools.pairwise(found))
    assert all(epoch < epochs for epoch in found)
    assert not found or found[-1] * factor >= epochs


@given(EPOCHS, FACTOR, FIRST)
def test_a_candidate_costs_at_most_as_many_epochs_as_a_rung_allows(epochs: int, factor: int, first: int) -> None:
    share, cost, start = Fraction(1), Fraction(0), 0
    found = rungs(epochs, factor, first)
    for rung in found:
        assert rung.share == Fraction(1, factor)
        cost += share * (rung.epoch - start)
        share, start = share * rung.share, rung.epoch
    cost += share * (epochs - start)
    assert cost <= min(epochs, first * (1 + len(found)))


def ranked(contest: str, score: float, active: bool = True) -> Candidate:
    candidate = Candidate(nn.Identity(), 0.1, 0.0, data=ROWS, method="losa", contest=contest)
    candidate.score, candidate.active = float(score), active
    return candidate


@given(CONTESTS, st.integers(2, 6))
def test_the_best_share_of_each_search_goes_on_and_at_least_one(
    fields: list[tuple[str, int, bool]], factor: int
) -> None:
    """Whatever the others have scored, and how many were dropped before."""
    candidates = [ranked(contest, score, active) for contest, score, active in fields]
    before = [candidate for candidate in candidates if candidate.active]
    drop_worst(candidates, Fraction(1, factor))
    assert all(candidate in before for candidate in candidates if candidate.active)
    for contest in "abc":
        compared = [candidate for candidate in before if candidate.contest == contest]
        kept = [candidate.score for candidate in compared if candidate.active]
        assert len(kept) == math.ceil(len(compared) / factor)
        assert sorted(kept) == sorted(candidate.score for candidate in compared)[len(compared) - len(kept) :]


@given(st.permutations(range(12)), st.integers(2, 4), st.integers(1, 9))
def test_the_winner_is_that_of_all_if_every_rung_ranks_as_the_end_does(
    scores: list[int], factor: int, epochs: int
) -> None:
    candidates = [ranked("a", score) for score in scores]
    for rung in rungs(epochs, factor, 1):
        drop_worst(candidates, rung.share)
    assert max((candidate for candidate in candidates if candidate.active), key=lambda each: each.rank).score == 11


# In training


LEVELS = (0.001, 0.004, 0.002, 0.009, 0.003, 0.008, 0.005)  # learning rates of a contest; the higher, the better


@pytest.fixture
def scored_by_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of a candidate is a multiple of its learning rate, and best in the second epoch."""
    consider = Candidate.consider

    def scripted(candidate: Candidate, rank: tuple[float, float], epoch: int, **kept: Any) -> None:
        assert candidate.lr
        level = candidate.lr * (100 if candidate.contest == "good" else 1)
        consider(candidate, (level if epoch == 2 else level / 2, 0.0), epoch, **kept)

    monkeypatch.setattr(Candidate, "consider", scripted)


def search(epochs: int = 8, halved: bool = True, contests: Sequence[str] = ("good", "poor")) -> list[Candidate]:
    """Candidates of some contests after a training with rungs after one, two and four epochs."""
    candidates = [make_candidate(ROWS, lr, "attentive_probe", contest=contest) for lr in LEVELS for contest in contests]
    settings = Settings(epochs=epochs, batch_size=12)
    train(candidates, FEATURES, settings, rungs=rungs(epochs, 2, 1) if halved else ())
    return candidates


@pytest.mark.usefixtures("scored_by_rate")
def test_each_rung_keeps_half_of_each_search_rounded_up() -> None:
    candidates = search()
    for contest in ("good", "poor"):
        epochs = sorted(each.epochs for each in candidates if each.contest == contest)
        assert epochs == [1, 1, 1, 2, 2, 4, 8]  # of seven candidates four, two and one go on
        trained = {each.lr: each.epochs for each in candidates if each.contest == contest}
        assert [trained[lr] for lr in sorted(LEVELS)] == epochs


@pytest.mark.usefixtures("scored_by_rate")
def test_a_search_among_others_drops_what_it_drops_alone() -> None:
    def outcome(candidates: Sequence[Candidate]) -> list[tuple[float, int]]:
        return [(each.score, each.epochs) for each in candidates]

    among, alone = search(), search(contests=["poor"])
    assert outcome([each for each in among if each.contest == "poor"]) == outcome(alone)


@pytest.mark.usefixtures("scored_by_rate")
def test_a_dropped_candidate_keeps_its_best_epoch_and_its_weights_of_then() -> None:
    candidates, whole = search(), search(epochs=8, halved=False)
    for ours, longer in zip(candidates, whole, strict=True):
        assert ours.best_epoch == min(2, ours.epochs)
        if ours.epochs > 1:
            state = longer.trained_state()
            assert all((values == state[name]).all() for name, values in ours.trained_state().items())


@pytest.mark.usefixtures("scored_by_rate")
def test_the_winner_is_that_of_the_search_without_halving() -> None:
    def winner(candidates: Sequence[Candidate]) -> float | None:
        return max((each for each in candidates if each.contest == "poor"), key=lambda each: each.rank).lr

    assert winner(search()) == winner(search(halved=False)) == max(LEVELS)


def test_without_scripted_scores_halving_only_stops_candidates_early() -> None:
    """Those that go on are trained as without halving."""
    halved, whole = search(epochs=3), search(epochs=3, halved=False)
    for ours, theirs in zip(halved, whole, strict=True):
        if ours.epochs == 3:
            assert (ours.score, ours.loss, ours.best_epoch) == (theirs.score, theirs.loss, theirs.best_epoch)
    assert {each.epochs for each in halved} == {1, 2, 3}
