"""Holds the size of files, functions and signatures, so that neither grows unnoticed.

    python .ci/limits.py

Limits: 300 lines a file, 40 lines a function (docstring included), 6 parameters (without `self` and `cls`; those of a
command are its options, and are not counted), 4 positional arguments a call. `ALLOWED` lists what exceeds a limit
today; an entry that is no longer needed is an error too, so that the list only shrinks.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LINES_A_FILE, LINES_A_FUNCTION, PARAMETERS, POSITIONAL = 300, 40, 6, 4
ALLOWED: dict[str, int] = {}
_ANY_NUMBER = {"print", "max", "min", "zip", "chain", "submit", "reshape", "frombytes"}  # of other libraries
Function = ast.FunctionDef | ast.AsyncFunctionDef


def excesses(path: str, source: str) -> Iterator[tuple[str, int]]:
    """(what exceeds a limit, by how much it measures) in one file."""
    tree = ast.parse(source)
    if (n_lines := len(source.splitlines())) > LINES_A_FILE:
        yield f"{path}: lines", n_lines
    for name, function in functions(tree):
        if (n_lines := lines_of(function)) > LINES_A_FUNCTION:
            yield f"{path}: lines of {name}", n_lines
        if not is_command(function) and (n_parameters := count_parameters(function)) > PARAMETERS:
            yield f"{path}: parameters of {name}", n_parameters
    for name, call in calls(tree):
        n_positional = sum(not isinstance(argument, ast.Starred) for argument in call.args)
        if n_positional > POSITIONAL and name.rpartition(".")[2] not in _ANY_NUMBER:
            yield f"{path}: positional arguments of {name}()", n_positional


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function below a node with its qualified name."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, Function):
            yield name, child
        yield from functions(child, f"{name}." if isinstance(child, Function | ast.ClassDef) else prefix)


def is_command(function: Function) -> bool:
    """Whether it is a command of the command line."""
    return any(ast.unparse(decorator).startswith("app.command(") for decorator in function.decorator_list)


def lines_of(function: Function) -> int:
    """From `def` to its last line."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def count_parameters(function: Function) -> int:
    """Parameters of a signature, without `self` and `cls`."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).splitlines()[0][:60], node


def tracked_files() -> list[str]:
    """The Python files of the packages, the benchmarks and the command line."""
    listed = subprocess.run(["git", "ls-files", "*.py"], check=True, capture_output=True, text=True).stdout
    return [path for path in listed.splitlines() if not path.startswith(("tests/", ".ci/"))]


def main() -> int:
    """Print every change of the list; 1 where there is one."""
    found: dict[str, int] = {}
    for path in tracked_files():
        for what, measured in excesses(path, Path(path).read_text()):
            found[what] = max(measured, found.get(what, 0))
    worse = {what: measured for what, measured in found.items() if measured > ALLOWED.get(what, 0)}
    better = {what: limit for what, limit in ALLOWED.items() if found.get(what, 0) < limit}
    for what, measured in worse.items():
        print(f"{what}: {measured}; the limit is {ALLOWED.get(what, 'lower, see .ci/limits.py')}")
    for what, limit in better.items():
        print(f"{what}: {found.get(what, 'within the limit')}; lower or remove its entry {limit} in .ci/limits.py")
    return 1 if worse or better else 0


if __name__ == "__main__":
    sys.exit(main())
