"""Mutates the code at random places and counts how many of the mutants the tests kill.

    pytest -n 2 -m 'not slow' --cov=store --cov=adapt --cov=extract --cov-context=test --cov-report= \\
        --junitxml=reach.xml
    python -m benchmarks.mutants --sample 300 --reach .coverage --seconds reach.xml --out mutants.json

The first command records which test reaches which line and how long each test takes (pytest-cov). The second draws
mutants of cosmic-ray, each at a place of its own, and runs the tests that reach the mutated lines, the fastest first,
until one fails. Mutants of annotations are left out, since they change no value. A mutant that no test fails on has
survived; it is printed with its difference. Every mutant is a forked process in a copy of the tree, so that torch is
imported once.
"""

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
MUTATED = (
    "store/*.py",
    "store/*/*.py",
    "adapt/training/*.py",
    "adapt/report/fingerprint.py",
    "extract/forward/frozen_forward.py",
)
COPIED = ("adapt", "benchmarks", "docs", "examples", "extract", "sidecache", "store", "tests")
SLOWEST_SET = 150.0  # seconds of tests a mutant, by the record; reached by lines that nearly every test runs
FROZEN = 120.0  # seconds beyond three times the record after which a mutant counts as killed: it does not end

Position = tuple[int, int]  # line, column


@dataclass(frozen=True)
class Mutant:
    """One change of one place.

    Args:
        file: below the root.
        operator: cosmic-ray's name of the change.
        occurrence: which of the operator's places in the file.
    """

    file: str
    operator: str
    occurrence: int
    first_line: int
    last_line: int


@dataclass(frozen=True)
class Outcome:
    """What the tests said: `killed`, `frozen` (counts as killed) or `survived`."""

    mutant: Mutant
    outcome: str
    killed_by: str
    tests: int
    seconds: float
    difference: str


def annotated_places(source: str) -> Iterator[tuple[Position, Position]]:
    """Start and end of every annotation."""
    for node in ast.walk(ast.parse(source)):
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp | ast.Subscript):
            annotations.append(node.value if node.col_offset == 0 and node.targets[0].id[:1].isupper() else None)
        for found in filter(None, annotations):
            yield (found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)


def mutants_of(file: Path) -> dict[Position, list[Mutant]]:
    """TargetModule -> what can be changed there."""
    from cosmic_ray import plugins  # of the dev extra, as pytest-cov is
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    annotations, tree = list(annotated_places(file.read_text())), get_ast_from_path(file)
    found: dict[Position, list[Mutant]] = {}
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if kind.arguments():
            continue
        places = (place for node in ast_nodes(tree) for place in kind().mutation_positions(node))
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start <= last for first, last in annotations):
                mutant = Mutant(str(file.relative_to(ROOT)), name, occurrence, start[0], end[0])
                found.setdefault(start, []).append(mutant)
    return found


def draw(count: int, seed: int) -> list[Mutant]:
    """Mutants that compile, at different places, each place as likely as any other."""
    files = [file for pattern in MUTATED for file in sorted(ROOT.glob(pattern))]
    places = [choices for file in files for _, choices in sorted(mutants_of(file).items())]
    generator = random.Random(seed)
    generator.shuffle(places)
    drawn: list[Mutant] = []
    for choices in places:
        mutant = generator.choice(choices)
        if len(drawn) < count and compiles(mutate(mutant)[1]):
            drawn.append(mutant)
    return drawn


def compiles(source: str) -> bool:
    """Whether it is Python: some operators write what is not."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


class Reach:
    """Which tests reach a line, and how long they take."""

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
        """Those that reach the mutant's lines; where only imports do, those that reach its file. The fastest first."""
        lines = next((lines for file, lines in self._files.items() if file.endswith(f"/{mutant.file}")), {})
        mutated = range(mutant.first_line, mutant.last_line + 1)
        reaching = _tests_of(context for line in mutated for context in lines.get(line, ()))
        chosen, seconds = [], 0.0
        own = f"test_{Path(mutant.file).stem}"
        reaching = reaching or _tests_of(context for contexts in lines.values() for context in contexts)
        for test in sorted(reaching, key=lambda test: (own not in test, self._seconds.get(test, 1.0), test)):
            seconds += self._seconds.get(test, 1.0)
            if seconds > SLOWEST_SET and chosen:
                break
            chosen.append(test)
        return chosen

    def seconds(self, tests: Sequence[str]) -> float:
        """What they take together."""
        return sum(self._seconds.get(test, 1.0) for test in tests)


def _tests_of(contexts: Iterable[str]) -> set[str]:
    return {context.rsplit("|", 1)[0] for context in contexts if context}


