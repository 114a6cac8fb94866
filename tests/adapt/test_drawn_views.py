"""Training sees one view of each sample an epoch; whatever is solved or judged sees the plain one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.online import OnlineFeatures
from adapt.job.feature_set import open_features
from adapt.job.inputs import Inputs
from adapt.job.trial_run import adaptor_path
from adapt.planning.job_facts import JobFacts
from adapt.planning.planner import make_plan
from adapt.training.row_draw import RowDraw, draw_rows
from extract.forward.frozen_forward import FrozenForward
from store.reader import Store

MakeConfig = Callable[..., Config]
VIEWS, CPU = "data.views=3", torch.device("cpu")
LOSA = "methods=[{name: losa, rank: 4, token_rank: 2}]"
Shown = dict[int, int]  # row of train -> number of the view


def read_epoch(features: Any, epoch: int, groups: list[np.ndarray], seed: int = 0) -> dict[int, torch.Tensor]:
    """Row -> tokens of layer 2, as an epoch of training reads them."""
    batches = features.for_epoch(seed, epoch).batches("train", groups, [2])
    return {int(row): tokens for rows, of in batches for row, tokens in zip(rows, of[2], strict=True)}


def views_shown(store: Store, read: dict[int, torch.Tensor]) -> Shown:
    """Which view of its sample each row shows; fails if it is none of them, or not the only one."""
    plain, augmented = store.read("train", range(24))[2], store.read("augmented", range(48))[2].reshape(24, 2, 17, -1)
    shown = {}
    for row, tokens in read.items():
        views = [plain[row], *augmented[row]]
        [shown[row]] = [number for number, view in enumerate(views) if np.array_equal(view, tokens.numpy())]
    return shown


@pytest.fixture
def store(tiny_config: MakeConfig) -> Store:
    return sc.extract(tiny_config(VIEWS)).store


def test_every_epoch_draws_one_view_of_each_sample(store: Store) -> None:
    features = StreamedFeatures(store, CPU)
    batches = np.array_split(np.random.default_rng(0).permutation(24), 5)
    epochs = [views_shown(store, read_epoch(features, epoch, batches)) for epoch in range(12)]
    assert all(sorted(shown) == list(range(24)) for shown in epochs)
    counts = np.bincount([view for shown in epochs for view in shown.values()])
    assert len(counts) == 3
    assert counts.min() > 60, "all views are drawn about as often: 96 times of 288"
    assert all(len({shown[row] for shown in epochs}) > 1 for row in range(24))


def test_the_draw_does_not_depend_on_batches_seed_or_what_was_read_before(store: Store) -> None:
    features = StreamedFeatures(store, CPU)
    whole = views_shown(store, read_epoch(features, 3, [np.arange(24)]))
    assert views_shown(store, read_epoch(features, 3, [np.array([7]), np.array([20, 1])], seed=5)) == {
        row: whole[row] for row in (7, 20, 1)
    }
    assert views_shown(store, read_epoch(features, 4, [np.arange(24)])) != whole


@pytest.mark.parametrize("together", [1, 3])
def test_all_sources_draw_and_give_the_same(tiny_config: MakeConfig, store: Store, together: int) -> None:
    config = tiny_config(VIEWS)
    inputs, streamed = Inputs(config), StreamedFeatures(store, CPU)
    online = OnlineFeatures(inputs.source, FrozenForward(inputs.backbone, (0, 2), "all", config.extract), "all")
    groups = [np.array([3, 9, 4]), np.array([0]), np.arange(10, 24), np.array([5, 3])]
    for source in (ResidentFeatures(streamed, (0, 2)), online):
        expected = streamed.for_epoch(0, 1).batches("train", groups, [0, 2], together)
        for (rows, tokens), (own_rows, own) in zip(
            expected, source.for_epoch(0, 1).batches("train", groups, [0, 2], together), strict=True
        ):
            assert rows.tolist() == own_rows.tolist()
            assert all(torch.equal(tokens[layer], own[layer]) for layer in (0, 2))


def test_the_three_sources_train_to_the_same_bits(tiny_config: MakeConfig) -> None:
    trained = []
    for kind in ("resident", "streamed", "online"):
        config = tiny_config(VIEWS, LOSA, f"train.feature_source={kind}")
        row = next(row for row in sc.run(config) if row.feature_source == kind)
        trained.append((load_file(adaptor_path(config.run_dir, row)), row.top1, row.val_score))
    for tensors, *scores in trained[1:]:
        assert scores == list(trained[0][1:])
        assert all(torch.equal(tensors[name], tensor) for name, tensor in trained[0][0].items())


def test_no_view_of_a_validation_sample_is_read(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What judges a sample is the plain view, since a whole job reads no other one of it."""
    config = tiny_config(VIEWS, LOSA, "train.feature_source=streamed", "train.seeds=[0]")
    store = sc.extract(config).store
    fetch, drawn, read = Store.fetch, draw_rows(torch.from_numpy(store.labels("train")), RowDraw.of(config), seed=0), []

    def watch(self: Store, split: str, rows: Any, layers: Any = None) -> Any:
        read.extend((split, int(row)) for row in rows)
        return fetch(self, split, rows, layers)

    monkeypatch.setattr(Store, "fetch", watch)
    sc.train(config)
    training, validation = (set(rows.tolist()) for rows in drawn)
    samples = {row // 2 for split, row in read if split == "augmented"}
    assert samples
    assert samples <= training
    assert not samples & validation
    assert validation <= {row for split, row in read if split == "train"}


def test_what_is_solved_is_that_of_a_store_without_views(tiny_config: MakeConfig, tmp_path: Any) -> None:
    methods = "methods=[linear_probe, {name: knn}]"
    results = []
    for views in (1, 3):
        named = (f"run_dir={tmp_path}/run{views}", f"store.path={tmp_path}/{views}.zarr")
        rows = sc.run(tiny_config(f"data.views={views}", methods, *named))
        results.append({row.method: (row.top1, row.mean_class_accuracy, row.val_score) for row in rows})
    assert results[0] == results[1]


def test_subsets_and_validation_count_samples(tiny_config: MakeConfig) -> None:
    for override, trained in (("data.val_fraction=0.25", 18), ("train.shots=4", 9), ("train.fraction=0.5", 9)):
        config = tiny_config(VIEWS, override)
        assert JobFacts(config).trained_rows == trained
        assert JobFacts(config.model_copy(update={"data": tiny_config(override).data})).trained_rows == trained


@pytest.mark.parametrize("source", ["resident", "streamed", "online"])
def test_a_trial_with_views_is_another_one(tiny_config: MakeConfig, source: str) -> None:
    ids = set()
    for number, views in enumerate((1, 2, 3)):
        config = tiny_config(f"data.views={views}", LOSA, f"train.feature_source={source}")
        config = config.model_copy(
            update={"store": config.store.model_copy(update={"path": f"{config.store.path}{number}"})}
        )
        ids |= {row.trial_id for row in sc.run(config)}
    assert len(ids) == 3


def test_methods_that_train_through_the_backbone_ignore_views(tiny_config: MakeConfig) -> None:
    config = tiny_config(VIEWS, "methods=[bitfit]")
    sc.extract(config)
    images = open_features(config, Inputs(config), lambda _: None).training_data(trains_backbone=True).images
    assert images is not None
    assert {split: len(rows) for split, rows in images.rows.items()} == {"train": 24, "test": 12}


def test_a_plan_counts_rows_and_bytes_of_all_views(tiny_config: MakeConfig) -> None:
    plain, more = (make_plan(tiny_config(f"data.views={n}"), with_speeds=False) for n in (1, 3))
    assert more.samples == {"train": 24, "test": 12, "augmented": 48}
    assert (more.samples_to_extract, plain.samples_to_extract) == (84, 36)
    assert plain.store_bytes is not None
    assert more.store_bytes == plain.store_bytes * 84 // 36
