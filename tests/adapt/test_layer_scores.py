"""The layers whose tokens hold the class are scored high and proposed, by what they are read for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_store import schema

from adapt.planning import layer_scores
from adapt.planning.layer_report import draw_scores
from adapt.planning.layer_scores import Judge, LayerScores, StoreScores, score_kernels, score_layers
from benchmarks.made_up import encode
from store.address import store_url
from store.arrays import STORED
from store.errors import JobError, UserError
from store.kvstore import KeyValueStore
from store.listing import Listing
from store.reader import Store, open_store
from store.schema import SplitInfo
from store.writer import StoreWriter, create_store

SAMPLES, LAYERS, TOKENS, DIM, CLASSES = 80, (0, 1, 2, 3), 5, 6, 3
CHANCE = 60  # percent, well above that of three classes in 80 samples


def draw_tokens(labels: np.ndarray, views: int = 1) -> dict[int, np.ndarray]:
    """Layer 1 has the class in all its tokens, layer 3 in which patch stands out, layers 0 and 2 nowhere."""
    generator = np.random.default_rng(0)
    rows = np.arange(len(labels))
    tokens = {layer: generator.normal(size=(len(labels), TOKENS, DIM)).astype(np.float32) for layer in LAYERS}
    tokens[1][rows, :, labels] += 2
    tokens[3][rows, 1 + labels] += 3 * np.array([1, -1, 1, -1, 1, -1], np.float32)
    return tokens


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    def make(
        tokens_of: Callable[[np.ndarray], dict[int, np.ndarray]] = draw_tokens, n_shards: int = 5, **changes: Any
    ) -> Store:
        fields = {"splits": {"train": SplitInfo(num_samples=SAMPLES)}, "layers": LAYERS, "depth": 4, "dim": DIM}
        wanted = schema(tail_tensors=(), shard_samples=16, **{**fields, **changes})
        views = wanted.views
        of_samples = np.random.default_rng(1).integers(0, len(wanted.classes), SAMPLES // views)
        labels = np.repeat(of_samples, views)
        kvstore = KeyValueStore(store_url(tmp_path / "scored.zarr"))
        ids = tuple(f"{row // views:04d}" for row in range(SAMPLES))
        stored = np.eye(CLASSES, dtype=np.uint8)[labels] if wanted.multi_label else labels
        create_store(kvstore, wanted, {"train": Listing(ids, stored, np.zeros((SAMPLES, 16), np.uint8))}, {}, {})
        writer, tokens = StoreWriter(kvstore, wanted), tokens_of(labels)
        for shard in list(wanted.shards("train"))[:n_shards]:
            rows = wanted.shards("train").rows(shard)
            part = {layer: encode(tokens[layer][rows.start : rows.stop], "float32", None) for layer in LAYERS}
            writer.commit("train", shard, part, np.full(len(rows), STORED, np.uint8))
        return open_store(tmp_path / "scored.zarr")

    return make


def by_reading(scores: StoreScores) -> dict[str, LayerScores]:
    return {reading.reading: reading for reading in scores.readings}


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_layer_is_worth_what_its_reading_can_tell(make_store: Callable[..., Store], multi_label: bool) -> None:
    scores = score_layers(make_store(multi_label=multi_label))
    pooled, grid = (by_reading(scores)[name] for name in ("pooled", "grid"))
    assert scores.n_samples == SAMPLES
    assert scores.metric == ("mean average precision" if multi_label else "accuracy")
    assert pooled.alone[1] > 95
    assert max(pooled.alone[layer] for layer in (0, 2, 3)) < CHANCE
    assert (pooled.order[0], pooled.proposed) == (1, [1])
    assert min(grid.alone[1], grid.alone[3]) > 90
    assert max(grid.alone[layer] for layer in (0, 2)) < CHANCE
    assert grid.order[0] in (1, 3)
    assert pooled.without[1] < CHANCE < pooled.without[0]
    assert sorted(pooled.order) == list(LAYERS)


def test_scores_of_layers_together_are_those_of_all_their_features() -> None:
    """Kernels add up over layers as features are put side by side."""
    generator = torch.Generator().manual_seed(0)
    features = {layer: torch.randn(40, 5, generator=generator, dtype=torch.float64) for layer in (2, 5)}
    labels = (features[2][:, 0] + features[5][:, 0] > 0).long()
    judge = Judge(labels, 2)
    scores = score_kernels("pooled", {layer: values @ values.T for layer, values in features.items()}, judge)
    both = torch.cat(list(features.values()), dim=1)
    assert scores.together == judge(both @ both.T).score == scores.scores[-1]
    assert scores.without == {2: scores.alone[5], 5: scores.alone[2]}


def test_layers_that_gain_no_more_than_their_error_are_not_proposed() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=generator)
    good, noise = (
        labels[:, None].double() + 0.2 * torch.randn(200, 1, generator=generator),
        torch.randn(200, 1).double(),
    )
    features = {0: noise, 1: good, 2: good + 1e-3 * noise}
    scores = score_kernels("grid", {layer: values @ values.T for layer, values in features.items()}, Judge(labels, 2))
    assert len(scores.proposed) == 1
    assert scores.proposed[0] in (1, 2)


def test_only_the_best_layers_are_chosen_of_a_deep_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_scores, "MOST_LAYERS", 2)
    kernels = {layer: torch.eye(6).double() for layer in range(4)}
    scores = score_kernels("pooled", kernels, Judge(torch.tensor([0, 1] * 3), 2))
    assert len(scores.order) == len(scores.scores) == 2
    assert set(scores.alone) == set(range(4))


def test_views_of_a_sample_are_never_on_both_sides(make_store: Callable[..., Store]) -> None:
    """The second views hold the class, the first ones nothing."""

    def tokens_of(labels: np.ndarray) -> dict[int, np.ndarray]:
        tokens = draw_tokens(labels)
        noise = draw_tokens(np.zeros_like(labels))
        return {layer: np.where(np.arange(SAMPLES)[:, None, None] % 2, tokens[layer], noise[0]) for layer in LAYERS}

    scores = score_layers(make_store(tokens_of, views=2, num_prefix_tokens=1))
    assert scores.n_samples == SAMPLES // 2
    assert all(max(reading.alone.values()) < CHANCE + 10 for reading in scores.readings)


def test_a_store_without_patches_has_no_grid(make_store: Callable[..., Store]) -> None:
    store = make_store(lambda labels: {k: v[:, :1] for k, v in draw_tokens(labels).items()}, grid=())
    assert list(by_reading(score_layers(store))) == ["pooled"]


def test_fewer_samples_are_drawn_alike(make_store: Callable[..., Store]) -> None:
    store = make_store()
    assert score_layers(store, n_samples=30) == score_layers(store, n_samples=30)
    assert score_layers(store, n_samples=30).n_samples == 30


def test_samples_are_as_many_as_fit(make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_scores, "_MOST_BYTES", 25 * 4 * TOKENS * DIM)
    assert score_layers(make_store()).n_samples == 25


def test_a_store_of_one_class_is_refused(make_store: Callable[..., Store]) -> None:
    store = make_store(classes=("only",))
    with pytest.raises(UserError, match=r"80 training samples of 1 classes: scores need at least two"):
        score_layers(store)


def test_an_incomplete_store_is_refused(make_store: Callable[..., Store]) -> None:
    with pytest.raises(JobError, match="lacks 3 of 5 shards"):
        score_layers(make_store(n_shards=2))


def test_curves_are_drawn_alike(make_store: Callable[..., Store]) -> None:
    scores = score_layers(make_store())
    figure = draw_scores(scores)
    assert figure == draw_scores(scores)
    assert figure.count("layers, each added to those before it") == 2
