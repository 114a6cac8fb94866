"""Results are honest: trials are chosen, trained, standardized and weighted by training and validation rows only.

The test split is read once for each chosen model, at the end; every setting that determines a result is part of the id
of trial and search.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import adapt.job.trial_run
import adapt.training.trials
import sidecache as sc
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.image_batches import ImageBatches
from adapt.features.online import OnlineFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.inputs import Inputs
from adapt.job.training_job import measure_intrinsic_dimension, settings_of
from adapt.methods.registry import METHODS
from adapt.training.objective import class_weights
from adapt.training.row_draw import draw_validation
from adapt.training.trials import TrainingData, train_trials
from extract.sources.open_source import SampleSplit
from store.errors import JobError
from store.reader import Store

MakeConfig = Callable[..., Config]
N_TEST = 12
SMALL: dict[str, dict[str, Any]] = {  # options that fit a backbone 32 wide
    "losa": {"rank": 4, "token_rank": 2},
    "kronecker": {"n": 4},
    "adapter": {"bottleneck": 4},
    "adapter_drop": {"bottleneck": 4},
    "compacter": {"bottleneck": 4},
    "intrinsic": {"dim": 4},
}
PROBE = {"name": "linear_probe", "sweep": {"weight_decay": [0.1, 0.001], "pool": ["cls", "mean"]}}


def entries(needs: str) -> list[dict[str, Any]]:
    """Every method of a kind, each with a search of two points."""
    trains_backbone = needs == "end_to_end"
    names = [
        name for name, method in METHODS.items() if method.trains_backbone == trains_backbone and not method.solved
    ]
    searched = [{"name": name, **SMALL.get(name, {}), "sweep": {"lr": [0.01, 0.001]}} for name in names]
    return [PROBE, *searched] if needs == "features" else searched


class Spy:
    """Records every read of the test split (tokens, pooled tokens, images, labels) and every evaluation of a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.too_early: list[str] = []
        self.evaluated: list[list[int]] = []  # for every evaluation, the rows that were read
        self._now: list[int] | None = None
        evaluate = adapt.job.trial_run.evaluate_split
        monkeypatch.setattr(adapt.job.trial_run, "evaluate_split", lambda *args: self._evaluate(evaluate, *args))
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

    def _evaluate(self, evaluate: Callable[..., Any], model: Any, features: Any, split: str, *rest: Any) -> Any:
        self._now = []
        try:
            return evaluate(model, features, split, *rest)
        finally:
            self.evaluated.append(sorted(self._now))
            self._now = None

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


@pytest.mark.parametrize(
    ("needs", "source"),
    [
        ("features", "resident"),
        ("features", "streamed"),
        ("features", "online"),
        pytest.param("end_to_end", "resident", marks=pytest.mark.slow),
    ],
)
def test_the_test_split_is_read_once_a_chosen_model_and_never_before(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, needs: str, source: str
) -> None:
    """Over all methods, each with a search and two seeds."""
    methods = entries(needs)
    config = tiny_config(f"methods={methods}", f"train.feature_source={source}", "train.epochs=1", "train.seeds=[0, 1]")
    sc.extract(config)  # reads all splits, but its result depends on no label
    spy = Spy(monkeypatch)
    rows = sc.train(config)
    assert spy.too_early == []
    assert spy.evaluated == [list(range(N_TEST))] * len(rows)
    assert [row.method for row in rows] == [method["name"] for method in methods for _ in range(2)]


