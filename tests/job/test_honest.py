"""Results are honest: trials are chosen, trained, standardized and weighted by training and validation rows only.

The test split is read once for all chosen models of a pass, at the end; every setting that determines a result is part
of the id of trial and search. Planted leaks are reported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from watched_training import SplitReads, WatchedTraining

import adapt.job.method_search
import adapt.job.trial_batch
import adapt.job.trial_run
import adapt.training.loop
import adapt.training.seed_draw
import adapt.training.trials
import sidecache as sc
from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.inputs import Inputs
from adapt.job.training_job import measure_intrinsic_dimension
from adapt.job.trial_run import settings_of
from adapt.methods.registry import METHODS
from adapt.run_dir.files import read_json
from adapt.training.evaluation import predict_logits, predict_split
from adapt.training.loop import Loop, TrainingPass
from adapt.training.objective import Objective, class_weights
from adapt.training.row_draw import RowDraw, draw_rows
from adapt.training.seed_part import SeedParts
from adapt.training.trials import Entry, TrainingData, train_entries
from store.errors import JobError

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


@pytest.mark.parametrize(
    ("needs", "source", "splits"),
    [
        ("features", "resident", "[train, test]"),
        ("features", "streamed", "[train, test]"),
        ("features", "online", "[train, test]"),
        ("features", "resident", "[train]"),
        ("features", "streamed", "[train]"),
        pytest.param("end_to_end", "resident", "[train, test]", marks=pytest.mark.slow),
        pytest.param("end_to_end", "resident", "[train]", marks=pytest.mark.slow),
    ],
)
def test_the_test_split_is_read_once_a_pass_and_never_before(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, needs: str, source: str, splits: str
) -> None:
    """Over all methods, each with a search and two seeds: those that train from features share a pass."""
    methods = entries(needs)
    config = tiny_config(
        f"methods={methods}",
        f"train.feature_source={source}",
        f"store.splits={splits}",
        "train.epochs=1",
        "train.seeds=[0, 1]",
    )
    sc.extract(config)  # reads all splits, but its result depends on no label
    reads = SplitReads(monkeypatch)
    rows = sc.train(config)
    assert reads.too_early == []
    assert reads.evaluated == [list(range(N_TEST))] * (1 if needs == "features" else len(rows))
    assert sorted(row.method for row in rows) == sorted(method["name"] for method in methods for _ in range(2))


def test_every_way_to_the_test_split_is_seen(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    store, inputs = sc.extract(config).store, Inputs(config)
    reads = SplitReads(monkeypatch)
    streamed = StreamedFeatures(store, torch.device("cpu"))
    for read in (
        lambda: streamed.labels("test"),
        lambda: next(ResidentFeatures(streamed, [2]).batches("test", [np.arange(2)], [2])),
        lambda: store.read("test", [0]),
        lambda: store.dataset("test")[0],
        lambda: inputs.source.splits["test"][0],
    ):
        reads.too_early.clear()
        read()
        assert reads.too_early


def test_measuring_the_intrinsic_dimension_reads_no_test_row(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.epochs=1")
    sc.extract(config)
    reads = SplitReads(monkeypatch)
    measure_intrinsic_dimension(config, Inputs(config), None, [4])
    assert (reads.too_early, reads.evaluated) == ([], [])


def draw(labels: torch.Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a seed trains and validates on."""
    return draw_rows(labels, RowDraw(val_fraction=0.25), seed=seed)


