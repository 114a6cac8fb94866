"""Makes the tables of docs/performance.md from benchmarks/results; `python -m benchmarks.tables` prints them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> Any:
    """The results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers below 10 have two decimals, larger ones none."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"


def warm_reading() -> str:
    """Speed of readers from the page cache, relative to a memory map."""
    settings = read("reading")["settings"]
    ratios = [setting["warm"]["ratio_to_memmap"] for setting in settings]
    names = sorted(ratios[0], key=lambda name: -ratios[0][name])
    return table(
        ["reader", *(f"{setting['setting']['name']} tokens" for setting in settings)],
        ([name, *(ratio[name] for ratio in ratios)] for name in names),
    )


def cold_reading() -> str:
    """Speed of passes over a store that is not in the page cache, relative to a sequential pass."""
    settings = read("reading")["settings"]
    ratios = [setting["cold"]["ratio_to_sequential"] for setting in settings]
    return table(
        ["pass", *(f"{setting['setting']['name']} tokens" for setting in settings)],
        ([name, *(ratio[name] for ratio in ratios)] for name in ratios[0] if name != "sequential"),
    )


def training_speed() -> str:
    """Samples a second of training, as ratios."""
    parts = {part.split(", ")[1]: figures for part, figures in read("training").items() if part.startswith("speed")}
    ratios = {name: figures["ratios, medians of the rounds' own"] for name, figures in parts.items()}
    return table(
        ["samples a second, ratio", *parts],
        ([name, *(ratio[name]["seconds"] for ratio in ratios.values())] for name in next(iter(ratios.values()))),
    )


def training_memory() -> str:
    """Memory of training by method."""
    figures = read("training")["memory, float32"]
    ratios = figures["ratio_to_peft_lora"]
    return table(
        ["method", "MiB", "ratio to peft's LoRA"],
        ([name, f"{n / 2**20:,.0f}", ratios[name]] for name, n in figures["bytes_above_the_interpreter"].items()),
    )


def training_rows() -> str:
    """Time and memory of training by number of rows."""
    figures = read("training")["rows, float32"]
    relative, peaks = figures["per_row / that of the first"], figures["peak_bytes"]
    return table(
        ["rows", "seconds a row, ratio to 1,024 rows", "the same of the processor's time", "peak memory, MiB"],
        (
            [f"{int(rows):,}", relative["seconds"][rows], relative["cpu_seconds"][rows], f"{peaks[rows] / 2**20:,.0f}"]
            for rows in peaks
        ),
    )


def extraction() -> str:
    """Speed of extraction, relative to its parts alone."""
    figures = read("extracting")
    names = ("sidecache / forward only", "sidecache / bare timm", "store write / raw write")
    return table(["ratio", figures["backbone"]], ([name, figures[name]] for name in names))


def probe() -> str:
    """Accuracy and speed of linear probes."""
    means = read("probe")["means"]
    speed = {name: row["speed"] / means["scikit-learn"]["speed"] for name, row in means.items()}
    return table(
        ["", "accuracy", "speed"], ([name, f"{row['accuracy']:.2f}", speed[name]] for name, row in means.items())
    )


def methods() -> str:
    """Time and memory of a training step by method."""
    ratios = read("methods")["ratios"]
    keys = {"seconds": "time", "saved_bytes": "kept for the backward pass", "peak_bytes": "peak memory"}
    return table(
        ["ratio of a step's", *keys.values()],
        ([name, *(row[key] for key in keys)] for name, row in ratios.items()),
    )


TABLES = (warm_reading, cold_reading, extraction, training_speed, training_memory, training_rows, methods, probe)

if __name__ == "__main__":
    for make in TABLES:
        print(make(), end="\n\n")
