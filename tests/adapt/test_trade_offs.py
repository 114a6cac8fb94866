"""Accuracy against cost: the charts, their axes, labels and fronts, and what the cache cost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_rows import make_row

from adapt.report.cache_cost import cache_cost
from adapt.report.chart import charts
from adapt.report.chart_labels import Box, place_label
from adapt.report.comparison import comparisons_of
from adapt.report.cost_axis import scale_of
from adapt.report.pareto import front_of
from adapt.report.seed_averages import summarize

ROWS = [
    make_row("linear_probe", 0, top1=79.0, trainable_params=0),
    make_row("linear_probe", 1, top1=81.0, trainable_params=0),
    make_row("losa", 0, top1=95.0),
    make_row("losa", 2, top1=97.0),
]


def test_the_chart_shows_zero_parameters_and_a_label_for_every_group():
    (comparison,) = comparisons_of(summarize(ROWS))
    svg = charts(comparison)[0].drawing
    for expected in (">0<", ">10k<", ">30k<", ">linear_probe<", ">losa<"):
        assert expected in svg


@pytest.mark.parametrize("params", [[0], [1], [5, 5], [1000], [0, 10**9], [1, 10**10]])
def test_any_range_of_parameters_can_be_drawn(params):
    rows = [make_row(f"m{i}", trainable_params=p, top1=100.0) for i, p in enumerate(params)]
    svg = charts(comparisons_of(summarize(rows))[0])[0].drawing
    assert all(f">m{i}<" in svg for i in range(len(params)))
    assert "nan" not in svg


def test_there_is_a_chart_for_every_cost_that_is_known():
    (comparison,) = comparisons_of(summarize([row.model_copy(update={"peak_memory_bytes": None}) for row in ROWS]))
    drawings = [chart.drawing for chart in charts(comparison)]
    assert ["trained parameters" in drawings[0], "samples/s" in drawings[1], len(drawings)] == [True, True, 2]


def test_the_front_of_every_chart_is_named_below_it():
    rows = [
        make_row("small", top1=80.0, trainable_params=10, samples_per_second=100.0),
        make_row("middling", top1=79.0, trainable_params=100, samples_per_second=900.0),
        make_row("large", top1=90.0, trainable_params=1000, samples_per_second=50.0),
    ]
    parameters, memory, speed = charts(comparisons_of(summarize(rows))[0])
    assert parameters.sentence == "Pareto front: small, large."
    assert memory.sentence.startswith("Pareto front: large. Methods that were trained in one pass")
    assert speed.sentence == "Pareto front: middling, small, large."


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"break_even_epochs": 1.53}, "The cache took 24.3 s and 177 MiB; it pays from the 2nd epoch on."),
        ({"break_even_epochs": 0.2}, "The cache took 24.3 s and 177 MiB; it pays from the 1st epoch on."),
        ({"break_even_epochs": None}, "The cache took 24.3 s and 177 MiB."),
        ({"extract_seconds": 600.0, "store_bytes": 3 << 30}, "The cache took 10 min and 3.0 GiB; it pays from "),
        ({"extract_seconds": None, "store_bytes": None}, ""),
        ({"feature_source": "images"}, ""),
    ],
)
def test_the_cost_of_the_cache_is_a_sentence(changes, expected):
    row = make_row(**{"extract_seconds": 24.3, "store_bytes": 177 * 2**20} | changes)
    (comparison,) = comparisons_of(summarize([row]))
    assert cache_cost(comparison).startswith(expected)
    assert bool(cache_cost(comparison)) is bool(expected)


def test_methods_pay_at_different_epochs():
    rows = [make_row(f"m{k}", store_bytes=2**20, break_even_epochs=k + 0.5) for k in (0, 10, 21)]
    (comparison,) = comparisons_of(summarize(rows))
    assert "from the 1st to the 22nd epoch on, depending on the method" in cache_cost(comparison)


@given(st.lists(st.tuples(*[st.integers(0, 9).map(float)] * 2), min_size=1, max_size=12))
def test_a_method_is_on_the_front_unless_another_one_is_better_and_no_dearer(points):
    front = front_of(points)
    assert [points[k] for k in front] == sorted(points[k] for k in front)
    for k, (cost, accuracy) in enumerate(points):
        beaten = any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
        assert (k in front) is not beaten


@given(st.lists(st.floats(0, 1e12) | st.just(0.0), min_size=1, max_size=9), st.booleans())
def test_an_axis_has_all_values_inside_and_ticks_in_order(values, is_log):
    values = [value if value > 1e-3 else 0.0 for value in values]
    scale = scale_of(values, is_log=is_log)
    assert all(scale.low < scale.place(value) < scale.high for value in values)
    places = [tick.place for tick in scale.ticks]
    assert places == sorted(set(places))
    assert len(places) <= 9
    assert all(scale.low <= place <= scale.high for place in places)


@given(st.lists(st.tuples(st.floats(60, 500), st.floats(40, 280), st.floats(10, 120)), max_size=8))
def test_labels_stay_in_the_frame_and_apart(points):
    frame, taken = Box(0.0, 0.0, 640.0, 320.0), []
    for x, y, width in points:
        place = place_label((x, y), width, frame, taken)
        assert frame.contains(place)
        assert not any(place.overlaps(other) for other in taken)
        assert math.isclose(place.right - place.left, width)
        taken.append(place)
