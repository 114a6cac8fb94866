"""Mutates the code at random places and counts how many mutants the tests kill.

    pytest -n 2 -m 'not slow' --cov=store --cov=adapt --cov=extract --cov-context=test --cov-report= \\
        --junitxml=reach.xml
    python -m benchmarks.mutants --sample 300 --reach .coverage --seconds reach.xml --out mutants.json

The first command records which test reaches which line and how long each test takes (pytest-cov). The second draws
mutants at different places, and for each runs the tests that reach the mutated lines, the fastest first, until one
fails. A mutant on which no test fails has survived; it is printed as a diff. Every mutant runs in a forked process on a
copy of the tree, so that torch is imported once.
"""

import argparse
import difflib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn
from xml.etree import ElementTree

import pytest

from benchmarks.mutation import ROOT, Mutant, draw_mutants, mutate

COPIED = ("adapt", "benchmarks", "docs", "examples", "extract", "sidecache", "store", "tests")
MAX_TEST_SECONDS = 150.0  # per mutant, as recorded; exceeded for lines that nearly every test runs
FROZEN_SECONDS = 120.0  # beyond three times the recorded time, after which a mutant counts as killed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a mutant: `killed`, `frozen` (counts as killed) or `survived`."""

    mutant: Mutant
    outcome: str
    killed_by: str
    tests: int
    seconds: float
    difference: str


class Reach:
    """The recorded tests that reach a line, and how long they take."""

    def __init__(self, data: Path, junit: Path) -> None:
        from coverage import CoverageData

        self._data = CoverageData(str(data))
        self._data.read()
        self._files = {file: self._data.contexts_by_lineno(file) for file in self._data.measured_files()}
        self._seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
            for case in ElementTree.parse(junit).iter("testcase")
        }

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that reach the mutant's lines, or its file if only imports reach them; the fastest first."""
        lines = next((lines for file, lines in self._files.items() if file.endswith(f"/{mutant.file}")), {})
        mutated = range(mutant.first_line, mutant.last_line + 1)
        reaching = _tests_of(context for line in mutated for context in lines.get(line, ()))
        chosen, seconds = [], 0.0
        own = f"test_{Path(mutant.file).stem}"
        reaching = reaching or _tests_of(context for contexts in lines.values() for context in contexts)
        for test in sorted(reaching, key=lambda test: (own not in test, self._seconds.get(test, 1.0), test)):
            seconds += self._seconds.get(test, 1.0)
            if seconds > MAX_TEST_SECONDS and chosen:
                break
            chosen.append(test)
        return chosen

    def seconds(self, tests: Sequence[str]) -> float:
        """The recorded time of some tests."""
        return sum(self._seconds.get(test, 1.0) for test in tests)


def _tests_of(contexts: Iterable[str]) -> set[str]:
    return {context.rsplit("|", 1)[0] for context in contexts if context}


def require_sound(tree: Path) -> None:
    """Raise SystemExit if tests fail on code that is not mutated."""
    if (child := os.fork()) == 0:
        _run_tests(["tests/store/test_store.py", "tests/adapt/test_search.py"], tree)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"the tests fail without any mutant:\n{(tree / 'mutant.log').read_text()[-3000:]}")


