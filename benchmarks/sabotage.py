"""Breaks the program on purpose, one fault at a time, and sees whether a test notices.

    python -m benchmarks.sabotage
    python -m benchmarks.sabotage --only "rows never shuffled"

Every fault of `benchmarks.sabotages` is made in a copy of the tree, in which the tests that guard against it are run.
The last line is the tree as it is, which all of these tests must pass. The exit status is 1 if a fault goes unnoticed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sabotages import SABOTAGES, Sabotage
from store.errors import UserError

ROOT = Path(__file__).parents[1]
_COPIED = ("adapt", "benchmarks", "extract", "sidecache", "store", "tests", "pyproject.toml")
_FAILED = re.compile(r"^FAILED \S*?(test_\w+\.py::\S+)", re.MULTILINE)
_PATIENCE = 3600  # seconds, for tests that a fault may keep from ending


@dataclass(frozen=True)
class Outcome:
    """Of one run of tests: the test that failed, None where all passed."""

    killer: str | None
    seconds: float


def sabotaged(sabotage: Sabotage) -> str:
    """The text of the file with the fault in it.

    Raises:
        UserError: the text to replace is not there, or more than once.
    """
    text = (ROOT / sabotage.file).read_text(encoding="utf-8")
    if (found := text.count(sabotage.old)) != 1:
        raise UserError(f"{sabotage.name}: found {found} times in {sabotage.file}, not once: {sabotage.old!r}")
    return text.replace(sabotage.old, sabotage.new)


def run(sabotage: Sabotage | None, tests: Sequence[str]) -> Outcome:
    """Run tests in a copy of the tree, with a fault or as it is.

    Raises:
        RuntimeError: the tests did not run: the fault is one that any import would notice.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder:
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, Path(folder) / name)
        if sabotage:
            (Path(folder) / sabotage.file).write_text(sabotaged(sabotage), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            *tests,
        ]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{sabotage.name if sabotage else 'the tree as it is'}: {done.stdout[-3000:]}{done.stderr}")
    found = _FAILED.search(done.stdout)
    killer = (found[1] if found else "an error") if done.returncode else None
    return Outcome(killer, time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="this one; may be given again")
    parser.add_argument("--list", action="store_true", help="print their names")
    parser.add_argument("--at-once", type=int, default=2)
    given = parser.parse_args()
    chosen = [sabotage for sabotage in SABOTAGES if not given.only or sabotage.name in given.only]
    if unknown := set(given.only or ()) - {sabotage.name for sabotage in chosen}:
        parser.error(f"there is no {', '.join(map(repr, sorted(unknown)))}; see --list")
    if given.list:
        print(*(sabotage.name for sabotage in chosen), sep="\n")
        return 0
    for sabotage in chosen:
        sabotaged(sabotage)  # all of them apply, before the first is run
    return report(chosen, given.at_once)


def report(chosen: Sequence[Sabotage], at_once: int) -> int:
    """Run them all, print a line for each, and return the exit status."""
    guards = tuple(dict.fromkeys(test for sabotage in chosen for test in sabotage.tests))
    with ThreadPoolExecutor(at_once) as pool:
        pending = [(sabotage, pool.submit(run, sabotage, sabotage.tests)) for sabotage in chosen]
        whole = pool.submit(run, None, guards)
        survived = 0
        for sabotage, future in pending:
            outcome = future.result()
            survived += outcome.killer is None
            _print_line(sabotage.name, outcome, outcome.killer or "SURVIVES")
        failed = whole.result().killer
        _print_line("none", whole.result(), f"FAILS {failed}" if failed else "all pass")
    print(f"{len(chosen) - survived} of {len(chosen)} noticed")
    return int(bool(survived or failed))


def _print_line(name: str, outcome: Outcome, told: str) -> None:
    print(f"{name:42} {outcome.seconds:5.0f} s  {told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
