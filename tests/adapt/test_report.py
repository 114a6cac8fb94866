"""The terminal table and report.html: correct numbers, everything escaped, nothing loaded from elsewhere."""

import re
from typing import Annotated

import pytest
from result_rows import Tags, make_row, terminal

from adapt.report.comparison import comparisons_of, headline
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.report.seed_averages import summarize
from adapt.run_dir.results import COLUMNS, Column, Row, declared_columns
from store.errors import UserError

SCRIPT = "<script>alert(1)</script>"
ROWS = [
    make_row("linear_probe", 0, top1=79.0, trainable_params=0),
    make_row("linear_probe", 1, top1=81.0, trainable_params=0),
    make_row("losa", 0, top1=95.0),
    make_row("losa", 2, top1=97.0),
]


def page(tmp_path, rows: list[Row], **options) -> str:
    return write_report(tmp_path, ReportedRows.of_run(tmp_path, rows), **options).read_text(encoding="utf-8")


def multi_label(row: Row) -> Row:
    gone = {"top1": None, "mean_class_accuracy": None}
    return row.model_copy(update={**gone, "mean_average_precision": row.top1})


def test_table_shows_accuracy_parameters_and_costs():
    losa = next(line for line in terminal(ROWS).splitlines() if line.strip().startswith("losa"))
    assert " ".join(losa.split()) == "losa 96.00 ± 1.41 64,321 7,690 0.412 5,432 300 1.53"


@pytest.mark.parametrize("width", [80, 200])
def test_no_figure_is_cut_off_at_80_columns(width):
    text = terminal([*ROWS, make_row("transformer_probe", trainable_params=85_798_656)], width)
    assert "85,798,656" in text
    assert "96.00 ± 1.41" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_columns_without_values_are_left_out():
    rows = [row.model_copy(update={"break_even_epochs": None}) for row in ROWS]
    assert "break" in terminal(ROWS)
    assert "break" not in terminal(rows)


def test_a_new_column_is_one_field_of_a_row(tmp_path, monkeypatch):
    class WiderRow(Row):
        joules: Annotated[float | None, Column("energy", "J", "mean", brief=True)] = None

    monkeypatch.setitem(COLUMNS, "joules", declared_columns(WiderRow)["joules"])
    rows = [WiderRow(**row.model_dump(), joules=joules) for row, joules in zip(ROWS, (3, 5, 10, 21), strict=True)]
    lines = terminal(rows).splitlines()
    assert any(line.endswith("energy") for line in map(str.rstrip, lines))
    assert [line.split()[-1] for line in lines if "±" in line][:2] == ["4", "15.5"]
    text = page(tmp_path, rows)
    assert '<th scope="col">energy\nJ</th>' in text
    assert "<td>15.5</td>" in text


def test_multi_label_is_compared_by_mean_average_precision():
    text = terminal([multi_label(row) for row in ROWS])
    assert "mAP" in text
    assert "top-1" not in text
    assert "+16.00 points on the linear probe" in text


def test_markup_of_the_terminal_is_not_interpreted():
    assert "[bold]x[/nope]" in terminal([make_row(dataset="[bold]x[/nope]")], width=200)


def test_no_results_say_so():
    assert "no results" in terminal([])


def test_headline_gives_points_and_ratio_of_errors():
    (comparison,) = comparisons_of(summarize(ROWS))
    best = "digits: best on validation is losa, top-1 96.00 ± 1.41: "
    assert headline(comparison) == best + "+16.00 points on the linear probe (80.00), 0.20 times its error."


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ROWS[2:], "no linear probe to compare with"),
        (ROWS[:2], "no method beats the linear probe"),
        ([make_row("linear_probe", top1=100.0), make_row("losa", top1=100.0)], "no method beats the linear probe"),
        ([make_row(top1=None)], "no method has a result"),
    ],
)
def test_headline_without_a_comparison_says_why(rows, expected):
    assert expected in headline(comparisons_of(summarize(rows))[0])


def test_best_and_probe_are_chosen_by_validation_though_the_test_split_favours_others():
    scores = [("linear_probe", "cls", 60.0, 80.0), ("linear_probe", "mean", 90.0, 70.0)]
    scores += [("losa", "cls", 91.0, 78.0), ("losa", "mean", 70.0, 85.0)]
    rows = [make_row(m, options={"pool": pool}, val_score=val, top1=top1) for m, pool, val, top1 in scores]
    (comparison,) = comparisons_of(summarize(rows))
    assert "is losa pool=cls, top-1 78.00: +8.00 points on the linear probe (70.00)" in headline(comparison)


def test_a_method_that_is_worse_on_the_test_split_is_no_winner():
    rows = [make_row("linear_probe", val_score=80.0, top1=90.0), make_row("losa", val_score=85.0, top1=88.0)]
    (comparison,) = comparisons_of(summarize(rows))
    assert ": -2.00 points on the linear probe (90.00), 1.20 times its error." in headline(comparison)


def test_every_dataset_and_backbone_has_its_own_comparison():
    rows = [make_row(dataset=d, backbone=b) for d in ("x", "y") for b in ("p", "q")]
    assert len(comparisons_of(summarize(rows))) == 4


def test_results_on_other_samples_are_not_compared(tmp_path):
    rows = [
        make_row(method, trial_id=f"{method}-{samples}", top1=top1, conditions={"samples": samples, "epochs": 30})
        for method, samples, top1 in (
            ("linear_probe", "0ld", 90.0),
            ("linear_probe", "n3w", 50.0),
            ("losa", "n3w", 60.0),
        )
    ]
    old, new = comparisons_of(summarize(rows))
    assert (old.title, new.title) == ("digits · vit_tiny · samples=0ld", "digits · vit_tiny · samples=n3w")
    assert [summary.label for summary in new.summaries] == ["linear_probe", "losa"]
    assert (
        "digits (samples=n3w): best on validation is losa, top-1 60.00: +10.00 points on the linear probe"
        in headline(new)
    )
    text = page(tmp_path, rows)
    assert "<small>vit_tiny · samples=n3w</small>" in text
    assert '<th scope="row">linear_probe samples=0ld</th>' in text  # where every trial is listed