def test_the_spy_sees_every_way_to_the_test_split(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    store, inputs = sc.extract(config).store, Inputs(config)
    spy = Spy(monkeypatch)
    streamed = StreamedFeatures(store, torch.device("cpu"))
    for read in (
        lambda: streamed.labels("test"),
        lambda: next(ResidentFeatures(streamed, [2]).batches("test", [np.arange(2)], [2])),
        lambda: store.read("test", [0]),
        lambda: store.dataset("test")[0],
        lambda: inputs.source.splits["test"][0],
    ):
        spy.too_early.clear()
        read()
        assert spy.too_early


def test_measuring_the_intrinsic_dimension_reads_no_test_row(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.epochs=1")
    sc.extract(config)
    spy = Spy(monkeypatch)
    measure_intrinsic_dimension(config, Inputs(config), None, [4])
    assert (spy.too_early, spy.evaluated) == ([], [])


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Record the arguments of `fit` and `solve_heads`: rows to train and validate on, labels and class weights."""
    seen: list[dict[str, Any]] = []
    fit, solve = adapt.training.trials.fit, adapt.training.trials.solve_heads

    def fit_seen(group: Any, task: Any, settings: Any, **more: Any) -> Any:
        weights = task.objective.weights
        seen.append({"seed": settings.seed, "rows": task.rows, "val_rows": task.val_rows, "weights": weights})
        return fit(group, task, settings, **more)

    def solve_seen(candidates: Any, data: Any, objective: Any, describe: str) -> float:
        seen.append({"data": data, "weights": objective.weights, "mode": candidates[0].model.readout.mode})
        return solve(candidates, data, objective, describe)

    with monkeypatch.context() as patch:
        patch.setattr(adapt.training.trials, "fit", fit_seen)
        patch.setattr(adapt.training.trials, "solve_heads", solve_seen)
        yield seen


@pytest.mark.parametrize("source", ["resident", "streamed", "online"])
def test_search_and_training_of_a_seed_have_that_seeds_validation_rows(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    losa = {"name": "losa", **SMALL["losa"], "sweep": {"lr": [0.01, 0.001]}}
    config = tiny_config(f"methods=[{losa}]", f"train.feature_source={source}", "train.epochs=1", "train.seeds=[3, 4]")
    store = sc.extract(config).store
    with watching(monkeypatch) as seen:
        sc.train(config)
    assert [each["seed"] for each in seen] == [3, 3, 4]  # the search uses the first seed
    for each in seen:
        rows, val_rows = draw_validation(torch.from_numpy(store.labels("train")), 0.25, each["seed"])
        assert np.array_equal(each["rows"], rows)
        assert np.array_equal(each["val_rows"], val_rows)
    assert not np.array_equal(seen[0]["val_rows"], seen[2]["val_rows"])


def test_a_probe_is_solved_on_training_rows_and_chosen_by_validation_rows(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(f"methods=[{PROBE}]", "train.seeds=[5]")
    store = sc.extract(config).store
    features = StreamedFeatures(store, torch.device("cpu"))
    labels = features.labels("train")
    rows, val_rows = map(torch.from_numpy, draw_validation(labels, 0.25, 5))
    with watching(monkeypatch) as seen:
        sc.train(config)
    assert {each["mode"] for each in seen} == {"cls", "mean"}
    for each in seen:
        (trial,) = (t for t in config.parsed_methods()[0].trials[:2] if t.options.pool == each["mode"])  # type: ignore[attr-defined]
        readout = TrainingData(PooledFeatures(features)).new_model("linear_probe", trial, 0).readout
        values = PooledFeatures(features).whole("train", 2, readout)  # type: ignore[arg-type]
        assert torch.equal(each["data"].features, values[rows])
        assert torch.equal(each["data"].labels, labels[rows])
        assert torch.equal(each["data"].val_features, values[val_rows])
        assert torch.equal(each["data"].val_labels, labels[val_rows])


def test_the_views_of_a_sample_are_on_one_side(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("train.epochs=1", "methods=[{name: losa, rank: 4, token_rank: 2}]")
    features = StreamedFeatures(sc.extract(config).store, torch.device("cpu"))
    features.views = 4
    (entry,) = config.parsed_methods()
    with watching(monkeypatch) as seen:
        train_trials(entry, entry.trials, TrainingData(PooledFeatures(features)), settings_of(config, entry, 0), 0.5)
    samples, val_samples = ({int(row) // 4 for row in seen[0][name]} for name in ("rows", "val_rows"))
    assert samples | val_samples == set(range(6))
    assert not samples & val_samples


@pytest.mark.parametrize("method", ["linear_probe", "losa"])
def test_features_are_standardised_by_the_training_rows_alone(tiny_config: MakeConfig, method: str) -> None:
    config = tiny_config("train.epochs=1")
    pooled = PooledFeatures(StreamedFeatures(sc.extract(config).store, torch.device("cpu")))
    (entry,) = (entry for entry in config.parsed_methods() if entry.name == method)
    material, settings = TrainingData(pooled), settings_of(config, entry, 7)
    (candidate,) = train_trials(entry, entry.trials, material, settings, 0.25).candidates
    readout: Any = candidate.model.readout
    values = pooled.whole("train", 2, readout)
    rows, _ = draw_validation(pooled.features.labels("train"), 0.25, 7)
    trained_on = values[torch.from_numpy(rows)]
    torch.testing.assert_close(readout.mean, trained_on.mean(dim=0))
    torch.testing.assert_close(readout.std, trained_on.std(dim=0, correction=0))
    assert not torch.allclose(readout.std, values.std(dim=0, correction=0), rtol=1e-3)


@pytest.mark.parametrize("method", ["linear_probe", "losa"])
def test_classes_are_weighted_by_the_training_rows_alone(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = tiny_config("train.epochs=1", "train.class_weights=balanced")
    for number in (5, 6, 7):  # leaves five blue images, so that a split for validation changes the fractions
        (config.data.root / "train" / "blue" / f"{number}.png").unlink()  # type: ignore[operator]
    labels = torch.from_numpy(sc.extract(config).store.labels("train"))
    rows, _ = draw_validation(labels, 0.25, 0)
    with watching(monkeypatch) as seen:
        sc.train(config.model_copy(update={"methods": [m for m in config.methods if method in str(m)]}))
    assert not torch.allclose(class_weights(labels, 3), class_weights(labels[torch.from_numpy(rows)], 3))
    for each in seen:
        assert torch.equal(each["weights"], class_weights(labels[torch.from_numpy(rows)], 3))


SWEPT = {"losa": "{name: losa, rank: 4, token_rank: 2, sweep: {lr: [0.01, 0.001]}}", "bitfit": "bitfit"}
DECISIVE = {
    "losa": [
        "data.val_fraction=0.5",
        "train.seeds=[1]",
        "train.epochs=2",
        "train.batch_size=5",
        "train.weight_decay=0.5",
        "train.optimizer=sgd",
        "train.warmup=0.5",
        "train.class_weights=balanced",
        "train.precision=bfloat16",
        "train.head_lr=0.5",
        "train.grad_accumulation=2",
        "train.shuffle_block=4",
        "train.feature_source=online",
        "store.layers={last: 2}",
        "methods=[{name: losa, rank: 3, token_rank: 2, sweep: {lr: [0.01, 0.001]}}]",
    ],
    "bitfit": ["train.lr=0.02", "train.mixup=0.5", "train.augment=crop_flip", "train.grad_checkpointing=true"],
}


@pytest.mark.parametrize("method", SWEPT)
def test_every_setting_that_determines_a_result_gives_another_search_and_trial(
    tiny_config: MakeConfig, method: str
) -> None:
    """Otherwise a row of another job would be reused, or the learning rate that another job has chosen."""
    base = ["train.epochs=1", f"methods=[{SWEPT[method]}]"]
    config = tiny_config(*base)
    sc.extract(config)
    assert sc.train(config) == (rows := sc.train(config))
    for change in DECISIVE[method]:
        more = sc.train(tiny_config(*base, change))
        assert more[:-1] == rows, change
        rows = more
        searches = list((config.run_dir / "search").glob("*"))
        assert len(searches) == (len(rows) if "sweep" in SWEPT[method] else 0), change


@pytest.mark.parametrize("fails", ["save_adaptor", "write_results"])
def test_a_row_is_never_without_its_adaptor(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """If a kill prevents either of the two, the next run trains again and writes both."""
    config = tiny_config("methods=[linear_probe]")

    def die(*_: Any) -> None:
        raise JobError("killed")

    sc.extract(config)
    with monkeypatch.context() as patch:
        patch.setattr(adapt.job.trial_run, fails, die)
        with pytest.raises(JobError, match="killed"):
            sc.train(config)
    results = config.run_dir / "results.json"
    assert not results.exists()
    (row,) = sc.train(config)
    assert adapt.job.trial_run.adaptor_path(config.run_dir, row).exists()


def test_a_row_whose_adaptor_is_gone_is_trained_again(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[linear_probe]")
    (row,) = sc.run(config)
    path = adapt.job.trial_run.adaptor_path(config.run_dir, row)
    path.unlink()
    (again,) = sc.train(config)
    assert path.exists()
    assert (again.trial_id, again.top1) == (row.trial_id, row.top1)
