"""The search: the best trial is chosen, scores are saved and not computed twice, and narrow grids are extended."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.config.trials import Trial
from adapt.features.cached import StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.trial_run import settings_of
from adapt.run_dir.files import read_json, write_json
from adapt.training.make_search import make_search
from adapt.training.row_draw import RowDraw
from adapt.training.scores import Score
from adapt.training.search import beyond_the_edge
from adapt.training.trials import Entry, TrainingData, train_entries
from store.errors import JobError

LOG_LR = {"lr": {"log_uniform": [1e-5, 1.0]}, "rank": {"int_uniform": [1, 64]}, "pool": ["mean", "cls_mean"]}


def searched(sweep: dict[str, Any], name: str = "losa", **search: Any) -> Config:
    document = {"backbone": {"weights": "random"}, "methods": [{"name": name, "sweep": sweep}], "search": search}
    return load_config(document)


def losa(**sweep: list[float]) -> Config:
    return searched(sweep)


class Judge:
    """Trains nothing: the score of a trial falls with the distance to the best learning rate; with 0, all diverge.

    Args:
        dropped: learning rates of trials that are trained for one epoch only.
    """

    def __init__(self, best_lr: float, dropped: Sequence[float] = ()) -> None:
        self.best_lr, self.dropped = best_lr, dropped
        self.passes: list[list[float | None]] = []

    def score(self, trial: Trial) -> Score:
        assert trial.lr
        distance = max(trial.lr / self.best_lr, self.best_lr / trial.lr) if self.best_lr else math.inf
        return Score(score=-distance, loss=0.0, epoch=1, epochs=1 if trial.lr in self.dropped else 30)

    def choose(self, config: Config, file: Path, most_passes: int = 100) -> Trial:
        """The best trial of a search that is stopped after some passes."""
        (method,) = config.parsed_methods()
        search = make_search(method, config.search, file)
        while (trials := search.ask()) and len(self.passes) < most_passes:
            self.passes.append([trial.lr for trial in trials])
            search.tell(trials, [self.score(trial) for trial in trials])
        return search.best


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "search.json"


def test_the_best_point_is_chosen_in_one_pass(file: Path) -> None:
    judge = Judge(0.01)
    assert judge.choose(losa(lr=[0.001, 0.01, 0.1]), file).lr == 0.01
    assert judge.passes == [[0.001, 0.01, 0.1]]


@pytest.mark.parametrize("search", [{}, {"driver": "random", "trials": 3}])
def test_a_grid_of_one_point_is_not_searched(file: Path, search: dict[str, Any]) -> None:
    judge, config = Judge(0.01), searched({"lr": [0.001]}, **search)
    assert judge.choose(config, file) == config.parsed_methods()[0].trials[0]
    assert judge.passes == []
    assert not file.exists()


@pytest.mark.parametrize(("best_lr", "found"), [(1.0, 1.0), (1e-5, 1e-5), (1e4, 100.0)])
def test_a_best_at_the_edge_widens_the_grid_a_few_times(file: Path, best_lr: float, found: float) -> None:
    judge = Judge(best_lr)
    assert judge.choose(losa(lr=[0.001, 0.01, 0.1]), file).lr == pytest.approx(found)
    assert all(len(trials) == 1 for trials in judge.passes[1:])


def test_what_is_kept_is_not_computed_again(file: Path) -> None:
    grid = losa(lr=[0.001, 0.01, 0.1])
    first = Judge(1.0).choose(grid, file)
    judge = Judge(1.0)
    assert judge.choose(grid, file) == first
    assert judge.passes == []
    scores = read_json(file)
    del scores["points"][3], scores["points"][1]
    scores["points"].reverse()  # points are known by their values, not by their position
    write_json(file, scores)
    assert judge.choose(grid, file) == first
    assert judge.passes[0] == [0.01]


def test_scores_may_be_told_one_by_one_and_out_of_order(file: Path) -> None:
    config = losa(lr=[0.001, 0.01, 0.1])
    (method,) = config.parsed_methods()
    search, judge = make_search(method, config.search, file), Judge(0.01)
    for trial in reversed(search.ask()):
        search.tell([trial], [judge.score(trial)])
        assert trial not in search.ask()
    assert search.best.lr == 0.01
    assert [point.lr for point in search.points] == [0.1, 0.01, 0.001]


@pytest.mark.parametrize("search", [{}, {"driver": "random", "trials": 3}])
def test_training_that_diverges_at_every_point_is_an_error_and_is_not_repeated(
    file: Path, search: dict[str, Any]
) -> None:
    config = searched({"lr": [0.1, 1.0, 10.0]}, **search)
    for n_passes in (1, 0):
        judge = Judge(0.0)
        with pytest.raises(JobError, match=r"diverged.* at learning rates 0\.1, 1, 10; lower train\.lr"):
            judge.choose(config, file)
        assert len(judge.passes) == n_passes


def test_a_dropped_trial_is_worse_than_all_that_were_not(file: Path) -> None:
    judge = Judge(0.01, dropped=[0.01])
    assert judge.choose(losa(lr=[0.0001, 0.01, 1.0, 10.0]), file).lr == 0.0001, "the best of those trained to the end"


def test_epochs_of_a_solved_method_are_not_compared(file: Path) -> None:
    config = searched({"weight_decay": [0.1, 0.2]}, name="linear_probe")
    (method,) = config.parsed_methods()
    search = make_search(method, config.search, file)
    search.tell(search.ask(), [Score(score=s, loss=0.0, epoch=1, epochs=e) for s, e in ((2.0, 5), (1.0, 9))])
    assert search.best.weight_decay == 0.1


@pytest.mark.parametrize("content", ["", '{"points": {', "[" * 100_000])
def test_a_damaged_file_of_scores_is_one_clear_line(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(JobError, match=r"search\.json is damaged \(.*\); delete it, and its content is computed again"):
        Judge(1.0).choose(losa(lr=[0.1, 0.2]), file)
    assert file.read_text() == content


@pytest.mark.parametrize("change", [{"search": "other"}, {"method": "ladder"}, {"points": [{"lr": "fast"}]}])
def test_the_file_of_another_search_is_refused(file: Path, change: dict[str, Any]) -> None:
    grid = losa(lr=[0.1, 0.2])
    Judge(1.0).choose(grid, file)
    write_json(file, {**read_json(file), **change})
    with pytest.raises(JobError, match=r"search\.json is damaged \(.*\); delete it"):
        Judge(1.0).choose(grid, file)


def test_two_values_and_options_are_not_widened() -> None:
    for grid in (losa(lr=[0.1, 0.2]), losa(rank=[2, 4, 8]), losa(weight_decay=[0.0, 0.1, 0.2])):
        trials = grid.parsed_methods()[0].trials
        assert all(beyond_the_edge(trials, trial) == [] for trial in trials[:1])


def test_both_axes_may_be_widened_at_once() -> None:
    trials = losa(lr=[0.001, 0.01, 0.1], weight_decay=[0.1, 0.2, 0.4]).parsed_methods()[0].trials
    more = beyond_the_edge(trials, trials[-1])
    assert [(trial.lr, trial.weight_decay) for trial in more] == [(pytest.approx(1.0), 0.4), (0.1, pytest.approx(0.8))]


def test_a_random_search_trains_all_its_points_at_once_and_none_beyond(file: Path) -> None:
    judge, config = Judge(1e-9), searched(LOG_LR, driver="random", trials=20)
    lrs = [trial.lr for trial in config.parsed_methods()[0].trials]
    assert judge.choose(config, file).lr == min(lrs)
    assert judge.passes == [lrs]


class TestOptuna:
    @pytest.fixture(autouse=True)
    def _require_optuna(self) -> None:
        pytest.importorskip("optuna", reason="Optuna is optional: pip install 'sidecache[optuna]'")

    @staticmethod
    def config(**search: Any) -> Config:
        return searched(LOG_LR, **({"driver": "optuna", "trials": 30} | search))

    def test_it_begins_at_random_and_then_comes_closer_to_the_best(self, file: Path) -> None:
        judge, config = Judge(0.01), self.config(trials=64)
        assert judge.choose(config, file).lr == pytest.approx(0.01, rel=0.5)
        assert judge.passes[0] == [trial.lr for trial in config.parsed_methods()[0].trials[:8]]
        assert [len(trials) for trials in judge.passes] == [8] * 8
        distances = [sum(abs(math.log10(lr) + 2) for lr in trials) / len(trials) for trials in judge.passes]  # type: ignore[arg-type]
        assert distances[-1] < 0.5 * distances[0]

    def test_an_interrupted_search_proposes_what_the_whole_one_does(self, file: Path, tmp_path: Path) -> None:
        whole, config = Judge(0.01, dropped=[0.01]), self.config()
        best = whole.choose(config, file)
        for n_passes in (1, 3):
            judge, half = Judge(0.01), tmp_path / f"half-{n_passes}.json"
            judge.choose(config, half, most_passes=n_passes)
            assert judge.choose(config, half) == best
            assert judge.passes == whole.passes

    def test_a_batch_of_which_a_part_was_scored_is_completed(self, file: Path, tmp_path: Path) -> None:
        whole, config = Judge(0.01), self.config()
        whole.choose(config, file)
        scores = read_json(file)
        missing = scores["points"].pop(9)
        del scores["points"][15:]
        part = tmp_path / "part.json"
        write_json(part, scores | {"search": "part"})
        judge = Judge(0.01)
        judge.choose(config, part)
        assert judge.passes == [[missing["lr"]], *whole.passes[2:]]

    def test_dropped_points_are_proposed_no_further(self, file: Path) -> None:
        config = self.config(epochs=30)
        (method,) = config.parsed_methods()
        search, judge = make_search(method, config.search, file), Judge(1.0)
        last: list[float] = []
        while trials := search.ask():  # high learning rates score best, but are dropped
            last = [trial.lr for trial in trials if trial.lr]
            judge.dropped = [lr for lr in last if lr > 1e-3]
            search.tell(trials, [judge.score(trial) for trial in trials])
        assert search.best.lr < 1e-3  # type: ignore[operator]
        assert sum(lr < 1e-3 for lr in last) > len(last) / 2

    def test_a_small_space_is_searched_once_a_point(self, file: Path) -> None:
        judge = Judge(0.1)
        config = searched({"lr": [0.01, 0.1, 1.0]}, driver="optuna", trials=20, batch=2)
        assert judge.choose(config, file).lr == 0.1
        asked = [lr for trials in judge.passes for lr in trials]
        assert len(asked) == len(set(asked))

    def test_training_that_diverges_at_every_point_is_an_error(self, file: Path) -> None:
        with pytest.raises(JobError, match="diverged"):
            Judge(0.0).choose(self.config(trials=9), file)


@pytest.mark.parametrize("driver", ["random", "optuna"])
def test_a_job_searches_as_many_points_for_each_method_and_not_again(
    tiny_config: Callable[..., Config], driver: str
) -> None:
    if driver == "optuna":
        pytest.importorskip("optuna", reason="Optuna is optional: pip install 'sidecache[optuna]'")
    ranges = "sweep={lr: {log_uniform: [0.001, 0.1]}, weight_decay: {log_uniform: [0.001, 0.1]}}"
    search = f"search={{driver: {driver}, trials: 3, batch: 2, epochs: 1}}"
    config = tiny_config("train.epochs=1", ranges, search)
    rows = sc.run(config)
    assert [row.method for row in rows] == ["linear_probe", "losa"]
    files = sorted((config.run_dir / "search").iterdir())
    points = [read_json(path)["points"] for path in files]
    assert [len(found) for found in points] == [3, 3]
    for row in rows:
        scores = {(point["lr"], point["weight_decay"]): point["score"] for point in points[row.method == "losa"]}
        assert scores[row.lr, row.weight_decay] == max(scores.values())
    written = [path.stat().st_mtime_ns for path in files]
    assert sc.run(config) == rows
    assert [path.stat().st_mtime_ns for path in files] == written


def test_the_speed_of_a_solved_probe_is_that_of_the_clock(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("methods=[linear_probe]")
    data = TrainingData(PooledFeatures(StreamedFeatures(sc.extract(config).store, torch.device("cpu"))))
    (method,) = config.parsed_methods()
    clock = iter([100.0, 107.0])
    monkeypatch.setattr("adapt.training.linear_solver.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    entry = Entry(method=method.name, trial=method.trials[0], seed=0, settings=settings_of(config, method))
    (trained,) = train_entries([entry], data, RowDraw(val_fraction=0.25))
    assert trained.epochs == 1
    assert trained.seconds == pytest.approx(7.0 / trained.best_epoch)