def mutate(mutant: Mutant) -> tuple[str, str]:
    """The file's text before and after."""
    from cosmic_ray import mutating, plugins

    source = (ROOT / mutant.file).read_text()
    changed = mutating.mutate_code(source, plugins.get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None, mutant
    return source, changed


def require_sound(tree: Path) -> None:
    """Raise SystemExit where tests fail on code that is not mutated: then their failures would say nothing."""
    if (child := os.fork()) == 0:
        _run_tests(["tests/store/test_store.py", "tests/adapt/test_search.py"], tree)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"the tests fail without any mutant:\n{(tree / 'mutant.log').read_text()[-3000:]}")


class Trial:
    """The tests that reach a mutant, running in a forked process on a copy of the tree of its own."""

    def __init__(self, mutant: Mutant, reach: Reach, tree: Path) -> None:
        self.mutant, self.tree, self._tests = mutant, tree, reach.tests(mutant)
        self._source, changed = mutate(mutant)
        lines = (text.splitlines(keepends=True) for text in (self._source, changed))
        self._difference = "".join(difflib.unified_diff(*lines, mutant.file, n=1))
        (tree / mutant.file).write_text(changed)
        self._started = time.monotonic()
        self._deadline = self._started + 3 * reach.seconds(self._tests) + FROZEN
        self._child = os.fork() if self._tests else 0
        if self._tests and self._child == 0:
            _run_tests(self._tests, tree)

    def outcome(self) -> Outcome | None:
        """What the tests said, with the tree put back; None while they run."""
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
        return Outcome(self.mutant, word, self._failed(), len(self._tests), seconds, self._difference)

    def _failed(self) -> str:
        log = (self.tree / "mutant.log").read_text(errors="replace") if self._tests else ""
        return next((line for line in log.splitlines() if line.startswith(("FAILED ", "ERROR "))), "")[:200]


def _run_tests(tests: Sequence[str], tree: Path) -> NoReturn:
    """In the forked process: it never returns to what its parent does."""
    code = 1
    try:
        os.setsid()
        log = os.open(tree / "mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.dont_write_bytecode = True  # a mutant may have the size and the second of the file that was compiled
        sys.path[:] = [str(tree), *(place for place in sys.path if place and Path(place).resolve() != ROOT)]
        sys.modules["__main__"] = ModuleType("__main__")  # processes that a test spawns import no more than it
        options = ["-x", "-q", "-n0", "--assert=plain", "-p", "no:cacheprovider", f"--rootdir={tree}"]
        code = int(pytest.main([*options, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def copy_tree(folder: Path) -> Path:
    """The code and its tests, without compiled files."""
    folder.mkdir()
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    return folder


def import_libraries() -> None:
    """What every test imports, once for all."""
    import distributed  # noqa: F401
    import pydantic  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reach", type=Path, required=True, help="coverage's data, with a context for every test")
    parser.add_argument("--seconds", type=Path, required=True, help="pytest's --junitxml of the same run")
    parser.add_argument("--out", type=Path, required=True, help="outcomes as JSON; those that are there are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run those that survived again, on today's tests")
    given = parser.parse_args()
    import_libraries()
    outcomes = judge_all(given)
    alive = [outcome for outcome in outcomes if outcome.outcome == "survived"]
    for outcome in alive:
        print(f"{outcome.mutant.operator}, survived {outcome.tests} tests\n{outcome.difference}")
    print(f"{len(outcomes)} mutants, {len(outcomes) - len(alive)} killed: {1 - len(alive) / len(outcomes):.1%}")
    return 0


def judge_all(given: argparse.Namespace) -> list[Outcome]:
    """Every mutant of the sample; outcomes are kept as they come."""
    reach, mutants = Reach(given.reach, given.seconds), draw(given.sample, given.seed)
    kept = read_outcomes(given.out, without_survivors=given.again)
    todo = [mutant for mutant in mutants if mutant not in kept]
    folder = Path(
        tempfile.mkdtemp()
    )  # no TemporaryDirectory: processes that a test forks would remove it at their exit
    try:
        free = [copy_tree(folder / str(number)) for number in range(given.jobs)]
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
                    kept[trial.mutant] = outcome
                    place = f"{trial.mutant.file}:{trial.mutant.first_line}"
                    print(f"{outcome.outcome:8} {outcome.seconds:6} s  {place} {outcome.killed_by}", flush=True)
                    given.out.write_text(json.dumps([asdict(one) for one in kept.values()], indent=1))
    finally:
        shutil.rmtree(folder)
    return [kept[mutant] for mutant in mutants]


def read_outcomes(file: Path, without_survivors: bool) -> dict[Mutant, Outcome]:
    """Those of an earlier run of the same sample."""
    entries = json.loads(file.read_text()) if file.exists() else []
    outcomes = [Outcome(**{**entry, "mutant": Mutant(**entry["mutant"])}) for entry in entries]
    return {one.mutant: one for one in outcomes if not (without_survivors and one.outcome == "survived")}


if __name__ == "__main__":
    sys.exit(main())
