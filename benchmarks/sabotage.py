"""Checks that the tests notice faults, by making one fault at a time on purpose.

    python -m benchmarks.sabotage
    python -m benchmarks.sabotage --only "rows never shuffled"

Each fault of `benchmarks.sabotages` is made in a copy of the tree, where the tests that should notice it are run. The
last line is the tree without a fault, on which all these tests must pass. The exit status is 1 if a fault is not
noticed.
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
_FAILED = re.compile(r"^FAILED \S*?(tests/\S+?\.py::\S+)", re.MULTILINE)
_TIMEOUT = 3600  # seconds, since a fault may keep tests from ending


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run of tests.

    Args:
        failed_test: None if all passed.
    """

    failed_test: str | None
    seconds: float


def sabotaged(sabotage: Sabotage) -> str:
    """The text of the file with the fault.

    Raises:
        UserError: the file does not contain the text to replace exactly once.
    """
    text = (ROOT / sabotage.file).read_text(encoding="utf-8")
    if (found := text.count(sabotage.old)) != 1:
        raise UserError(f"{sabotage.name}: found {found} times in {sabotage.file}, not once: {sabotage.old!r}")
    return text.replace(sabotage.old, sabotage.new)


def run(sabotage: Sabotage | None, tests: Sequence[str]) -> Outcome:
    """Run tests in a copy of the tree, with or without a fault.

    Raises:
        RuntimeError: the tests did not run, such as when an import fails.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder:
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, Path(folder) / name)
        if sabotage:
            (Path(folder) / sabotage.file).write_text(sabotaged(sabotage), encoding="utf-8")
        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        completed = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    if completed.returncode not in (0, 1):
        raise RuntimeError(f"{sabotage.name if sabotage else 'no fault'}: {completed.stdout[-3000:]}{completed.stderr}")
    failed_test = None
    if completed.returncode:
        match = _FAILED.search(completed.stdout)
        failed_test = match[1] if match else "an error"
    return Outcome(failed_test, time.perf_counter() - started)


def main() -> int:
    """Parse the command line and run the chosen sabotages; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="only this one; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--at-once", type=int, default=2)
    options = parser.parse_args()
    chosen = [sabotage for sabotage in SABOTAGES if not options.only or sabotage.name in options.only]
    if unknown := set(options.only or ()) - {sabotage.name for sabotage in chosen}:
        parser.error(f"there is no {', '.join(map(repr, sorted(unknown)))}; see --list")
    if options.list:
        print(*(sabotage.name for sabotage in chosen), sep="\n")
        return 0
    for sabotage in chosen:
        sabotaged(sabotage)  # fails before the first run if one does not apply
    return report(chosen, options.at_once)


def report(chosen: Sequence[Sabotage], at_once: int) -> int:
    """Run sabotages, print a line for each, and return the exit status."""
    all_tests = tuple(dict.fromkeys(test for sabotage in chosen for test in sabotage.tests))
    with ThreadPoolExecutor(at_once) as pool:
        pending = [(sabotage, pool.submit(run, sabotage, sabotage.tests)) for sabotage in chosen]
        without_fault = pool.submit(run, None, all_tests)
        survived = 0
        for sabotage, future in pending:
            outcome = future.result()
            survived += outcome.failed_test is None
            _print_line(sabotage.name, outcome, outcome.failed_test or "SURVIVES")
        failed = without_fault.result().failed_test
        _print_line("none", without_fault.result(), f"FAILS {failed}" if failed else "all pass")
    print(f"{len(chosen) - survived} of {len(chosen)} noticed")
    return int(bool(survived or failed))


def _print_line(name: str, outcome: Outcome, verdict: str) -> None:
    print(f"{name:42} {outcome.seconds:5.0f} s  {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
