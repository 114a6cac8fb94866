"""Results of many runs: one tidy table, a pivot and ranks, for readers and for programs."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_predictions import first_right, made_run
from result_rows import make_row

import sidecache as sc
from adapt.across_runs.formats import format_table
from adapt.across_runs.groups import group_table
from adapt.across_runs.pivot import pivot_table
from adapt.across_runs.ranks import rank, rank_table
from adapt.across_runs.runs import find_run_dirs, read_runs
from adapt.across_runs.selection import select
from adapt.across_runs.table import Cell, Table
from adapt.across_runs.trials import trial_table
from adapt.report.comparison import comparisons_of
from adapt.report.evidence import no_predictions
from adapt.report.seed_averages import summarize
from adapt.run_dir.results import Row, write_results
from sidecache.entry_point import main
from store.errors import Note, UserError

SEEDS = 2


def right(**n_right: int) -> dict[str, list[np.ndarray]]:
    return {method: [np.roll(first_right(n), seed) for seed in range(SEEDS)] for method, n in n_right.items()}


def make_study(folder: Path) -> Path:
    """Three data sets; the third has no ladder."""
    made_run(folder / "a", right(linear_probe=700, losa=850, lora=849, ladder=710), dataset="a")
    made_run(folder / "deep/b", right(linear_probe=700, losa=800, lora=900, ladder=600), dataset="b")
    made_run(folder / "c", right(linear_probe=700, losa=850, lora=650), dataset="c")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that no test changes."""
    return make_study(tmp_path_factory.mktemp("study"))


def run_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["sidecache", "results", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["sidecache", "results", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


# runs


def test_run_directories_are_found_at_any_depth_and_each_once(study: Path):
    found = find_run_dirs([study, study / "a", study / "deep"])
    assert [path.relative_to(study).as_posix() for path in found] == ["a", "c", "deep/b"]


def test_stores_are_not_searched(tmp_path: Path):
    study = make_study(tmp_path)
    (study / "a/cache.zarr/deep").mkdir(parents=True)
    (study / "a/cache.zarr/zarr.json").write_text("{}")
    (study / "a/cache.zarr/deep/results.json").write_text("[]")
    assert len(find_run_dirs([study])) == 3


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "is no folder"), ("empty", "no results in .* or below it")])
def test_a_path_without_results_is_refused(tmp_path: Path, name: str, reason: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=reason):
        read_runs([tmp_path / name])


def test_a_trial_of_two_runs_counts_once(tmp_path: Path):
    study = make_study(tmp_path)
    rows = sc.results(study)
    write_results(study / "copy", rows[:3])
    with pytest.warns(Note, match="3 rows are of trials that another run has too"):
        assert sc.results([study]) == rows


def test_rows_do_not_depend_on_the_order_of_the_runs(study: Path):
    folders = [study / "a", study / "deep", study / "c"]
    assert sc.results(folders) == sc.results(folders[::-1])


# selection


def test_conditions_select_by_field_and_by_option():
    rows = [make_row(f"{rank}", seed, options={"rank": rank, "mix": True}) for rank in (4, 8) for seed in (0, 1)]
    assert select(rows, ["options.rank=8", "seed=1"]) == (rows[3],)
    assert select(rows, ["lr=1e-3", "options.mix=true"]) == tuple(rows)
    assert select(rows, ["method=4"]) == tuple(rows[:2])


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("losa", "legal: NAME=VALUE"),
        ("nothing=losa", "no result has 'nothing'; legal: .*method"),
        ("options.rnk=8", r"no result has 'options.rnk'; legal: .*options\.rank"),
        ("method=lora", "no result has this value; there are: losa"),
        ("options.rank=true", "no result has this value; there are: 1"),
        ("seed=[", "no result has this value"),
    ],
)
def test_a_condition_that_selects_nothing_says_what_is_there(condition: str, reason: str):
    with pytest.raises(UserError, match=reason):
        select([make_row("losa", options={"rank": 1})], [condition])


# tables


