"""docs/architecture.md names files and functions that exist, and its walks are as short as they should be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
STEP = re.compile(r"^\d+\. `(?P<file>[\w./]+\.py)`: (?P<text>.*)$", re.MULTILINE)
STEPS = [(step["file"], name) for step in STEP.finditer(PAGE) for name in re.findall(r"`(\w+)`", step["text"])[:1]]
MOST_STEPS = {"to the pixel": 12, "to the gradient": 9}


def names_in(file: str) -> set[str]:
    """Every function and class of a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("file", "name"), STEPS)
def test_a_step_names_a_function_or_class_of_its_file(file: str, name: str) -> None:
    assert name in names_in(file)


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`([\w./]+/[\w./]+\.py)`", PAGE))))
def test_a_named_file_exists(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("end", MOST_STEPS)
def test_a_walk_is_short(end: str) -> None:
    section = next(part for part in PAGE.split("\n## ") if part.splitlines()[0].endswith(end))
    assert 0 < len(STEP.findall(section)) <= MOST_STEPS[end]


@pytest.mark.parametrize("package", ["adapt", "extract"])
def test_the_picture_has_every_room(package: str) -> None:
    rooms = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    picture = PAGE.partition("```mermaid")[2].partition("```")[0]
    assert all(f'["{room}: ' in picture for room in rooms), rooms
