"""Rows are merged and never lost; damage is reported; summaries average over seeds."""

import csv
import json
import math
import multiprocessing
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_rows import PLAIN_ROW

from adapt.report.seed_averages import Stat, summarize
from adapt.run_dir.files import with_checksum
from adapt.run_dir.results import Row, in_order, read_results, write_results
from store.errors import JobError, UserError
from store.local import durable_files as durable


def make_row(trial_id: str = "t0", **changes) -> Row:
    return Row(**{**PLAIN_ROW, "trial_id": trial_id, "options": {"rank": 8}, **changes})


def write_one(run_dir: Path, number: int) -> None:
    write_results(run_dir, [make_row(f"t{number}")])


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [make_row("a"), make_row("b", options={"é": [1, {"x": None}]}, top1=1 / 3, peak_memory_bytes=2**40)]
    write_results(tmp_path / "new" / "run", rows)
    assert read_results(tmp_path / "new" / "run") == rows


def test_other_rows_are_kept_and_the_same_trial_is_replaced_in_place(tmp_path):
    write_results(tmp_path, [make_row("a", top1=1.0), make_row("b", top1=2.0)])
    write_results(tmp_path, [make_row("c", top1=3.0), make_row("a", top1=4.0)])
    assert [(row.trial_id, row.top1) for row in read_results(tmp_path)] == [("a", 4.0), ("b", 2.0), ("c", 3.0)]


def test_writing_twice_changes_nothing(tmp_path):
    write_results(tmp_path, [make_row("a"), make_row("b")])
    before = (tmp_path / "results.json").read_bytes(), (tmp_path / "results.csv").read_bytes()
    write_results(tmp_path, [make_row("b")])
    assert ((tmp_path / "results.json").read_bytes(), (tmp_path / "results.csv").read_bytes()) == before


def test_no_rows_still_leave_readable_files(tmp_path):
    write_results(tmp_path, [])
    assert read_results(tmp_path) == []


