"""Loads a study: data sets times backbones, each combination of which is a job in a run directory of its own."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from adapt.config.document import Document, Source, read_document
from adapt.config.load_config import parse_config
from adapt.config.messages import explain, show
from adapt.config.pipeline import Config
from adapt.config.study_sections import STUDY_KEYS, StudySections, check_names
from adapt.config.variables import expand
from store.errors import UserError

_MOST_PARTS = 1_000  # stops a mistake
_STORE = "cache.zarr"  # in the run directory of a part, unless `store.path` is given
_SINGULAR = {"datasets": "data", "backbones": "backbone"}  # the section of a job that a map replaces
_PLACE = {"datasets": "dataset", "backbones": "backbone"}
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")  # `{dataset}`, but not the variable `${dataset}`


@dataclass(frozen=True, kw_only=True)
class Part:
    """One combination of a study.

    Attributes:
        dataset: its name in the study; None if the study has no `datasets:`.
        backbone: its name in the study; None if the study has no `backbones:`.
        config: the configuration of its job.
    """

    dataset: str | None
    backbone: str | None
    config: Config

    @property
    def name(self) -> str:
        """Such as `rsscn7/vit_tiny`: the folder of the part below the run directory of the study."""
        return "/".join(name for name in (self.dataset, self.backbone) if name)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Data sets times backbones.

    Attributes:
        name: for the title of the report.
        run_dir: receives the results of the whole, and a folder for every part.
        parts: every combination.
        as_written: the configuration with overrides applied, and `${VARIABLE}` as the user wrote it.
    """

    name: str
    run_dir: Path
    parts: tuple[Part, ...]
    as_written: Mapping[str, Any]


def load_study(source: Source, overrides: Sequence[str] = ()) -> Study:
    """Read a study: a YAML file like pipeline.yaml with `datasets:` or `backbones:`, or a dict of the same shape.

    Arguments are those of `load_config`; `-o datasets.NAME.key=value` changes one data set.

    Raises:
        UserError: not YAML, not a study, an unknown key, an illegal value, or parts that would share a store.
    """
    document = read_document(source, overrides)
    if not document.is_study:
        raise UserError(
            "this is the configuration of a single job; a study has `datasets:` or `backbones:`, which map names to "
            "sections. From Python, load a single job with `load_config`"
        )
    return _parse_study(document)


def load_job(source: Source, overrides: Sequence[str] = ()) -> Config | Study:
    """Read a study or a single job: a study has `datasets:` or `backbones:`.

    Arguments and errors are those of `load_config`.
    """
    document = read_document(source, overrides)
    return _parse_study(document) if document.is_study else parse_config(document)


def _parse_study(document: Document) -> Study:
    whole = _check(document)
    given = {key: document.values[key] for key in STUDY_KEYS if key in document.values}
    if (n_parts := math.prod(map(len, given.values()))) > _MOST_PARTS:
        raise UserError(f"{' x '.join(given)}: there are {n_parts:,} combinations; legal: at most {_MOST_PARTS:,}")
    parts = tuple(_parts(document, given))
    _refuse_shared_stores(parts, document, given)
    return Study(name=whole.name, run_dir=whole.run_dir, parts=parts, as_written=to_jsonable_python(document.values))


def _check(document: Document) -> Config:
    """Check the maps, their names and all other sections, and report their mistakes at once.

    Returns:
        the other sections, as the configuration of a job.
    """
    given = {key: value for key, value in document.values.items() if key in STUDY_KEYS}
    mistakes = [
        f"{_SINGULAR[key]} and {key} are both given; keep one" for key in given if _SINGULAR[key] in document.values
    ]
    try:
        sections = StudySections.model_validate(expand(given))
        for key in STUDY_KEYS:
            check_names(key, getattr(sections, key))
    except ValidationError as error:
        mistakes.append(explain(error, StudySections))
    except UserError as error:
        mistakes.append(str(error))
    except RecursionError:
        mistakes.append("the configuration is nested too deeply, or holds itself")
    stand_in = {"backbone": {"weights": "random"}} if "backbones" in given else {}
    try:
        whole = parse_config(replace(document, values=_without_maps(document) | stand_in), STUDY_KEYS)
    except UserError as error:
        mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return whole


def _without_maps(document: Document) -> dict[str, Any]:
    return {key: value for key, value in document.values.items() if key not in STUDY_KEYS}


def _parts(document: Document, given: Mapping[str, Any]) -> Iterator[Part]:
    """Every combination, backbone by backbone within a data set."""
    for sections in itertools.product(*(given[key].items() for key in given)):
        names = {_PLACE[key]: name for key, (name, _) in zip(given, sections, strict=True)}
        values = _without_maps(document)
        values |= {_SINGULAR[key]: section for key, (_, section) in zip(given, sections, strict=True)}
        values["run_dir"] = "/".join(
            [str(values.get("run_dir", Config.model_fields["run_dir"].default)), *names.values()]
        )
        values["store"] = values.get("store", {}) | {"path": _store_path(values, names)}
        values["report_as"] = values.get("report_as", {}) | names
        config = parse_config(replace(document, values=values))
        yield Part(dataset=names.get("dataset"), backbone=names.get("backbone"), config=config)


def _store_path(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The store of a part: in its run directory, or `store.path` with `{dataset}` and `{backbone}` replaced.

    Raises:
        UserError: another name stands in the braces.
    """
    template = values.get("store", {}).get("path")
    if template is None:
        return f"{values['run_dir']}/{_STORE}"

    def name(found: re.Match[str]) -> str:
        if found[1] not in names:
            legal = " and ".join(f"{{{place}}}" for place in names)
            raise UserError(f"store.path: given {show(template)}; {found[0]} is unknown; legal in this study: {legal}")
        return names[found[1]]

    return _PLACEHOLDER.sub(name, template)


def _refuse_shared_stores(parts: Sequence[Part], document: Document, given: Mapping[str, Any]) -> None:
    owner: dict[str, Part] = {}
    for part in parts:
        other = owner.setdefault(part.config.store.path, part)
        if other is not part:
            places = " and ".join(f"{{{_PLACE[key]}}}" for key in given if len(given[key]) > 1)
            raise UserError(
                f"store.path: given {show(document.values['store']['path'])}; {other.name} and {part.name} would share "
                f"this store; legal: a path with {places}, or none: every part then has a store in its run directory"
            )
