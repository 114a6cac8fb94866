"""Result rows and a terminal for the tests of the report."""

import io
from html.parser import HTMLParser

from rich.console import Console

from adapt.report.comparison import comparisons_of
from adapt.report.evidence import ReadPredictions, no_predictions
from adapt.report.seed_averages import summarize
from adapt.report.table import print_table
from adapt.run_dir.results import Row

PLAIN_ROW = {
    "trial_id": "t0",
    "method": "losa",
    "options": {},
    "seed": 0,
    "dataset": "digits",
    "backbone": "vit_tiny",
    "feature_source": "resident",
    "lr": 0.001,
    "weight_decay": 0.01,
    "epochs": 30,
    "best_epoch": 12,
    "val_score": 90.0,
    "top1": 89.0,
    "top5": None,
    "mean_class_accuracy": 88.0,
    "macro_f1": 87.0,
    "mean_average_precision": None,
    "trainable_params": 1000,
    "head_params": 100,
}


def make_row(method: str = "losa", seed: int = 0, **changes) -> Row:
    """A result row with plausible values and costs."""
    fields = {
        "trial_id": f"{method}-{seed}",
        "method": method,
        "seed": seed,
        "val_score": changes.get("top1", 90.0),
        "top1": 90.0 + seed,
        "trainable_params": 64321,
        "head_params": 7690,
        "seconds_per_epoch": 0.412,
        "samples_per_second": 5432.1,
        "peak_memory_bytes": 300 * 2**20,
        "break_even_epochs": 1.53,
    }
    return Row(**{**PLAIN_ROW, **fields, **changes})


def terminal(rows: list[Row], width: int = 100, read: ReadPredictions = no_predictions) -> str:
    """The tables as they are printed in a terminal of this width."""
    console = Console(file=io.StringIO(), width=width)
    print_table(comparisons_of(summarize(rows), read), console)
    return console.file.getvalue()


class Tags(HTMLParser):
    """Collects the start tags of an HTML page with their attributes, and checks that all tags are closed."""

    VOID = ("meta", "br", "input", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """See `HTMLParser`."""
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """See `HTMLParser`."""
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        """See `HTMLParser`."""
        assert self.open.pop() == tag

    def named(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of each tag of this name."""
        return [attributes for tag, attributes in self.found if tag == name]