def test_workers_that_write_at_once_lose_no_row(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        pool.starmap(write_one, [(tmp_path, number) for number in range(24)])
    assert {row.trial_id for row in read_results(tmp_path)} == {f"t{number}" for number in range(24)}


def test_json_is_a_list_of_objects_with_null_where_undefined(tmp_path):
    write_results(tmp_path, [make_row()])
    (row,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(row) == [*Row.model_fields, "checksum"]
    assert row["top5"] is None
    assert row["break_even_epochs"] is None


def test_csv_holds_every_row_and_column(tmp_path):
    rows = [make_row("a", dataset='a, "b"\nc', conditions={"epochs": 10}), make_row("b")]
    write_results(tmp_path, rows)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["dataset"] for row in table] == ['a, "b"\nc', "digits"]
    assert list(table[0]) == list(Row.model_fields)
    assert json.loads(table[0]["options"]) == {"rank": 8}
    assert json.loads(table[0]["conditions"]) == {"epochs": 10}
    assert (table[0]["top1"], table[0]["top5"]) == ("89.0", "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_a_spreadsheet_runs_no_cell(tmp_path, start):
    formula = f'{start}HYPERLINK("http://evil";A1)'
    write_results(tmp_path, [make_row(dataset=formula, backbone=formula, options={formula: formula}, val_score=-1.5)])
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        (cells,) = csv.DictReader(file)
    assert (cells["dataset"], cells["backbone"]) == (f"'{formula}", f"'{formula}")
    assert not any(cell.startswith(start) for name, cell in cells.items() if name != "val_score")
    assert json.loads(cells["options"]) == {formula: formula}
    assert float(cells["val_score"]) == -1.5
    (row,) = read_results(tmp_path)
    assert row.dataset == formula


def test_a_text_that_is_no_formula_is_itself_in_the_csv(tmp_path):
    names = ["digits", "a=b", "'quoted'", "", "x-1", " =1"]
    write_results(tmp_path, [make_row(name, dataset=name) for name in names])
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        assert [cells["dataset"] for cells in csv.DictReader(file)] == sorted(names)


def test_a_crash_while_writing_leaves_the_old_file_and_no_temporary_ones(tmp_path, monkeypatch):
    write_results(tmp_path, [make_row("a")])
    files = sorted(tmp_path.iterdir())

    def crash(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(durable.os, "fsync", crash)
    with pytest.raises(JobError, match=r"results\.json cannot be written \(disk full\); what was there before is kept"):
        write_results(tmp_path, [make_row("b")])
    assert [row.trial_id for row in read_results(tmp_path)] == ["a"]
    assert sorted(tmp_path.iterdir()) == files


def test_missing_results_say_to_run_first(tmp_path):
    with pytest.raises(UserError, match=r"no results in .*: run `sidecache run` first"):
        read_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"trial_id": "a"', "delimiter"),
        (b"", "Expecting value"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "top level: not a list of rows"),
        (b"[3]", "row 0: it is not a JSON object"),
        (b'[{"trial_id": "a"}]', "row 0: its content does not match its checksum"),
        (json.dumps([with_checksum({"trial_id": "a"})]).encode(), "0 -> method: Field required"),
    ],
)
def test_damaged_results_are_refused_and_not_overwritten(tmp_path, content, reason):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"results\.json is damaged \(.*{reason}.*\): remove the damaged rows, or move the file"
    ):
        read_results(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        write_results(tmp_path, [make_row()])
    assert path.read_bytes() == content


def test_a_duplicate_trial_is_named(tmp_path):
    row = with_checksum(make_row("abc").model_dump())
    (tmp_path / "results.json").write_text(json.dumps([row, row]))
    with pytest.raises(UserError, match="trial 'abc' appears twice"):
        read_results(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_holds_finite_numbers_only(value):
    with pytest.raises(ValueError, match="finite number"):
        make_row(top1=value)


def test_seeds_are_summarized_by_mean_and_sample_deviation():
    (summary,) = summarize([make_row(str(s), seed=s, top1=v) for s, v in enumerate([80.0, 82.0, 87.0])])
    assert summary.metrics["top1"] == Stat(83.0, statistics.stdev([80.0, 82.0, 87.0]))
    assert summary.seeds == (0, 1, 2)
    assert summary.metrics["top5"] is None


def test_one_seed_has_no_deviation():
    (summary,) = summarize([make_row()])
    assert summary.metrics["top1"] == Stat(89.0, None)


@given(st.permutations(range(6)))
def test_order_of_rows_changes_nothing(order):
    rows = [make_row(str(i), seed=i % 3, options={"rank": 8 * (i // 3)}, top1=float(i)) for i in range(6)]
    assert summarize([rows[i] for i in order]) == summarize(rows)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)))
def test_files_do_not_depend_on_the_order_in_which_trials_finish(tmp_path_factory, order):
    rows = [make_row(str(i), seed=i % 3, options={"rank": 8 * (i // 3)}) for i in range(6)]
    folder = tmp_path_factory.mktemp("run")
    for number in order:
        write_results(folder, [rows[number]])
    assert read_results(folder) == rows


def test_methods_come_in_the_given_order_and_others_by_name():
    rows = [make_row(name, method=name) for name in ("bitfit", "lora", "losa", "full")]
    assert [row.method for row in in_order(rows, ["losa", "full", "losa"])] == ["losa", "full", "bitfit", "lora"]


def test_options_come_by_value_and_numbers_before_texts():
    values = [None, "a", 10, 9.5, [2], 2]
    rows = [make_row(str(i), options={"rank": value}) for i, value in enumerate(values)]
    assert [row.options["rank"] for row in in_order(rows)] == [2, 9.5, 10, "a", [2], None]


def test_groups_are_dataset_backbone_method_and_options():
    rows = [
        make_row("a"),
        make_row("b", dataset="other"),
        make_row("c", backbone="other"),
        make_row("d", method="lora"),
        make_row("e", options={"rank": 4}),
        make_row("f", seed=1),
    ]
    assert [len(summary.seeds) for summary in summarize(rows)] == [1, 1, 1, 2, 1]


def test_order_of_options_makes_no_group():
    rows = [make_row("a", options={"x": 1, "y": 2}), make_row("b", seed=1, options={"y": 2, "x": 1})]
    assert len(summarize(rows)) == 1


def test_a_label_names_an_option_that_a_search_chose_only_where_it_tells_methods_apart():
    def chosen(rank, dropout, searched, **changes):
        options = {"rank": rank, "dropout": dropout}
        return make_row(f"{rank}-{dropout}", method="losa", options=options, searched=searched, **changes)

    both = [chosen(4, 0.1, ["dropout"]), chosen(8, 0.3, ["dropout"])]
    assert [s.label for s in summarize(both)] == ["losa rank=4", "losa rank=8"]
    one_searched = [chosen(4, 0.1, []), chosen(4, 0.3, ["dropout"])]
    assert [s.label for s in summarize(one_searched)] == ["losa dropout=0.1", "losa dropout=searched"]
    two_choices = [chosen(4, 0.1, ["dropout"]), chosen(4, 0.3, ["dropout"])]  # of two searches, such as of two budgets
    assert [s.label for s in summarize(two_choices)] == ["losa dropout=0.1", "losa dropout=0.3"]
    two_protocols = [chosen(4, 0.1, ["dropout"], conditions={"shots": shots}) for shots in (5, 10)]
    assert {s.label for s in summarize(two_protocols)} == {"losa"}


def test_a_label_names_the_options_that_differ():
    options = [{"rank": 8, "mix": True, "pool": "cls"}, {"rank": 4, "mix": True, "pool": "cls"}, {"mix": True}]
    rows = [make_row(str(i), options=o) for i, o in enumerate(options)]
    assert [s.label for s in summarize([*rows, make_row("x", method="lora")])] == [
        "lora",
        "losa",
        "losa rank=4 pool=cls",
        "losa rank=8 pool=cls",
    ]


def test_a_seed_with_several_learning_rates_counts_once_by_its_validation_score():
    rows = [
        make_row("a", lr=0.1, val_score=70.0, top1=99.0),
        make_row("b", lr=0.01, val_score=80.0, top1=75.0),
        make_row("c", lr=0.001, val_score=None, top1=98.0),
    ]
    (summary,) = summarize(rows)
    assert (summary.seeds, summary.metrics["top1"]) == ((0,), Stat(75.0, None))


def test_rows_of_other_conditions_are_not_averaged_and_say_what_differs():
    rows = [
        make_row(f"{epochs}-{seed}", seed=seed, top1=float(epochs), conditions={"epochs": epochs, "batch_size": 64})
        for epochs in (10, 30)
        for seed in (0, 1)
    ]
    assert [(s.label, s.metrics["top1"]) for s in summarize(rows)] == [
        ("losa epochs=10", Stat(10.0, 0.0)),
        ("losa epochs=30", Stat(30.0, 0.0)),
    ]


def test_what_validation_chose_makes_no_group():
    rows = [make_row(str(lr), lr=lr, val_score=lr, conditions={"epochs": 10}) for lr in (0.1, 0.2)]
    assert [s.metrics["val_score"] for s in summarize(rows)] == [Stat(0.2, None)]


def test_costs_are_averaged_and_memory_is_the_peak():
    rows = [
        make_row("a", seconds_per_epoch=1.0, peak_memory_bytes=10),
        make_row("b", seed=1, seconds_per_epoch=3.0, peak_memory_bytes=30),
        make_row("c", seed=2),
    ]
    (summary,) = summarize(rows)
    costs = [summary.costs[name] for name in ("seconds_per_epoch", "peak_memory_bytes", "store_bytes")]
    assert costs == [2.0, 30, None]
