"""The figure of several data sets: every method of every data set, at its mean, with its interval."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_predictions import first_right, made_run
from matplotlib.figure import Figure
from result_rows import make_row

from adapt.report import overview as module
from adapt.report.comparison import Comparison, comparisons_of
from adapt.report.overview import overview, overview_file
from adapt.report.seed_averages import summarize
from adapt.run_dir.predictions import find_predictions
from adapt.run_dir.results import Row
from sidecache.entry_point import main
from store.errors import UserError


def compare(rows: list[Row]) -> list[Comparison]:
    return comparisons_of(summarize(rows))


def drawn(monkeypatch: pytest.MonkeyPatch, comparisons: list[Comparison]) -> Figure:
    """The matplotlib figure that is turned into SVG."""
    taken: list[Figure] = []
    monkeypatch.setattr(module, "svg_file", lambda figure: taken.append(figure) or "")
    overview_file(comparisons)
    return taken.pop()


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


ROWS = [
    make_row(method, seed, dataset=dataset, top1=top1 + seed)
    for dataset, scores in {"a": {"linear_probe": 70.0, "losa": 80.0}, "b": {"losa": 60.0, "ladder": 50.0}}.items()
    for method, top1 in scores.items()
    for seed in (0, 1)
]


def test_every_method_is_at_its_mean_in_the_row_of_its_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, compare(ROWS))
    (axes,) = figure.axes
    markers = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata())]
    names = [label.get_text() for label in axes.get_yticklabels()]
    height = axes.get_ylim()[0] / len(names)
    methods = {text: style(handle) for text, handle in legend_of(figure)}
    found = {
        (names[int(line.get_ydata()[0] // height)], name): line.get_xdata()[0]
        for line in markers
        for name, own in methods.items()
        if style(line) == own
    }
    assert found == {("a", "linear_probe"): 70.5, ("a", "losa"): 80.5, ("b", "losa"): 60.5, ("b", "ladder"): 50.5}


def legend_of(figure: Figure):
    legend = figure.axes[0].get_legend()
    return zip((text.get_text() for text in legend.get_texts()), legend.get_lines(), strict=True)


def style(line) -> tuple[str, str]:
    return line.get_color(), line.get_marker()


def test_lines_are_intervals_and_deviations_where_predictions_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = made_run(tmp_path, {"losa": [first_right(850)], "lora": [first_right(600)]}, dataset="a")
    tested = comparisons_of(summarize(rows), lambda row: find_predictions(tmp_path, row))
    (axes,) = drawn(monkeypatch, tested).axes
    intervals = sorted(tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2)
    assert intervals == sorted((found.interval.low, found.interval.high) for found in tested[0].evidence.values())
    assert intervals[0][0] < 60 < intervals[0][1]
    (axes,) = drawn(monkeypatch, compare([make_row(seed=0, top1=80.0), make_row(seed=1, top1=82.0)])).axes
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert list(line.get_xdata()) == pytest.approx([81 - 2**0.5, 81 + 2**0.5])


def test_forty_methods_differ_in_color_or_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row(f"m{k}", dataset=dataset) for k in range(40) for dataset in "ab"]
    figure = drawn(monkeypatch, compare(rows))
    assert len({style(handle) for _, handle in legend_of(figure)}) == 40


def test_rows_are_named_after_all_that_differs() -> None:
    rows = [
        make_row(dataset="a", backbone="tiny"),
        make_row(dataset="a", backbone="base"),
        make_row(dataset="b", backbone="tiny", top1=None, mean_average_precision=70.0),
    ]
    shown = texts(overview_file(compare(rows)))
    assert {"a · tiny · top-1", "a · base · top-1", "b · tiny · mAP", "losa"} <= set(shown)


def test_a_page_shows_it_for_two_comparisons_or_more() -> None:
    assert 'aria-label="Results of 2 comparisons' in overview(compare(ROWS))
    assert overview(compare(ROWS[:4])) == ""
    assert overview(compare([*ROWS[:4], make_row(dataset="c", top1=None)])) == ""


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(UserError, match="no method has a result"):
        overview_file(compare([make_row(top1=None)]))


def test_the_same_results_give_the_same_bytes() -> None:
    assert overview_file(compare(ROWS)) == overview_file(compare(ROWS))


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_any_name_gives_a_well_formed_file(method: str, dataset: str) -> None:
    svg = overview_file(compare([make_row(method, dataset=dataset), make_row("losa", dataset="b")]))
    assert "losa" in texts(svg)


def test_the_command_writes_the_figure_and_refuses_what_it_cannot_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        made_run(tmp_path / name, {"losa": [first_right(850)], "lora": [first_right(600)]}, dataset=name)

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sidecache", "results", str(tmp_path), "--format", "svg", *options])
        main()

    run("--output", str(tmp_path / "figure.svg"))
    run()
    assert capsys.readouterr().out == (tmp_path / "figure.svg").read_text()
    assert {"a", "b", "losa", "lora", "top-1, test (%)"} <= set(texts((tmp_path / "figure.svg").read_text()))
    for options in (["--rank"], ["--by", "dataset"]):
        with pytest.raises(SystemExit) as stopped:
            run(*options)
        assert stopped.value.code == 2
        assert "leave out --by and --rank" in capsys.readouterr().err