def test_report_holds_figures_config_and_trials(tmp_path):
    text = page(tmp_path, ROWS, config_text="name: digits & co")
    assert write_report(tmp_path, ReportedRows.of_run(tmp_path, ROWS)) == tmp_path / "report.html"
    for expected in ("96.00 ± 1.41", "64,321", "name: digits &amp; co", "losa-2", "times its error"):
        assert expected in text


def test_a_solved_method_has_iterations_and_no_number_of_epochs(tmp_path):
    text = page(tmp_path, [make_row("linear_probe", epochs=None, lr=None, best_epoch=67), make_row("losa")])
    assert "<td>67</td>" in text
    assert "<td>12 of 30</td>" in text


def test_report_is_well_formed_and_accessible(tmp_path):
    tags = Tags(page(tmp_path, ROWS, config_text="x"))
    assert all(cell.get("scope") in ("col", "row") for cell in tags.named("th"))
    drawings = [svg for svg in tags.named("svg") if svg.get("aria-hidden") != "true"]
    assert {svg["role"] for svg in drawings} == {"img"}
    assert "top-1 against trained parameters" in (drawings[0]["aria-label"] or "")
    assert tags.named("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in tags.named("meta"))


def test_report_loads_nothing(tmp_path):
    text = page(tmp_path, ROWS, config_text="x")
    tags = Tags(text)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in tags.found}
    assert tags.named("script") == [{}]
    references = [
        value for _, attributes in tags.found for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all((value or "").startswith("#") for value in references)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_report_serves_light_dark_and_paper(tmp_path):
    text = page(tmp_path, ROWS)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert not re.search(r"#0[0-9a-c]0[0-9a-c]0[0-9a-c]\b", text)  # every stand-in color was replaced


@pytest.mark.parametrize("field", ["method", "dataset", "backbone", "feature_source", "trial_id"])
def test_every_string_of_a_row_is_escaped(tmp_path, field):
    text = page(tmp_path, [*ROWS, make_row("losa", 7, **{field: SCRIPT})] if field != "method" else [make_row(SCRIPT)])
    assert "&lt;script&gt;" in text
    assert Tags(text).named("script") == [{}]


@pytest.mark.parametrize("nasty", [SCRIPT, "--><script>", '"><script>', "]]><script>", "</text></svg><script>"])
def test_options_and_class_names_are_escaped(tmp_path, nasty):
    rows = [make_row("losa", options={nasty: nasty}), make_row("losa", 1, options={})]
    text = page(tmp_path, rows, config_text=f"classes: [{nasty}]")
    assert "&lt;script&gt;" in text
    assert Tags(text).named("script") == [{}]


def test_names_are_drawn_as_they_are(tmp_path):
    text = page(tmp_path, [make_row("$x_1 \\frac$"), make_row("数字\nline"), make_row("{{ 7 * 7 }}")])
    for expected in ("$x_1 \\frac$", "数字 line", "{{ 7 * 7 }}"):
        assert expected in text


def test_means_over_fewer_seeds_are_marked(tmp_path):
    rows = [*ROWS, make_row("alone", top1=99.0)]
    text = page(tmp_path, rows)
    assert text.count('<span class="badge">n=2</span>') == 2
    assert text.count('<span class="badge">n=1</span>') == 1
    assert ">alone (n=1)<" in text  # in a chart
    assert "alone, top-1 99.00 (n=1)" in text
    assert "seeds" in terminal(rows)
    assert "badge" not in page(tmp_path, ROWS).partition("</style>")[2]
    assert "seeds" not in terminal(ROWS)


def test_training_from_the_cache_and_end_to_end_are_told_apart(tmp_path):
    text = page(tmp_path, [*ROWS, make_row("lora", feature_source="images"), make_row("x", feature_source="online")])
    kinds = [attributes["data-kind"] for attributes in Tags(text).named("tr") if "data-kind" in attributes]
    assert sorted(kinds) == ["cache", "cache", "end-to-end", "online"]
    assert "var(--end-to-end)" in text.partition("</style>")[2]


def test_a_dataset_without_any_metric_has_a_table_and_no_chart(tmp_path):
    text = page(tmp_path, [make_row(top1=None)])
    assert 'role="img"' not in text
    assert "no method has a result" in text


def test_the_same_rows_give_the_same_bytes(tmp_path):
    assert page(tmp_path, ROWS) == page(tmp_path, ROWS)


def test_report_without_rows_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no results to report in .*: run `sidecache run` first"):
        write_report(tmp_path, ReportedRows(rows=[]))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_names_of_methods_are_whole_on_narrow_terminals(width: int) -> None:
    rows = [make_row(method, seed) for method in ("attentive_probe", "transformer_probe") for seed in (0, 1)]
    rows.append(make_row("conv_ladder", 0))  # from one seed
    lines = terminal(rows, width=width).splitlines()
    for method in ("attentive_probe", "transformer_probe", "conv_ladder"):
        (line,) = (line for line in lines if line.strip().startswith(method))
        assert len(line) <= width
    header = next(line for line in lines if line.strip().startswith("method"))
    assert ("epochs" in header) == (width > 60)  # the last columns are left out where they do not fit
    assert any("seeds" in line for line in lines)