def entry_of(config: Config, method: MethodConfig, seed: int) -> Entry:
    """The only trial of a method, from a seed."""
    (trial,) = method.trials
    return Entry(method=method.name, trial=trial, seed=seed, settings=settings_of(config, method))


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Record what `fit` and `solve_heads` train: rows to train and validate on, labels and class weights."""
    seen: list[dict[str, Any]] = []
    fit, solve = adapt.training.trials.fit, adapt.training.trials.solve_heads

    def fit_seen(job: TrainingPass, checkpoint: Path | None) -> None:
        for data in [candidate.data for candidate in job.candidates]:
            weights = data.objective.weights
            seen.append({"seed": data.seed, "rows": data.rows, "val_rows": data.val_rows, "weights": weights})
        fit(job, checkpoint)

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
    assert [each["seed"] for each in seen] == [3, 3, 3, 4]  # the search of two points uses the first seed
    for each in seen:
        rows, val_rows = draw(torch.from_numpy(store.labels("train")), each["seed"])
        assert np.array_equal(each["rows"], rows)
        assert np.array_equal(each["val_rows"], val_rows)
    assert not np.array_equal(seen[0]["val_rows"], seen[3]["val_rows"])


def test_a_probe_is_solved_on_training_rows_and_chosen_by_validation_rows(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(f"methods=[{PROBE}]", "train.seeds=[5]")
    store = sc.extract(config).store
    features = StreamedFeatures(store, torch.device("cpu"))
    labels = features.labels("train")
    rows, val_rows = map(torch.from_numpy, draw(labels, 5))
    with watching(monkeypatch) as seen:
        sc.train(config)
    assert {each["mode"] for each in seen} == {"cls", "mean"}
    for each in seen:
        (trial,) = (t for t in config.parsed_methods()[0].trials[:2] if t.options.pool == each["mode"])  # type: ignore[attr-defined]
        readout = TrainingData(PooledFeatures(features)).new_model("linear_probe", trial, 0).readout
        values = PooledFeatures(features).whole("train", readout)  # type: ignore[arg-type]
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
        train_entries(
            [entry_of(config, entry, seed=0)], TrainingData(PooledFeatures(features)), RowDraw(val_fraction=0.5)
        )
    samples, val_samples = ({int(row) // 4 for row in seen[0][name]} for name in ("rows", "val_rows"))
    assert samples | val_samples == set(range(6))
    assert not samples & val_samples


@pytest.mark.parametrize("method", ["linear_probe", "losa"])
def test_features_are_standardised_by_the_training_rows_alone(tiny_config: MakeConfig, method: str) -> None:
    config = tiny_config("train.epochs=1")
    pooled = PooledFeatures(StreamedFeatures(sc.extract(config).store, torch.device("cpu")))
    (entry,) = (entry for entry in config.parsed_methods() if entry.name == method)
    (candidate,) = train_entries([entry_of(config, entry, seed=7)], TrainingData(pooled), RowDraw(val_fraction=0.25))
    readout: Any = candidate.model.readout
    values = pooled.whole("train", readout)
    rows, _ = draw(pooled.features.labels("train"), 7)
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
    rows, _ = draw(labels, 0)
    with watching(monkeypatch) as seen:
        sc.train(config.model_copy(update={"methods": [m for m in config.methods if method in str(m)]}))
    assert not torch.allclose(class_weights(labels, 3), class_weights(labels[torch.from_numpy(rows)], 3))
    for each in seen:
        assert torch.equal(each["weights"], class_weights(labels[torch.from_numpy(rows)], 3))


SWEPT = {"losa": "{name: losa, rank: 4, token_rank: 2, sweep: {lr: [0.01, 0.001]}}", "bitfit": "bitfit"}
DECISIVE = {
    "losa": [
        "data.val_fraction=0.5",
        "train.shots=4",
        "train.fraction=0.5",
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
        "train.mixup=0.5",
        "train.feature_noise=0.1",
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
        more = {row.trial_id: row for row in sc.train(tiny_config(*base, change))}
        assert len(more) == len(rows) + 1, change
        assert {row.trial_id: row for row in rows}.items() <= more.items(), change
        rows = [*more.values()]
        searches = list((config.run_dir / "search").glob("*"))
        assert len(searches) == (len(rows) if "sweep" in SWEPT[method] else 0), change


def test_a_refit_is_another_trial_of_the_same_search(tiny_config: MakeConfig) -> None:
    base = ["train.epochs=1", f"methods=[{SWEPT['losa']}]"]
    config = tiny_config(*base)
    sc.extract(config)
    (plain,) = sc.train(config)
    both = sc.train(tiny_config(*base, "train.refit=true"))
    assert len(both) == 2
    assert plain in both
    assert len(list((config.run_dir / "search").glob("*"))) == 1


def test_another_version_of_training_gives_another_search_and_trial(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.epochs=1", f"methods=[{SWEPT['losa']}]")
    sc.extract(config)
    (row,) = sc.train(config)
    for module in (adapt.job.method_search, adapt.job.trial_run):
        monkeypatch.setattr(module, "TRAINING_VERSION", -1)
    both = sc.train(config)
    assert len(both) == 2
    assert row in both
    assert {each.top1 for each in both} == {row.top1}
    assert len(list((config.run_dir / "search").glob("*"))) == 2


@pytest.mark.parametrize("fails", ["save_adaptor", "write_predictions", "write_results"])
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


# Leaks


LEAKING = {"name": "losa", **SMALL["losa"], "sweep": {"lr": [0.01, 0.001]}}


def train_on_test_rows(patch: pytest.MonkeyPatch) -> None:
    def read(loop: Loop, epoch: int, batches: Any) -> Iterator[Any]:
        rows = [part % N_TEST for parts in batches for _, part in parts]
        return (values for _, values in loop._job.inputs.batches("test", rows, loop._layers))

    patch.setattr(Loop, "_read", read)


def train_on_test_labels(patch: pytest.MonkeyPatch) -> None:
    test = torch.arange(3).repeat_interleave(4)
    patch.setattr(SeedParts, "_labels_of", lambda _, rows: test[torch.from_numpy(rows % N_TEST)])


def train_on_the_labels_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    labels_of = SeedParts._labels_of
    patch.setattr(SeedParts, "_labels_of", lambda it, rows: labels_of(it, rows - 1))


def train_on_validation_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        adapt.training.seed_draw,
        "draw_rows",
        lambda labels, *args, **more: (np.arange(len(labels)), draw_rows(labels, *args, **more)[1]),
    )


def validate_on_training_rows(patch: pytest.MonkeyPatch) -> None:
    drawn = adapt.training.trials.rows_of_seed

    def swap(*args: Any) -> Any:
        data = drawn(*args)
        return replace(data, val_rows=data.rows)

    patch.setattr(adapt.training.trials, "rows_of_seed", swap)


def validate_on_test_rows(patch: pytest.MonkeyPatch) -> None:
    def predict(candidates: Any, inputs: Any, split: str, rows: Any, precision: str) -> Any:
        return predict_logits(candidates, inputs, "test", [np.arange(len(of)) for of in rows], precision)

    patch.setattr(adapt.training.loop, "predict_logits", predict)


def validate_with_other_labels(patch: pytest.MonkeyPatch) -> None:
    judge = Objective.judge
    patch.setattr(Objective, "judge", lambda it, logits, labels: judge(it, logits, labels.flip(0)))


def solve_on_validation_rows(patch: pytest.MonkeyPatch) -> None:
    made = adapt.training.trials.ProbeData
    patch.setattr(adapt.training.trials, "ProbeData", lambda *parts: made(*parts[2:], *parts[2:]))


def solve_on_test_rows(patch: pytest.MonkeyPatch) -> None:
    made, solve = adapt.training.trials.ProbeData, adapt.training.trials._solve

    def solve_with(candidates: Any, pooled: PooledFeatures) -> None:
        readout: Any = candidates[0].model.readout
        test = pooled.whole("test", readout), pooled.features.labels("test")
        patch.setattr(adapt.training.trials, "ProbeData", lambda *parts: made(*test, *parts[2:]))
        solve(candidates[:1], pooled)

    patch.setattr(adapt.training.trials, "_solve", solve_with)


def evaluate_with_training_labels(patch: pytest.MonkeyPatch) -> None:
    labels = StreamedFeatures.labels
    patch.setattr(
        StreamedFeatures,
        "labels",
        lambda it, split: labels(it, "train")[:N_TEST] if split == "test" else labels(it, split),
    )


def evaluate_training_rows(patch: pytest.MonkeyPatch) -> None:
    def predict(candidates: Any, inputs: Any, split: str, precision: str) -> Any:
        return predict_logits(candidates, inputs, "train", [np.arange(N_TEST)] * len(candidates), precision)

    patch.setattr(adapt.job.trial_batch, "predict_split", predict)


def evaluate_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapt.job.trial_batch, "predict_split", lambda *args: (predict_split(*args), predict_split(*args))[1])


LEAKS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (train_on_test_rows, "trained on a row of the test split"),
    (train_on_test_labels, "trained with the label of another row"),
    (train_on_the_labels_of_other_rows, "trained with the label of another row"),
    (train_on_validation_rows, "trained on a row for validation"),
    (validate_on_training_rows, "validated on a row of the train split that is not for validation"),
    (validate_on_test_rows, "validated on a row of the test split that is not for validation"),
    (validate_with_other_labels, "validated with labels that are not those of the rows for validation"),
    (solve_on_validation_rows, "trained on a row for validation"),
    (solve_on_test_rows, "trained on a row of the test split"),
    (evaluate_with_training_labels, "evaluated with labels that are not those of the test split"),
    (evaluate_training_rows, "a row of the training split was evaluated as one of the test split"),
    (evaluate_twice, "an evaluation read 24 rows of the test split, not each row once"),
]


@pytest.mark.parametrize(("plant", "fault"), LEAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_leak_is_reported(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], fault: str
) -> None:
    config = tiny_config(f"methods=[{PROBE}, {LEAKING}]", "train.feature_source=streamed", "train.epochs=1")
    watched = WatchedTraining(monkeypatch, config, sc.extract(config).store)
    plant(monkeypatch)
    sc.train(config)
    assert fault in watched.faults


@pytest.mark.parametrize("refit", [False, True])
def test_a_job_without_a_leak_has_none_reported(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, refit: bool
) -> None:
    """Also one that trains on all rows in the end; its score is that of the search, on rows that were held out."""
    config = tiny_config(
        f"methods=[{PROBE}, {LEAKING}, attentive_probe]",
        "train.feature_source=streamed",
        "train.epochs=1",
        "train.seeds=[0, 1]",
        f"train.refit={str(refit).lower()}",
    )
    store = sc.extract(config).store
    watched = WatchedTraining(monkeypatch, config, store)
    rows = sc.train(config)
    assert watched.faults == []
    labels = torch.from_numpy(store.labels("train"))
    for seed, trained in watched.trained.items():
        assert trained == {*(range(len(labels)) if refit else draw(labels, seed)[0].tolist())}
    for row in rows if refit else ():
        (scores,) = (config.run_dir / "search").glob(f"{row.method}-*.json")
        assert row.val_score == max(point["score"] for point in read_json(scores)["points"])
        assert row.best_epoch == 1 or row.lr is None
