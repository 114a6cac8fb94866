"""The arithmetic of shards, layers and token grids, against brute force."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extract.backbones.backbone import reduce_tokens
from store.config import Every, Last, Pool, Spread
from store.errors import UserError
from store.layout import Shards, TokenLayout, cells_a_side, describe_tokens, reduced_layout, resolve_layers


@given(st.integers(0, 300), st.integers(1, 40))
def test_shards_cover_every_row_once_and_in_order(num_samples: int, shard_samples: int) -> None:
    shards = Shards(num_samples, shard_samples)
    assert [row for shard in shards for row in shards.rows(shard)] == list(range(num_samples))
    assert len(list(shards)) == len(shards)
    assert all(len(shards.rows(shard)) == shard_samples for shard in list(shards)[:-1])
    assert all(len(shards.rows(shard)) > 0 for shard in shards)


@given(st.integers(0, 50), st.integers(1, 10), st.integers(-3, 60))
def test_a_shard_that_does_not_exist_is_refused(num_samples: int, shard_samples: int, shard: int) -> None:
    shards = Shards(num_samples, shard_samples)
    if shard in list(shards):
        assert shards.rows(shard)
    else:
        with pytest.raises(UserError, match=rf"shard {shard} does not exist: there are {len(shards)}, numbered from 0"):
            shards.rows(shard)


@pytest.mark.parametrize(("num_samples", "shard_samples"), [(-1, 4), (4, 0)])
def test_sizes_that_make_no_shards_are_refused(num_samples: int, shard_samples: int) -> None:
    with pytest.raises(UserError, match="num_samples >= 0 and shard_samples >= 1"):
        Shards(num_samples, shard_samples)


@given(st.integers(1, 50))
def test_all_layers(depth: int) -> None:
    assert resolve_layers("all", depth) == tuple(range(depth))


@given(st.integers(1, 50), st.integers(1, 60))
def test_every_kth_layer_counts_back_from_the_last(depth: int, k: int) -> None:
    counted_back = [layer for layer in reversed(range(depth)) if (depth - 1 - layer) % k == 0]
    assert resolve_layers(Every(every=k), depth) == tuple(reversed(counted_back))


@given(st.integers(1, 60), st.integers(1, 60))
def test_spread_layers_are_at_most_n_at_equal_distances_and_the_last_is_one(depth: int, n: int) -> None:
    layers = resolve_layers(Spread(spread=n), depth)
    assert layers[-1] == depth - 1
    assert len(layers) <= n
    assert len(set(np.diff(layers))) <= 1
    assert depth > n or layers == tuple(range(depth))
    assert len(layers) > min(n, depth) // 2


@given(st.integers(1, 50), st.data())
def test_the_last_n_layers(depth: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, depth))
    assert resolve_layers(Last(last=n), depth) == tuple(range(depth))[-n:]


@given(st.integers(1, 50), st.data())
def test_listed_layers_become_absolute_ascending_and_unique(depth: int, data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1))
    blocks = list(range(depth))
    assert resolve_layers(layers, depth) == tuple(sorted({blocks[layer] for layer in layers}))


@given(st.integers(1, 50), st.integers(0, 5), st.booleans())
def test_a_layer_that_does_not_exist_is_named(depth: int, excess: int, negative: bool) -> None:
    wrong = -depth - 1 - excess if negative else depth + excess
    with pytest.raises(UserError, match=rf"\[{wrong}\] do not exist: this backbone has {depth}, numbered 0 to"):
        resolve_layers([0, wrong], depth)


def test_more_last_layers_than_there_are_and_no_layers_are_refused() -> None:
    with pytest.raises(UserError, match="asks for the last 4 layers, but this backbone has 3"):
        resolve_layers(Last(last=4), 3)
    with pytest.raises(UserError, match=r"layers \[\] do not exist"):
        resolve_layers([], 3)


@given(
    st.integers(0, 2), st.integers(0, 4), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from(["all", "mean", "cls", "cls_mean", Pool(pool=2), Pool(time=2),
                     Pool(grid=1), Pool(grid=2), Pool(grid=3, time=2)]),
)  # fmt: skip
def test_the_reduced_layout_is_that_of_the_reduced_tokens(
    classes: int, registers: int, sets: int, height: int, width: int, how: Any
) -> None:
    """Class tokens are numbered from 1 up, registers from -1 down; patches are 0."""
    per_set = [*range(1, classes + 1), *range(-1, -registers - 1, -1)]
    layout = TokenLayout(sets * len(per_set), (4, 2 * height, 2 * width), sets, num_class_tokens=sets * classes)
    tokens = torch.zeros(1, layout.num_tokens, 3)
    tokens[0, : layout.num_prefix_tokens] = torch.tensor(sets * per_set)[:, None].float()
    if how in ("cls", "cls_mean") and not classes:
        with pytest.raises(UserError, match="has no class token"):
            reduced_layout(layout, how)
        return
    reduced, values = reduced_layout(layout, how), reduce_tokens(tokens, layout, how)[0, :, 0].tolist()
    kept = {"mean": [], "cls": per_set[:classes], "cls_mean": per_set[:classes]}.get(str(how), per_set)
    assert len(values) == reduced.num_tokens
    assert values[: reduced.num_prefix_tokens] == reduced.prefix_sets * kept
    assert reduced.num_class_tokens == reduced.prefix_sets * sum(number > 0 for number in kept)


@pytest.mark.parametrize(
    ("prefix", "classes", "sets", "grid"),
    [(1, 2, 1, (4, 4)), (0, 1, 1, (4, 4)), (1, -1, 1, (4, 4)), (3, 1, 3, (3, 4, 4)), (4, 3, 3, (3, 4, 4)),
     (1, 1, 0, (4, 4)), (1, 1, 1, (0, 4)), (1, 1, 1, (-1, 4))],
)  # fmt: skip
def test_numbers_that_are_no_layout_are_refused(prefix: int, classes: int, sets: int, grid: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="token layout"):
        TokenLayout(prefix, grid, sets, num_class_tokens=classes)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_a_grid_has_at_most_n_cells_a_side_alike_where_they_can_be(height: int, width: int, n: int) -> None:
    layout = TokenLayout(0, (height, width), num_class_tokens=0)
    for side, cells in zip(layout.grid, cells_a_side(layout, Pool(grid=n)), strict=True):
        divisors = [part for part in range(1, side + 1) if side % part == 0]
        if side <= n:
            assert cells == side
        elif alike := [part for part in divisors if n / 2 < part <= n]:
            assert cells == max(alike)
        else:
            assert cells == n


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1, 2))
def test_cells_average_their_patches(height: int, width: int, n: int, time: int) -> None:
    """Cell i of n covers the patches from floor(i side / n) to ceil((i + 1) side / n), as torch's adaptive pooling."""
    layout = TokenLayout(1, (2, height, width), num_class_tokens=1)
    tokens = torch.randn(2, layout.num_tokens, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = Pool(grid=n, time=time)
    pooled = reduce_tokens(tokens, layout, how)
    patches = tokens[:, 1:].reshape(2, 2, height, width, 3)
    cells = cells_a_side(layout, how)
    covered = [
        [slice(i * side // number, -(-(i + 1) * side // number)) for i in range(number)]
        for side, number in zip(layout.grid, cells, strict=True)
    ]
    expected = [patches[:, t, y, x].mean(dim=(1, 2, 3)) for t in covered[0] for y in covered[1] for x in covered[2]]
    assert torch.equal(pooled[:, :1], tokens[:, :1])
    assert torch.allclose(pooled[:, 1:], torch.stack(expected, dim=1), atol=1e-12)
    assert reduced_layout(layout, how).grid == tuple(cells)


@pytest.mark.parametrize("side", [4, 6, 14])
def test_a_grid_that_divides_is_the_same_to_the_bit_as_its_pool(side: int) -> None:
    layout = TokenLayout(1, (side, side), num_class_tokens=1)
    tokens = torch.randn(2, layout.num_tokens, 3, generator=torch.Generator().manual_seed(0))
    by_grid, by_pool = (reduce_tokens(tokens, layout, how) for how in (Pool(grid=side // 2), Pool(pool=2)))
    assert torch.equal(by_grid, by_pool)


def test_pooling_averages_squares_and_keeps_prefixes() -> None:
    layout = TokenLayout(2, (4, 6), num_class_tokens=1)
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 26, 3)).astype(np.float32))
    pooled = reduce_tokens(tokens, layout, Pool(pool=2))
    assert torch.equal(pooled[:, :2], tokens[:, :2])
    grid = tokens[:, 2:].reshape(2, 4, 6, 3)
    for row in range(2):
        for column in range(3):
            square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
            torch.testing.assert_close(pooled[:, 2 + row * 3 + column], square)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("all", "all"),
        (Pool(pool=2), '{"pool":2}'),
        (Pool(pool=2, time=1), '{"pool":2}'),
        (Pool(time=4), '{"time":4}'),
        (Pool(pool=2, time=4), '{"pool":2,"time":4}'),
    ],
)
def test_the_text_by_which_stores_are_compared(how: object, text: str) -> None:
    assert describe_tokens(how) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("sides", [{}, {"pool": 1}, {"pool": 1, "time": 1}])
def test_a_pool_that_keeps_every_token_is_refused(sides: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="pool or time must be at least 2; `all` keeps every token"):
        Pool(**sides)


def test_a_pool_that_does_not_divide_the_grid_names_those_that_do() -> None:
    with pytest.raises(UserError, match=r"pools by 4, which does not divide the grid \(12, 6\); legal: \[2, 3, 6\]"):
        reduced_layout(TokenLayout(1, (12, 6), num_class_tokens=1), Pool(pool=4))


def test_cls_without_a_class_token_names_what_is_legal() -> None:
    with pytest.raises(UserError, match=r"has no class token; legal here: all, mean, \{pool: k\}"):
        reduced_layout(TokenLayout(0, (4, 4), num_class_tokens=0), "cls")


def test_registers_are_no_class_tokens() -> None:
    with pytest.raises(
        UserError, match=r"no class token \(4 registers are not class tokens\); legal here: all, mean, \{pool: k\}"
    ):
        reduced_layout(TokenLayout(4, (4, 4), num_class_tokens=0), "cls")


def test_a_layout_counts_prefixes_and_patches() -> None:
    assert TokenLayout(5, (3, 4), num_class_tokens=1).num_tokens == 17
    assert TokenLayout(1, (), num_class_tokens=1).num_patches == 0
    assert TokenLayout(1, (), num_class_tokens=1).num_tokens == 1
