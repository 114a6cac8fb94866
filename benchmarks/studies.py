"""Measures the data sets of a study one after the other, and keeps what is measured."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapt.config.pipeline import Config
from adapt.config.study import Study, load_job
from benchmarks.record import machine


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the arguments that scripts for studies share: the study, `--out` and `--datasets`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", help="some of the study's data sets; all by default")
    return parser


def jobs_by_dataset(study: Path) -> dict[str, Config]:
    """The job of every data set of a study with one backbone."""
    loaded = load_job(study)
    assert isinstance(loaded, Study), "a study has `datasets:`"
    return {part.name.split("/")[0]: part.config for part in loaded.parts}


def kept_figures(parser: argparse.ArgumentParser, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures that a file has, or new ones without results; figures of other settings end the script."""
    if not out.exists():
        return {**machine(), "settings": settings, "results": {}}
    figures: dict[str, Any] = json.loads(out.read_text())
    if figures["settings"] != settings:
        parser.error(f"{out} was made with {figures['settings']}, not {settings}")
    return figures


def measure_datasets(
    jobs: dict[str, Config],
    figures: dict[str, Any],
    out: Path,
    measure: Callable[[Config], Any],
    *,
    datasets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The results by data set; those that are missing are measured, and the file is written after each.

    Args:
        jobs: of the data sets.
        figures: those that are known, as of `kept_figures`.
        out: their file.
        measure: gives the result of a data set.
        datasets: which of them are measured; all by default.
    """
    results: dict[str, Any] = figures["results"]
    for name, config in jobs.items():
        if name not in results and (datasets is None or name in datasets):
            results[name] = measure(config)
            out.write_text(json.dumps(figures, indent=1) + "\n")
    return results