def test_a_group_has_mean_deviation_interval_and_costs(study: Path):
    runs = read_runs([study])
    table = group_table(comparisons_of(summarize(runs.rows), runs.read_predictions))
    by_name = {(record["dataset"], record["label"]): record for record in table.records}
    losa = by_name["a", "losa"]
    assert (losa["metric"], losa["mean"], losa["std"], losa["n_seeds"]) == ("top1", 85.0, 0.0, SEEDS)
    assert losa["low"] < 85 < losa["high"]
    assert losa["trainable_params"] == 64321
    assert (losa["is_best"], by_name["a", "lora"]["is_inside_noise"]) == (True, True)
    assert by_name["b", "losa"]["is_inside_noise"] is False
    assert table.title == "vit_tiny · top-1"
    assert table.header[:2] == ("dataset", "method")


def test_a_pivot_has_one_column_a_value_and_a_dash_where_nothing_is(study: Path):
    runs = read_runs([study])
    comparisons = comparisons_of(summarize(runs.rows), runs.read_predictions)
    by_dataset, by_method = pivot_table(comparisons, "dataset"), pivot_table(comparisons, "method")
    assert by_dataset.header == ("method", "a", "b", "c")
    ladder = next(row for row in by_dataset.rows if row[0].text == "ladder")
    assert [cell.text for cell in ladder] == ["ladder", "71.00 ± 0.00", "60.00 ± 0.00", "–"]
    losa = next(row for row in by_dataset.rows if row[0].text == "losa")
    assert [cell.is_best for cell in losa] == [False, True, False, True]
    assert {(m.text, d): cell.text for m, *cells in by_dataset.rows for d, cell in zip("abc", cells, strict=True)} == {
        (m, d.text): cell.text
        for d, *cells in by_method.rows
        for m, cell in zip(by_method.header[1:], cells, strict=True)
    }
    assert by_dataset.records[0]["a"] == pytest.approx(71.0)


def test_a_method_that_chose_other_options_on_each_data_set_is_one_method():
    rows = [make_row("losa", dataset=name, trial_id=name, options={"pool": pool}) for name, pool in ("ab", "cd")]
    table = pivot_table(comparisons_of(summarize(rows)), "dataset")
    assert [row[0].text for row in table.rows] == ["losa"]


def test_data_sets_with_several_metrics_say_which():
    several = {"top1": None, "mean_average_precision": 50.0}
    rows = [make_row("losa", dataset="x"), make_row("losa", 1, dataset="y", **several)]
    assert pivot_table(comparisons_of(summarize(rows)), "dataset").header == ("method", "x, top-1 %", "y, mAP %")


# ranks


def test_ranks_are_means_over_data_sets_that_have_all_methods(study: Path):
    runs = read_runs([study])
    ranking = rank(comparisons_of(summarize(runs.rows)), runs.read_predictions)
    assert ranking.datasets == ("a · vit_tiny", "b · vit_tiny")
    assert ranking.left_out == ("c · vit_tiny (without ladder)",)
    assert ranking.mean_ranks == {"ladder": 3.5, "linear_probe": 3.5, "lora": 1.5, "losa": 1.5}
    outcomes = {pair: dict(counts) for pair, counts in ranking.outcomes.items()}
    assert outcomes["losa", "lora"] == {"ties": 1, "losses": 1}
    assert outcomes["lora", "losa"] == {"ties": 1, "wins": 1}
    assert outcomes["losa", "linear_probe"] == {"wins": 2}


def test_equal_results_share_their_ranks():
    rows = [make_row(name, top1=top1) for name, top1 in (("a", 90.0), ("b", 80.0), ("c", 80.0))]
    ranking = rank(comparisons_of(summarize(rows)), no_predictions)
    assert ranking.mean_ranks == {"a": 1.0, "b": 2.5, "c": 2.5}
    assert ranking.outcomes["a", "b"] == {"untested": 1}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([make_row("losa")], "needs two methods or more; there is losa"),
        (
            [make_row("losa", dataset="x"), make_row("lora", dataset="y")],
            "no data set has all methods: x .*without lora",
        ),
    ],
)
def test_ranks_without_a_comparison_are_refused(rows: list[Row], reason: str):
    with pytest.raises(UserError, match=reason):
        rank(comparisons_of(summarize(rows)), no_predictions)


