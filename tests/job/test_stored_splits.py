"""A store without the test split: the same results as with it, by one pass of the frozen backbone at the end."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from numpy.testing import assert_array_equal
from run_command import Command

import adapt.job.trial_batch
import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job.extraction import repair
from adapt.job.inputs import Inputs
from adapt.planning.layer_scores import score_layers
from adapt.run_dir.predictions import Predictions, predictions_path, read_predictions
from adapt.run_dir.results import Row
from extract.forward.frozen_forward import FrozenForward
from store.errors import JobError, Note, UserError
from store.inspect import describe_store
from store.verify import verify_store
from store.verify_report import damaged_shards

MakeConfig = Callable[..., Config]
N_TRAIN, N_TEST = 24, 12
LEFT_OUT = "store.splits=[train]"
LOSA = "{name: losa, rank: 4, token_rank: 2, sweep: {lr: [0.01, 0.001]}}"
METHODS = f"methods=[linear_probe, {LOSA}, {{name: conv_ladder, width: 4}}]"


def both_ways(tiny_config: MakeConfig, *overrides: str) -> tuple[Config, Config]:
    """The same job with a store of both splits, and with one that lacks the test split."""
    base = tiny_config().run_dir.parent
    return (
        tiny_config(*overrides, f"store.path={base / 'both.zarr'}", f"run_dir={base / 'both'}"),
        tiny_config(*overrides, LEFT_OUT, f"store.path={base / 'train.zarr'}", f"run_dir={base / 'train'}"),
    )


def predictions_by_trial(config: Config, rows: list[Row]) -> dict[str, Predictions]:
    return {row.trial_id: read_predictions(predictions_path(config.run_dir, row)) for row in rows}


@contextmanager
def counted_samples() -> Iterator[list[int]]:
    """The number of samples of every batch that goes through the frozen backbone."""
    sizes, forward = list[int](), FrozenForward.__call__

    def count(it: FrozenForward, images: Any, layers: Any = None) -> Any:
        sizes.append(len(images))
        return forward(it, images, layers)

    with mock.patch.object(FrozenForward, "__call__", count):
        yield sizes


def assert_same_results(of_both: tuple[Config, list[Row]], of_train: tuple[Config, list[Row]]) -> None:
    """On a CPU logits agree to the bit: the batches are the same, those of the backbone and those of the models."""
    (_, rows), (_, others) = of_both, of_train
    metrics = ("trial_id", "top1", "mean_class_accuracy", "macro_f1", "val_score", "best_epoch")
    figures = [sorted(tuple(getattr(row, name) for name in metrics) for row in each) for each in (rows, others)]
    assert figures[0] == figures[1]
    expected, found = predictions_by_trial(*of_both), predictions_by_trial(*of_train)
    for trial, predicted in expected.items():
        assert found[trial].sample_ids == predicted.sample_ids
        assert_array_equal(found[trial].labels, predicted.labels)
        assert_array_equal(found[trial].logits, predicted.logits)


# The same figures


@pytest.mark.parametrize(
    ("dtype", "source"),
    [
        ("float32", "streamed"),
        ("float16", "resident"),
        ("bfloat16", "streamed"),
        ("int8", "resident"),
        ("int8", "streamed"),
        ("int4", "resident"),
    ],
)
def test_results_are_those_of_a_store_of_both_splits(tiny_config: MakeConfig, dtype: str, source: str) -> None:
    both, train = both_ways(tiny_config, METHODS, f"store.dtype={dtype}", f"train.feature_source={source}")
    rows, others = sc.run(both), sc.run(train)
    assert sc.open_store(train.store.path).splits == ("train",)
    assert {row.feature_source for row in others} == {source}
    assert len(others) == 3
    assert_same_results((both, rows), (train, others))


@pytest.mark.parametrize("tokens", ["cls_mean", "{pool: 2}"])
def test_results_agree_where_tokens_are_reduced(tiny_config: MakeConfig, tokens: str) -> None:
    """Then one batch of the models takes the samples of several shards."""
    both, train = both_ways(tiny_config, f"store.tokens={tokens}", "store.dtype=int8", "store.layers=[0, 2]")
    assert_same_results((both, sc.run(both)), (train, sc.run(train)))


def test_the_views_of_a_sample_are_averaged_as_with_a_store_of_both(tiny_config: MakeConfig) -> None:
    both, train = both_ways(tiny_config, METHODS, "store.dtype=int8")
    source = replace(Inputs(both).source, views=2)
    rows, others = sc.run(both, source), sc.run(train, source)
    assert_same_results((both, rows), (train, others))
    assert len(next(iter(predictions_by_trial(train, others).values())).sample_ids) == N_TEST // 2


def test_the_batches_of_models_and_of_the_backbone_need_not_agree(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapt.features.frozen.FrozenFeatures.samples_at_once", lambda *_: 7)
    both, train = both_ways(tiny_config, METHODS, "store.dtype=float16", "extract.batch_size=3")
    assert_same_results((both, sc.run(both)), (train, sc.run(train)))


def test_augmented_views_of_the_training_samples_are_stored_without_the_test_split(tiny_config: MakeConfig) -> None:
    both, train = both_ways(tiny_config, "data.views=3", f"methods=[{LOSA}]")
    assert_same_results((both, sc.run(both)), (train, sc.run(train)))
    assert sc.open_store(train.store.path).splits == ("train", "augmented")


def test_methods_that_train_inside_the_backbone_need_no_stored_test_split(tiny_config: MakeConfig) -> None:
    both, train = both_ways(tiny_config, "methods=[linear_probe, bitfit]", "train.epochs=1")
    assert_same_results((both, sc.run(both)), (train, sc.run(train)))


# One pass


def test_all_methods_and_seeds_share_one_pass_of_the_backbone(tiny_config: MakeConfig) -> None:
    config = tiny_config(METHODS, LEFT_OUT, "train.seeds=[0, 1]")
    with counted_samples() as sizes:
        sc.extract(config)
        assert sum(sizes) == N_TRAIN
        sizes.clear()
        assert len(sc.train(config)) == 6
        assert sum(sizes) == N_TEST
        sizes.clear()
        assert len(sc.train(config)) == 6, "nothing is trained again"
        assert sizes == []


# Stores that have more, or less, than the job asks for


def test_a_test_split_that_is_stored_is_read(tiny_config: MakeConfig) -> None:
    sc.extract(tiny_config())
    with counted_samples() as sizes:
        sc.run(tiny_config(LEFT_OUT))
    assert sizes == []


def test_a_store_is_completed_by_a_job_that_asks_for_both_splits(tiny_config: MakeConfig) -> None:
    rows = sc.run(tiny_config(LEFT_OUT))
    with counted_samples() as sizes:
        assert sc.run(tiny_config()) == rows, "the trials are the same, so they are finished"
    assert sum(sizes) == N_TEST


def test_training_alone_takes_the_store_as_it_is(tiny_config: MakeConfig) -> None:
    sc.extract(tiny_config(LEFT_OUT))
    assert len(sc.train(tiny_config())) == 2


def test_other_test_samples_give_other_trials(tiny_config: MakeConfig, image_folder: Path) -> None:
    rows = sc.run(tiny_config(LEFT_OUT))
    (image_folder / "test/blue/0.png").unlink()
    again = sc.run(tiny_config(LEFT_OUT))
    assert {row.trial_id for row in rows} < {row.trial_id for row in again}


def test_such_a_store_is_inspected_verified_and_repaired(tiny_config: MakeConfig) -> None:
    config = tiny_config(LEFT_OUT)
    store = sc.extract(config).store
    description = describe_store(store)
    assert (list(description["splits"]), description["complete"]) == (["train"], True)
    assert score_layers(store, n_samples=N_TRAIN)
    (chunk, *_) = sorted(path for path in Path(config.store.path).glob("train/layer_00/c/**/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"\0" * 9)
    report = verify_store(config.store.path)
    assert damaged_shards(report) == {"train": [0]}
    repair(config, Inputs(config), damaged_shards(report))
    assert verify_store(config.store.path).ok


# What stops a job before it trains


def refused_before_training(config: Config, error: type[Exception], message: str, **more: Any) -> None:
    with (
        mock.patch.object(adapt.job.trial_batch, "train_entries", side_effect=AssertionError("it trains")),
        pytest.raises(error, match=message),
    ):
        sc.train(config, **more)


def test_samples_that_are_gone_stop_the_job(tiny_config: MakeConfig, image_folder: Path) -> None:
    config = tiny_config(LEFT_OUT)
    sc.extract(config)
    shutil.rmtree(image_folder)
    message = (
        f"the store {re.escape(sc.open_store(config.store.path).url)} lacks the split test, so that training needs"
    )
    refused_before_training(config, UserError, f"{message} its samples and the backbone: .*images")


def test_weights_that_are_gone_stop_the_job(tiny_config: MakeConfig, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(Inputs(tiny_config()).backbone.module.state_dict(), weights)
    config = tiny_config(LEFT_OUT, f"backbone.weights={weights}")
    sc.extract(config)
    weights.unlink()
    refused_before_training(config, UserError, "lacks the split test, so that training needs .*weights.pt")


def test_other_weights_and_other_classes_stop_the_job(tiny_config: MakeConfig, image_folder: Path) -> None:
    config = tiny_config(LEFT_OUT)
    sc.extract(config)
    other = Inputs(config).backbone
    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    refused_before_training(config, UserError, "provenance.weights_digest: stored", backbone=other)
    for split in ("train", "test"):
        (image_folder / split / "red").rename(image_folder / split / "yellow")
    refused_before_training(config, UserError, "classes: stored .*'red'.*wanted .*'yellow'")


# Samples that cannot be decoded


def damage(image_folder: Path, *names: str) -> None:
    for name in names:
        file = image_folder / "test" / name
        file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("methods", ["linear_probe", "bitfit"])
def test_undecodable_samples_are_left_out_and_listed(tiny_config: MakeConfig, image_folder: Path, methods: str) -> None:
    damage(image_folder, "blue/1.png", "red/0.png")
    both, train = both_ways(tiny_config, f"methods=[{methods}]", "data.on_error=skip", "store.dtype=int8")
    rows = sc.run(both)
    sc.extract(train)
    with pytest.warns(Note, match=r"2 samples of test are left out:\n  .*'test/blue/1.png'.*\n  .*'test/red/0.png'"):
        others = sc.train(train)
    (expected,), (found,) = (predictions_by_trial(c, r).values() for c, r in ((both, rows), (train, others)))
    assert found.sample_ids == expected.sample_ids
    assert len(found.sample_ids) == N_TEST - 2
    assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-2, atol=1e-3)
    assert [row.top1 for row in others] == [row.top1 for row in rows]


def test_an_undecodable_sample_stops_the_job_which_goes_on_with_skip(
    tiny_config: MakeConfig, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapt.training.checkpoint.Checkpoint.is_due", True)
    damage(image_folder, "blue/1.png")
    losa = "methods=[{name: losa, rank: 4, token_rank: 2}]"
    config = tiny_config(LEFT_OUT, losa)
    sc.extract(config)
    with pytest.raises(UserError, match=r"'test/blue/1.png' cannot be decoded.*data\.on_error: skip"):
        sc.train(config)
    steps = mock.patch("adapt.training.loop.Loop.train", side_effect=AssertionError("it trains again"))
    with pytest.warns(Note, match="1 samples of test are left out"), steps:
        (row,) = sc.train(tiny_config(LEFT_OUT, losa, "data.on_error=skip"))
    assert row.top1 is not None


def test_a_test_split_of_damaged_samples_alone_is_refused(tiny_config: MakeConfig, image_folder: Path) -> None:
    damage(image_folder, *(f"{name}/{k}.png" for name in ("blue", "green", "red") for k in range(4)))
    config = tiny_config(LEFT_OUT, "data.on_error=skip")
    sc.extract(config)
    with pytest.raises((UserError, JobError), match="no sample of test can be decoded"):
        sc.train(config)


# Options


@pytest.mark.parametrize("splits", ["[]", "[test]", "[test, train]", "[train, train]", "[train, val]", "train"])
def test_other_lists_of_splits_are_refused(tiny_config: MakeConfig, splits: str) -> None:
    with pytest.raises(UserError, match=r"store\.splits.*legal: \[train, test\] or \[train\]"):
        tiny_config(f"store.splits={splits}")


def test_an_online_job_says_that_it_stores_nothing(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    sc.run(tiny_config(LEFT_OUT, "train.feature_source=online"))
    message = "train.feature_source is online: nothing is stored, and store.splits has no effect"
    assert message in capsys.readouterr().err


def test_the_command_trains_from_such_a_store(tiny_config: MakeConfig, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(tiny_config(LEFT_OUT).model_dump(mode="json")))
    status, _, err = command("run", str(file))
    assert status == 0, err
    assert "extracted 24 samples" in err
    assert "test is not stored: its 12 samples go through the backbone once, after the training" in err
