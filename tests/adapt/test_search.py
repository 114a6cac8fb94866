"""The search: the best trial is chosen, scores are saved and not computed twice, and narrow grids are extended."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config, MethodConfig, Trial
from adapt.features.cached import StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.training_job import settings_of
from adapt.run_dir.files import read_json, write_json
from adapt.training.candidate import Candidate
from adapt.training.search import beyond_the_edge, choose_trial
from adapt.training.trials import Trained, TrainingData, train_trials
from store.errors import JobError


def losa(**sweep: list[float]) -> MethodConfig:
    document = {"backbone": {"weights": "random"}, "methods": [{"name": "losa", "sweep": sweep}]}
    return load_config(document).parsed_methods()[0]


class Judge:
    """Trains nothing: the score of a trial falls with the distance to the best learning rate; with 0, all diverge."""

    def __init__(self, best_lr: float) -> None:
        self.best_lr, self.passes = best_lr, []

    def __call__(self, trials: Sequence[Trial], name: str) -> Trained:
        self.passes.append([trial.lr for trial in trials])
        distance = [
            max(trial.lr / self.best_lr, self.best_lr / trial.lr) if self.best_lr else math.inf for trial in trials
        ]
        candidates = [Candidate(nn.Identity(), None, 0.0, score=-d, loss=0.0) for d in distance]
        return Trained(candidates, 1.0, 1.0)


def test_the_best_point_is_chosen_in_one_pass(tmp_path: Path) -> None:
    judge = Judge(0.01)
    assert choose_trial(losa(lr=[0.001, 0.01, 0.1]), judge, tmp_path / "search.json").lr == 0.01
    assert judge.passes == [[0.001, 0.01, 0.1]]


def test_a_grid_of_one_point_is_not_searched(tmp_path: Path) -> None:
    judge, method = Judge(0.01), losa(lr=[0.001])
    assert choose_trial(method, judge, tmp_path / "search.json") == method.trials[0]
    assert judge.passes == []
    assert not (tmp_path / "search.json").exists()


@pytest.mark.parametrize(("best_lr", "found"), [(1.0, 1.0), (1e-5, 1e-5), (1e4, 100.0)])
def test_a_best_at_the_edge_widens_the_grid_a_few_times(tmp_path: Path, best_lr: float, found: float) -> None:
    judge = Judge(best_lr)
    chosen = choose_trial(losa(lr=[0.001, 0.01, 0.1]), judge, tmp_path / "search.json")
    assert chosen.lr == pytest.approx(found)
    assert all(len(trials) == 1 for trials in judge.passes[1:])


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    file, grid = tmp_path / "search.json", losa(lr=[0.001, 0.01, 0.1])
    first = choose_trial(grid, Judge(1.0), file)
    judge = Judge(1.0)
    assert choose_trial(grid, judge, file) == first
    assert judge.passes == []
    scores = read_json(file)
    del scores["points"]["1"], scores["points"]["3"]
    write_json(file, scores)
    assert choose_trial(grid, judge, file) == first
    assert judge.passes[0] == [0.01]


def test_training_that_diverges_at_every_point_is_an_error_and_is_not_repeated(tmp_path: Path) -> None:
    file, grid = tmp_path / "search.json", losa(lr=[0.1, 1.0, 10.0])
    for passes in ([[0.1, 1.0, 10.0]], []):
        judge = Judge(0.0)
        with pytest.raises(JobError, match=r"diverged.* at learning rates 0\.1, 1, 10; lower train\.lr"):
            choose_trial(grid, judge, file)
        assert judge.passes == passes


@pytest.mark.parametrize("content", ["", '{"points": {', "[" * 100_000])
def test_a_damaged_file_of_scores_is_one_clear_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "search.json"
    file.write_text(content)
    with pytest.raises(JobError, match=r"search\.json is damaged \(.*\); delete it, and its content is computed again"):
        choose_trial(losa(lr=[0.1, 0.2]), Judge(1.0), file)
    assert file.read_text() == content


def test_two_values_and_options_are_not_widened() -> None:
    for grid in (losa(lr=[0.1, 0.2]), losa(rank=[2, 4, 8]), losa(weight_decay=[0.0, 0.1, 0.2])):
        assert all(beyond_the_edge(grid.trials, trial) == [] for trial in grid.trials[:1])


def test_both_axes_may_be_widened_at_once() -> None:
    grid = losa(lr=[0.001, 0.01, 0.1], weight_decay=[0.1, 0.2, 0.4])
    more = beyond_the_edge(grid.trials, grid.trials[-1])
    assert [(trial.lr, trial.weight_decay) for trial in more] == [(pytest.approx(1.0), 0.4), (0.1, pytest.approx(0.8))]


def test_the_speed_of_a_solved_probe_is_that_of_the_clock(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("methods=[linear_probe]")
    data = TrainingData(PooledFeatures(StreamedFeatures(sc.extract(config).store, torch.device("cpu"))))
    (method,) = config.parsed_methods()
    clock = iter([100.0, 107.0])
    monkeypatch.setattr("adapt.training.linear_solver.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trained = train_trials(method, method.trials[:1], data, settings_of(config, method, 0), 0.25)
    assert trained.seconds_per_epoch == pytest.approx(7.0 / trained.best.best_epoch)
    assert trained.samples_per_second == pytest.approx(18 / trained.seconds_per_epoch)
