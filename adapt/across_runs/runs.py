"""Finds run directories below folders, and reads their result rows."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapt.run_dir.config_file import configured_methods
from adapt.run_dir.predictions import Predictions, find_predictions
from adapt.run_dir.results import Row, in_order, read_results
from store.errors import Note, UserError


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Result rows of any number of run directories.

    Args:
        rows: one a trial, in the order in which tables show them.
        run_dirs: the run directory of every trial, by its id.
        methods: names of the methods in the order in which the runs' configurations have them.
    """

    rows: tuple[Row, ...]
    run_dirs: Mapping[str, Path]
    methods: tuple[str, ...]

    def read_predictions(self, row: Row) -> Predictions | None:
        """The predictions of a row; None if it was trained before predictions were kept."""
        return find_predictions(self.run_dirs[row.trial_id], row)


def results(paths: str | Path | Sequence[str | Path]) -> list[Row]:
    """The result rows of run directories.

    Args:
        paths: run directories, or folders that contain some at any depth.

    Raises:
        UserError: there are no results, or a file is damaged.
    """
    return list(read_runs([paths] if isinstance(paths, str | Path) else paths).rows)


def read_runs(paths: Iterable[str | Path]) -> Runs:
    """Read run directories; a trial that several of them have counts once.

    Args:
        paths: run directories, or folders that contain some at any depth.

    Raises:
        UserError: there are no results, or a file is damaged.
    """
    rows: dict[str, Row] = {}
    run_dirs: dict[str, Path] = {}
    methods: list[str] = []
    n_repeated = 0
    for run_dir in find_run_dirs(paths):
        methods += configured_methods(run_dir)
        for row in read_results(run_dir):
            n_repeated += row.trial_id in rows
            rows.setdefault(row.trial_id, row)
            run_dirs.setdefault(row.trial_id, run_dir)
    if n_repeated:
        warnings.warn(f"{n_repeated} rows are of trials that another run has too; each counts once", Note, stacklevel=2)
    return Runs(rows=tuple(in_order(rows.values(), methods)), run_dirs=run_dirs, methods=tuple(dict.fromkeys(methods)))


def find_run_dirs(paths: Iterable[str | Path]) -> list[Path]:
    """The folders with a `results.json`, each once: these paths and what is below them, links not followed.

    Raises:
        UserError: a path is no folder, or has no results in it.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give run directories, or folders that contain some")
        below = sorted(_folders_with_results(path))
        if not below:
            raise UserError(f"no results in {path} or below it: run `sidecache run` first")
        for run_dir in below:
            found.setdefault(run_dir.resolve(), run_dir)
    return list(found.values())


def _folders_with_results(path: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(path):
        if "zarr.json" in files:  # a store, which has many folders and no results
            below.clear()
        if "results.json" in files:
            yield Path(folder)