# formats


def one_cell(text: str) -> Table:
    return Table(title="", header=("name",), n_names=1, rows=((Cell(text),),), legend=(), records=({"name": text},))


@given(st.text(st.sampled_from('a\\&%$#_{}~^<>|"±≈–*`[]()\n\t\0\x1b\u202e\ud800é'), max_size=12))
def test_no_text_leaves_its_cell(text: str):
    latex = format_table(one_cell(text), "latex").decode().splitlines()
    assert latex[:4] == [r"\begin{tabular}{l}", r"\toprule", r"name \\", r"\midrule"]
    assert latex[5:] == [r"\bottomrule", r"\end{tabular}"]
    cell = latex[4].removesuffix(r" \\")
    for command in ("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"):
        cell = cell.replace(f"\\{command}{{}}", "")
    for legal in (r"\textquotedbl{}", r"$\pm$", r"$\approx$", *(f"\\{c}" for c in "&%$#_{}")):
        cell = cell.replace(legal, "")
    assert not set('&%$#_{}~^|"\0\x1b\u202e').intersection(cell)
    markdown = format_table(one_cell(text), "markdown").decode().splitlines()
    assert len(markdown) == 3
    row = markdown[2].removeprefix("| ").removesuffix(" |").replace(r"\\", "").replace(r"\|", "").replace(r"\<", "")
    assert not set("|<\x1b\u202e").intersection(row)


def test_csv_runs_no_formula_in_cells_and_names():
    table = one_cell("=1+1")
    text = format_table(Table(**{**vars(table), "records": ({"=HYPERLINK()": "=1+1"},)}), "csv").decode()
    assert text == "'=HYPERLINK()\n'=1+1\n"


@pytest.mark.parametrize("view", ["groups", "pivot", "ranks", "trials"])
def test_every_view_has_the_same_records_in_every_format(study: Path, view: str):
    runs = read_runs([study])
    comparisons = comparisons_of(summarize(runs.rows))
    table = {
        "groups": lambda: group_table(comparisons),
        "pivot": lambda: pivot_table(comparisons, "dataset"),
        "ranks": lambda: rank_table(rank(comparisons, no_predictions)),
        "trials": lambda: trial_table(runs),
    }[view]()
    from_json = json.loads(format_table(table, "json"))
    assert from_json == list(table.records)
    assert pq.read_table(io.BytesIO(format_table(table, "parquet"))).to_pylist() == from_json
    from_csv = list(csv.DictReader(io.StringIO(format_table(table, "csv").decode())))
    assert from_csv == [{k: "" if v is None else str(v) for k, v in record.items()} for record in from_json]
    for form in ("table", "markdown", "latex"):
        text = format_table(table, form).decode().replace("\\", "")
        assert all(cell.text in text for row in table.rows for cell in row[: table.n_names])


def test_all_trials_hold_every_field_and_their_run(study, tmp_path, capsys, monkeypatch):
    run_command(capsys, monkeypatch, study, "--by", "trial", "--format", "parquet", "--output", tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["run_dir", *Row.model_fields]
    assert table.num_rows == len(sc.results(study))
    assert {Path(path).name for path in table["run_dir"].to_pylist()} == {"a", "b", "c"}


def test_the_terminal_shows_what_is_selected(study, capsys, monkeypatch):
    text = run_command(capsys, monkeypatch, study, "--where", "method=losa", "--where", "dataset=b")
    assert "b · vit_tiny · top-1" in text
    assert "80.00 ± 0.00" in text
    assert "lora" not in text


def test_data_sets_that_are_not_ranked_are_named(study, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sidecache", "results", str(study), "--rank"])
    main()
    captured = capsys.readouterr()
    assert "mean rank over 2 data sets" in captured.out
    assert "left out of the ranks: c · vit_tiny (without ladder)" in captured.err


def test_options_that_exclude_one_another_are_refused(study, capsys, monkeypatch):
    assert "give one of the two" in message(capsys, monkeypatch, study, "--by", "method", "--rank")
    assert "add --output FILE.parquet" in message(capsys, monkeypatch, study, "--format", "parquet")
