"""Draws mutants of the code with cosmic-ray: one change at one place."""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTATED = (
    "store/*.py",
    "store/*/*.py",
    "adapt/training/*.py",
    "adapt/report/fingerprint.py",
    "extract/forward/frozen_forward.py",
)

Position = tuple[int, int]  # line, column


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one place.

    Attributes:
        file: relative to the root of the repository.
        operator: cosmic-ray's name of the change.
        occurrence: which of the operator's places in the file.
    """

    file: str
    operator: str
    occurrence: int
    first_line: int
    last_line: int


def draw_mutants(count: int, seed: int) -> list[Mutant]:
    """Mutants that compile, at different places; each place is equally likely."""
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


def mutants_of(file: Path) -> dict[Position, list[Mutant]]:
    """Position -> the mutants there; annotations are left out, since they change no value."""
    from cosmic_ray import plugins  # of the dev extra, as pytest-cov is
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    annotations, tree = list(annotations_of(file.read_text())), get_ast_from_path(file)
    by_position: dict[Position, list[Mutant]] = {}
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if operator.arguments():
            continue
        places = (place for node in ast_nodes(tree) for place in operator().mutation_positions(node))
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start <= last for first, last in annotations):
                mutant = Mutant(
                    file=str(file.relative_to(ROOT)),
                    operator=name,
                    occurrence=occurrence,
                    first_line=start[0],
                    last_line=end[0],
                )
                by_position.setdefault(start, []).append(mutant)
    return by_position


def annotations_of(source: str) -> Iterator[tuple[Position, Position]]:
    """Start and end of every annotation, and of every type alias."""
    for node in ast.walk(ast.parse(source)):
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp | ast.Subscript):
            annotations.append(node.value if node.col_offset == 0 and node.targets[0].id[:1].isupper() else None)
        for annotation in filter(None, annotations):
            start = annotation.lineno, annotation.col_offset
            yield start, (annotation.end_lineno, annotation.end_col_offset)


def mutate(mutant: Mutant) -> tuple[str, str]:
    """The file's text before and after the change."""
    from cosmic_ray import mutating, plugins

    source = (ROOT / mutant.file).read_text()
    changed = mutating.mutate_code(source, plugins.get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None, mutant
    return source, changed


def compiles(source: str) -> bool:
    """Whether a text is valid Python: some operators write other texts."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True