class Trial:
    """The tests that reach a mutant, running in a forked process on a copy of the tree."""

    def __init__(self, mutant: Mutant, reach: Reach, tree: Path) -> None:
        self.mutant, self.tree, self._tests = mutant, tree, reach.tests(mutant)
        self._source, changed = mutate(mutant)
        lines = (text.splitlines(keepends=True) for text in (self._source, changed))
        self._difference = "".join(difflib.unified_diff(*lines, mutant.file, n=1))
        (tree / mutant.file).write_text(changed)
        self._started = time.monotonic()
        self._deadline = self._started + 3 * reach.seconds(self._tests) + FROZEN_SECONDS
        self._child = os.fork() if self._tests else 0
        if self._tests and self._child == 0:
            _run_tests(self._tests, tree)

    def outcome(self) -> Outcome | None:
        """The outcome, after the tree is restored; None while the tests run."""
        ended, status = os.waitpid(self._child, os.WNOHANG) if self._tests else (1, 0)  # without tests it survives
        frozen = not ended and time.monotonic() > self._deadline
        if not ended and not frozen:
            return None
        if frozen:
            os.killpg(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        survived = ended and os.waitstatus_to_exitcode(status) == 0
        word = "frozen" if frozen else "survived" if survived else "killed"
        (self.tree / self.mutant.file).write_text(self._source)
        seconds = round(time.monotonic() - self._started, 1)
        return Outcome(
            mutant=self.mutant,
            outcome=word,
            killed_by=self._failed_test(),
            tests=len(self._tests),
            seconds=seconds,
            difference=self._difference,
        )

    def _failed_test(self) -> str:
        log = (self.tree / "mutant.log").read_text(errors="replace") if self._tests else ""
        return next((line for line in log.splitlines() if line.startswith(("FAILED ", "ERROR "))), "")[:200]


def _run_tests(tests: Sequence[str], tree: Path) -> NoReturn:
    """Run tests in the forked process, and exit."""
    code = 1
    try:
        os.setsid()
        log = os.open(tree / "mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.dont_write_bytecode = True  # a mutant may have the size and modification time of the compiled file
        sys.path[:] = [str(tree), *(place for place in sys.path if place and Path(place).resolve() != ROOT)]
        sys.modules["__main__"] = ModuleType("__main__")  # processes that a test spawns import only that
        options = ["-x", "-q", "-n0", "--assert=plain", "-p", "no:cacheprovider", f"--rootdir={tree}"]
        code = int(pytest.main([*options, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def copy_tree(folder: Path) -> Path:
    """Copy the code and its tests, without compiled files."""
    folder.mkdir()
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    return folder


def import_libraries() -> None:
    """Import what every test imports, once."""
    import distributed  # noqa: F401
    import pydantic  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401


def main() -> int:
    """Draw mutants, run their tests, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reach", type=Path, required=True, help="coverage's data, with a context per test")
    parser.add_argument("--seconds", type=Path, required=True, help="pytest's --junitxml of the same run")
    parser.add_argument("--out", type=Path, required=True, help="outcomes as JSON; existing ones are not run again")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run mutants that survived again")
    options = parser.parse_args()
    import_libraries()
    outcomes = judge_all(options)
    survivors = [outcome for outcome in outcomes if outcome.outcome == "survived"]
    for outcome in survivors:
        print(f"{outcome.mutant.operator}, survived {outcome.tests} tests\n{outcome.difference}")
    n_killed = len(outcomes) - len(survivors)
    print(f"{len(outcomes)} mutants, {n_killed} killed: {n_killed / len(outcomes):.1%}")
    return 0


def judge_all(options: argparse.Namespace) -> list[Outcome]:
    """The outcome of every mutant of the sample; each is saved at once."""
    reach, mutants = Reach(options.reach, options.seconds), draw_mutants(options.sample, options.seed)
    outcomes = read_outcomes(options.out, without_survivors=options.again)
    todo = [mutant for mutant in mutants if mutant not in outcomes]
    folder = Path(tempfile.mkdtemp())  # not a TemporaryDirectory: forked processes would remove it at their exit
    try:
        free = [copy_tree(folder / str(number)) for number in range(options.jobs)]
        require_sound(free[0])
        running: list[Trial] = []
        while todo or running:
            while todo and free:
                running.append(Trial(todo.pop(0), reach, free.pop()))
            time.sleep(0.1)
            for trial in list(running):
                if (outcome := trial.outcome()) is not None:
                    running.remove(trial)
                    free.append(trial.tree)
                    outcomes[trial.mutant] = outcome
                    place = f"{trial.mutant.file}:{trial.mutant.first_line}"
                    print(f"{outcome.outcome:8} {outcome.seconds:6} s  {place} {outcome.killed_by}", flush=True)
                    options.out.write_text(json.dumps([asdict(one) for one in outcomes.values()], indent=1))
    finally:
        shutil.rmtree(folder)
    return [outcomes[mutant] for mutant in mutants]


def read_outcomes(file: Path, without_survivors: bool) -> dict[Mutant, Outcome]:
    """The outcomes of an earlier run of the same sample."""
    entries = json.loads(file.read_text()) if file.exists() else []
    outcomes = [Outcome(**{**entry, "mutant": Mutant(**entry["mutant"])}) for entry in entries]
    return {one.mutant: one for one in outcomes if not (without_survivors and one.outcome == "survived")}


if __name__ == "__main__":
    sys.exit(main())
