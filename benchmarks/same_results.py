"""Checks that a change of the code changes no result: runs one job at two commits and compares what it leaves.

    python -m benchmarks.same_results BEFORE
    python -m benchmarks.same_results BEFORE AFTER --config examples/rsscn7.yaml -o train.epochs=3

Both commits are checked out into the same folder, one after the other, and run the same command. Compared are every
file of the store (its log of times left out), every result row (timings and memory left out), and every adaptor with
its card. Then the code of AFTER opens what BEFORE made: `verify` on the store, `predict` with every adaptor, the
job once more, which must find nothing left to do. Each difference is printed; the exit status is 1 if there is any.
The default job takes about two minutes a commit on two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
MEASURED = (
    "seconds_per_epoch",
    "samples_per_second",
    "peak_memory_bytes",
    "extract_seconds",
    "break_even_epochs",
    "store_bytes",  # counts the digits of the seconds in the store's log
)
CHECKSUM = "checksum"  # of a row, which covers what is measured too


class Checkout:
    """A commit of this repository in a folder that every commit shares, so that paths in results agree."""

    def __init__(self, commit: str, folder: Path) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)

    def sidecache(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line of this commit."""
        environment = {**os.environ, "PYTHONPATH": str(self._folder)}
        command = [sys.executable, "-m", "sidecache", *arguments]
        return subprocess.run(command, cwd=self._folder, env=environment, capture_output=True, text=True, check=False)

    def run(self, config: str, out: Path, overrides: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a whole job into the folder `out`."""
        places = [f"run_dir={out / 'run'}", f"store.path={out / 'cache.zarr'}"]
        done = self.sidecache("run", config, *(f"-o{given}" for given in [*places, *overrides]))
        if done.returncode:
            sys.exit(f"sidecache run failed with exit status {done.returncode}:\n{done.stderr}")
        return done


def differences(before: Path, after: Path) -> Iterator[str]:
    """Every way in which the results of two runs differ, in words."""
    yield from different_files(before / "cache.zarr", after / "cache.zarr", skip="_log")
    yield from different_files(before / "run" / "adaptors", after / "run" / "adaptors")
    old, new = rows_by_trial(before / "run"), rows_by_trial(after / "run")
    for trial in sorted(old.keys() ^ new.keys()):
        yield f"trial {trial} is only in {'BEFORE' if trial in old else 'AFTER'}"
    for trial in sorted(old.keys() & new.keys()):
        for name in sorted(old[trial].keys() | new[trial].keys()):
            pair = old[trial].get(name), new[trial].get(name)
            if pair[0] != pair[1]:
                yield f"trial {trial}: {name} was {pair[0]!r}, is {pair[1]!r}"


def different_files(before: Path, after: Path, skip: str = "") -> Iterator[str]:
    """Files below two folders whose bytes differ, or of which one is missing."""
    old, new = files_below(before, skip), files_below(after, skip)
    if not old:
        yield f"{before.name}: BEFORE left no files"
    for name in sorted(old | new):
        if name not in old or name not in new:
            yield f"{before.name}/{name} is only in {'BEFORE' if name in old else 'AFTER'}"
        elif (before / name).read_bytes() != (after / name).read_bytes():
            yield f"{before.name}/{name} differs"


def files_below(folder: Path, skip: str) -> set[str]:
    """Paths of all files below a folder, relative to it; those of the subfolder `skip` are left out."""
    found = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    return {str(path) for path in found if path.parts[0] != skip}


def rows_by_trial(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Result rows without timings and memory, by trial."""
    rows = json.loads((run_dir / "results.json").read_text())
    return {row["trial_id"]: {k: v for k, v in row.items() if k not in (*MEASURED, CHECKSUM)} for row in rows}


def failures_to_open(after: Checkout, config: str, out: Path, overrides: Sequence[str]) -> Iterator[str]:
    """What the code of AFTER cannot do with the store and the adaptors that BEFORE made."""
    image = out / "image.png"
    Image.effect_mandelbrot((64, 64), (-3, -2.5, 2, 2.5), 50).save(image)
    adaptors = sorted(map(str, (out / "run" / "adaptors").glob("*.safetensors")))
    for command in [["verify", str(out / "cache.zarr")], *(["predict", adaptor, str(image)] for adaptor in adaptors)]:
        if (done := after.sidecache(*command)).returncode:
            yield f"sidecache {' '.join(command)}: {done.stderr.strip()}"
    said = after.run(config, out, overrides).stderr
    finished = said.count("finished before") + said.count("done before")
    if "nothing to extract" not in said or finished != len(adaptors):
        yield f"the job was not found finished ({finished} of {len(adaptors)} trials):\n{said}"


def main() -> int:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", default="HEAD", help="a commit (default: HEAD)")
    parser.add_argument("--config", default="pipeline.yaml", help="a job's file, in both commits")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # Paths are part of a result (the card's, for one), so both commits write to the same place in turn.
        folder, out = Path(scratch, "checkout"), Path(scratch, "out")
        for commit, kept in ((given.before, "before"), (given.after, "after")):
            checkout = Checkout(commit, folder)
            checkout.run(given.config, out, given.overrides)
            out.rename(Path(scratch, kept))
        found = list(differences(Path(scratch, "before"), Path(scratch, "after")))
        n_files = len(files_below(Path(scratch, "before", "cache.zarr"), "_log"))
        n_rows = len(rows_by_trial(Path(scratch, "before", "run")))
        Path(scratch, "before").rename(out)
        found += failures_to_open(checkout, given.config, out, given.overrides)
    print("\n".join(found))
    print(f"{n_files} files of the store, {n_rows} rows and adaptors compared: {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
