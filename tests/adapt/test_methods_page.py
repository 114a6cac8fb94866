"""docs/methods.md lists every method, option, formula and paper as the code has them."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adapt.create import list_methods
from adapt.features.specs import spec_of_backbone
from adapt.methods.in_backbone.merge import Mergeable
from adapt.methods.in_backbone.tuned_backbone import TunedBackbone
from adapt.methods.options import MethodOptions
from adapt.methods.registry import METHODS, Method, build_model
from adapt.methods.trained_parameters import count_params
from extract.backbones.backbone import TimmBackbone, empty_backbone

CLASSES = 10
METHODS_PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table with this heading."""
    _, _, rest = METHODS_PAGE.partition(f"{heading}\n")
    lines = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[1:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


TABLE = rows_of("| method | trains from | what is trained | parameters | ViT-B/16 | paper (arXiv) |")
OPTIONS = rows_of("| method | option | default | what it is |")


def test_the_page_lists_every_method_and_what_it_trains_from() -> None:
    needs = {name: "end to end" if method.trains_backbone else "features" for name, method in METHODS.items()}
    assert {row[0]: row[1] for row in TABLE} == needs
    assert len(TABLE) == len(METHODS)


def test_the_page_states_the_counts_that_the_program_prints() -> None:
    listed = list_methods("vit_base_patch16_224", CLASSES)
    assert {row[0]: row[4] for row in TABLE} == {one["method"]: f"{one['trainable_params']:,}" for one in listed}
    assert f"{listed[0]['head_params']:,} for ViT-B/16 and {CLASSES} classes" in METHODS_PAGE


@pytest.mark.parametrize(
    ("backbone", "letters"),
    [
        ("vit_base_patch16_224", {"L": 12, "l": 4, "d": 768, "H": 12, "N": 196, "g": 14, "G": 14, "p": 16, "q": 96}),
        ("vit_small_patch32_224", {"L": 12, "l": 4, "d": 384, "H": 6, "N": 49, "g": 7, "G": 7, "p": 32, "q": 48}),
    ],
)
def test_the_formulas_of_the_page_give_the_counts(backbone: str, letters: dict[str, int]) -> None:
    counts = {one["method"]: one["trainable_params"] for one in list_methods(backbone, CLASSES)}
    named = {
        "rank": "r",
        "token_rank": "s",
        "bottleneck": "h",
        "n": "n",
        "num_prompts": "m",
        "dim": "m",
        "num_queries": "Q",
        "width": "r",
    }
    for row in TABLE:
        defaults = METHODS[row[0]].options().model_dump()
        options = {letter: defaults[option] for option, letter in named.items() if option in defaults}
        assert evaluate(row[3], letters | options) == counts[row[0]], row[3]


def evaluate(formula: str, letters: dict[str, int]) -> int:
    """The value of a formula such as `2L(dh + n^3)`, in which adjacent letters and brackets are multiplied."""
    python = re.sub(r"(?<=[\w)])(?=[A-Za-z(])", "*", formula).replace("^", "**").replace("/", "//")
    value = eval(python, {"__builtins__": {}}, letters)
    assert isinstance(value, int)
    return value


def test_the_page_lists_every_option_with_its_default_and_its_description() -> None:
    stated = {
        (name, row[1].strip("`")): (yaml.safe_load(row[2]), row[3]) for row in OPTIONS for name in row[0].split(", ")
    }
    assert stated.pop(("every method", "pool"))[0] == "auto"
    actual: dict[tuple[str, str], Any] = {}
    for name, method in METHODS.items():
        defaults, descriptions = method.options().model_dump(mode="json"), descriptions_of(method.options)
        assert defaults.pop("pool") == "auto"
        assert descriptions.pop("pool").startswith("what the head reads")
        assert defaults.keys() == descriptions.keys(), name
        actual |= {(name, option): (default, descriptions[option]) for option, default in defaults.items()}
    assert stated == actual


def descriptions_of(options: type[MethodOptions]) -> dict[str, str]:
    """Option -> its entry under `Args:` in the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        _, _, entries = (cls.__dict__.get("__doc__") or "").partition("    Args:\n")
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", entries, re.MULTILINE):
            found[name] = " ".join(text.split()).rstrip(".")
    return found


def test_the_page_cites_the_papers_that_the_code_cites() -> None:
    for row in TABLE:
        method = METHODS[row[0]]
        source = sys.modules[(method.build or method.inject).__module__].__doc__ or ""  # type: ignore[union-attr]
        cited = re.findall(r"\d{4}\.\d{4,5}", row[5])
        assert all(number in source for number in cited), f"{row[0]}: {cited}"


def test_the_page_names_the_methods_that_can_be_merged() -> None:
    sentence = re.search(r"\n(.*) change weights and nothing else", METHODS_PAGE)
    assert sentence
    backbone, mergeable = empty_backbone("vit_tiny_patch16_224", {}), set()
    spec = spec_of_backbone(backbone, range(backbone.depth))
    for name, method in METHODS.items():
        with torch.device("meta"):
            model = build_model(name, spec, CLASSES, method.options(), backbone=backbone)
        if any(isinstance(module, Mergeable) for module in model.modules()):
            mergeable.add(name)
    assert set(re.findall(r"`(\w+)`", sentence[1])) == mergeable


def test_the_page_shows_how_to_merge_and_back(tiny_backbone: TimmBackbone) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", METHODS_PAGE, re.DOTALL)
    spec = spec_of_backbone(tiny_backbone, range(tiny_backbone.depth))
    model = build_model("lora", spec, CLASSES, METHODS["lora"].options(), backbone=tiny_backbone)
    before = model.state_dict()
    exec(block, {"__name__": "example", "model": model})
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_example_of_a_new_method_works(tiny_backbone: TimmBackbone) -> None:
    page = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "example", "Method": Method, "TINY_DEPTH": 3, "TINY_DIM": 32}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)
    method = scope["METHODS"]["scale"]
    for _, options, params in scope["TUNED_CASES"]:
        spec = spec_of_backbone(tiny_backbone, range(tiny_backbone.depth))
        checked = method.options(**options)
        model = TunedBackbone(tiny_backbone, spec, CLASSES, inject=method.inject, options=checked)
        assert count_params(model)[0] == params
