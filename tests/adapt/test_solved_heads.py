"""Heads that are solved on what a model has learned."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_features import MadeFeatures
from method_cases import CASES

import sidecache as sc
from adapt.config.trials import Trial
from adapt.features.pooled import PooledFeatures
from adapt.job.trial_run import settings_of
from adapt.methods.registry import find_method
from adapt.training import solved_heads
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_logits
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.solved_heads import solve_trained_heads
from adapt.training.trials import Entry, TrainingData, train_entries
from store.errors import Note

FEATURES = MadeFeatures(total=48, at_once=11)
DATA = TrainingData(PooledFeatures(FEATURES))
SETTINGS = Settings(epochs=2, batch_size=16)
IN_STEPS = [(method, options) for method, options, *_ in CASES if not find_method(method).solved]
DECAY = 0.05


def train(method: str, options: dict[str, Any], refit: bool = False, **settings: Any) -> Candidate:
    lr = None if find_method(method).solved else 0.01
    trial = Trial(options=find_method(method).options.model_validate(options), lr=lr, weight_decay=DECAY)
    entry = Entry(method=method, trial=trial, seed=0, settings=replace(SETTINGS, **settings))
    (trained,) = train_entries([entry], DATA, RowDraw(val_fraction=0.25, refit=refit))
    return trained


def logits_of(trained: Candidate, rows: Any) -> torch.Tensor:
    (logits,) = predict_logits([trained], FEATURES, "train", [rows])
    return logits


def gradient_norm(trained: Candidate) -> float:
    """Of the minimized function, in the weights of the head, over all training rows."""
    model: Any = trained.model.eval()
    rows, head = torch.from_numpy(trained.data.rows), model.readout.head
    tokens = {layer: values[rows] for layer, values in FEATURES.tokens.items()}
    labels = FEATURES.labels("train")[rows]
    loss = trained.data.objective(model(tokens), labels) + DECAY / 2 * head.weight.square().sum()
    return float(torch.autograd.grad(loss, head.weight)[0].norm())


@pytest.mark.parametrize(("method", "options"), IN_STEPS)
def test_the_head_is_at_its_optimum_and_the_rest_as_it_was_trained(method: str, options: dict[str, Any]) -> None:
    solved, trained = train(method, options, solve_head=DECAY), train(method, options)
    assert gradient_norm(solved) < 0.02 * gradient_norm(trained)
    for (name, ours), theirs in zip(solved.model.named_parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs) == ("readout.head" not in name)


def test_score_and_kept_weights_are_those_of_the_solved_head() -> None:
    solved = train("losa", {"rank": 4}, solve_head=DECAY)
    labels = FEATURES.labels("train")[torch.from_numpy(solved.data.val_rows)]
    rank = solved.data.objective.judge(logits_of(solved, solved.data.val_rows), labels)
    assert (solved.score, -solved.loss) == pytest.approx(rank)
    for name, tensor in solved.trained_state().items():
        assert torch.equal(tensor, solved.best[name])


def test_a_refit_has_a_solved_head_too() -> None:
    solved = train("losa", {"rank": 4}, refit=True, solve_head=DECAY)
    assert gradient_norm(solved) < 0.02 * gradient_norm(train("losa", {"rank": 4}, refit=True))
    assert solved.score != solved.score


def test_a_head_without_an_optimum_is_warned_of() -> None:
    # fewer rows than features, so that the classes are separable
    with pytest.warns(Note, match="the solved head of losa of weight decay 0 is not at its optimum"):
        train("losa", {"rank": 4}, solve_head=0.0)


def test_heads_are_solved_of_methods_that_train_from_features_alone() -> None:
    config = sc.load_config(
        {"backbone": {"weights": "random"}, "train": {"solve_head": 0.1}, "methods": ["losa", "lora"]}
    )
    assert [settings_of(config, method).solve_head for method in config.parsed_methods()] == [0.1, None]


def test_a_model_that_has_gone_astray_keeps_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives its head is finite, but the squares are not."""
    trained = train("losa", {"rank": 4})
    before = trained.trained_state()
    wild = torch.full((FEATURES.labels("train").shape[0], trained.model.readout.head.in_features), 1e25)
    monkeypatch.setattr(solved_heads, "predict_logits", lambda *_, **__: [wild])
    solve_trained_heads([trained], FEATURES, DECAY, precision="float32")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.trained_state().items())
