"""Heads that are solved: those that models start with, and those on what a model has learned."""

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
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_logits
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
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


@pytest.mark.parametrize(("method", "options"), IN_STEPS)
def test_a_model_that_starts_with_a_solved_head_is_never_behind_the_probe_on_validation(
    method: str, options: dict[str, Any]
) -> None:
    read = {"pool": options.get("pool", "auto")} | ({"layers": [options["layer"]]} if "layer" in options else {})
    probe, trained = train("linear_probe", read), train(method, options, start_head=DECAY)
    assert trained.rank >= probe.rank


def test_training_that_only_harms_leaves_the_probe() -> None:
    """Epoch 0 is the best: the model gives the logits of the probe."""
    probe = train("linear_probe", {})
    harmed = train("losa", {"rank": 4}, start_head=DECAY, optimizer="sgd", head_lr=1e4)
    assert (harmed.best_epoch, harmed.score, harmed.loss) == (0, probe.score, probe.loss)
    rows = probe.data.val_rows
    torch.testing.assert_close(logits_of(harmed, rows), logits_of(probe, rows), rtol=1e-4, atol=1e-4)


def test_the_last_epoch_is_kept_also_after_a_solved_start() -> None:
    assert train("losa", {"rank": 4}, start_head=DECAY, keep="last").best_epoch == SETTINGS.epochs


def test_seeds_start_with_the_heads_of_their_own_rows() -> None:
    trial = Trial(options=find_method("losa").options(), lr=1e-9, weight_decay=DECAY)
    settings = replace(SETTINGS, start_head=DECAY)
    entries = [Entry(method="losa", trial=trial, seed=seed, settings=settings) for seed in (0, 1)]
    together = train_entries(entries, DATA, RowDraw(val_fraction=0.25))
    alone = [train_entries([entry], DATA, RowDraw(val_fraction=0.25))[0] for entry in entries]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.best["readout.head.weight"], other.best["readout.head.weight"])
    heads = [one.best["readout.head.weight"] for one in together]
    assert not torch.allclose(heads[0], heads[1], atol=1e-3)


def test_a_method_that_does_not_start_as_the_probe_does_not_start_with_its_head() -> None:
    config = sc.load_config(
        {"backbone": {"weights": "random"}, "train": {"start_head": 0.1}, "methods": ["losa", "prompt"]}
    )
    assert [settings_of(config, method).start_head for method in config.parsed_methods()] == [0.1, None]


@pytest.mark.parametrize(
    ("setting", "name"), [("solve_head", "the solved head of losa"), ("start_head", "the head to start from")]
)
def test_a_head_without_an_optimum_is_warned_of(setting: str, name: str) -> None:
    # fewer rows than features, so that the classes are separable
    with pytest.warns(Note, match=f"{name} of weight decay 0 is not at its optimum"):
        train("losa", {"rank": 4}, **{setting: 0.0})
