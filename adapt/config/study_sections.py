"""The sections of a study that a single job does not have: named data sets and backbones."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from adapt.config.messages import show
from extract.config import BackboneConfig, DataConfig
from store.errors import UserError
from store.strict_model import StrictModel

_LEGAL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# files of the run directory of a study; besides, `results.csv` and the like
_RESERVED = ("report.html", "study.json")


class StudySections(StrictModel):
    """The sections `datasets:` and `backbones:`, by name; an empty one is not given."""

    datasets: dict[str, DataConfig] = Field(
        {}, min_length=1, description="{NAME: a section like `data:`}, with at least one name"
    )
    backbones: dict[str, BackboneConfig] = Field(
        {}, min_length=1, description="{NAME: a section like `backbone:`}, with at least one name"
    )


STUDY_KEYS = tuple(StudySections.model_fields)


def is_study(document: Mapping[str, Any]) -> bool:
    """Whether a configuration is a study, as opposed to a single job."""
    return any(key in document for key in STUDY_KEYS)


def check_names(key: str, names: Iterable[str]) -> None:
    """Refuse names that cannot be a folder on every file system, or that differ from another only in case.

    Args:
        key: the section that has them.

    Raises:
        UserError: the message has the name and the legal ones.
    """
    known: dict[str, str] = {}
    for name in names:
        where = f"{key}: given the name {show(name)}"
        if not _LEGAL_NAME.fullmatch(name):
            raise UserError(
                f"{where}; legal: at most 100 letters, digits, `.`, `_` and `-`, beginning with a letter, a digit or "
                "`_`: it becomes the name of a folder"
            )
        if name.lower() in _RESERVED or name.lower().startswith("results."):
            raise UserError(f"{where}; a file of the run directory has this name; choose another one")
        if other := known.get(name.lower()):
            raise UserError(f"{where} beside {show(other)}; legal: names that differ in more than case")
        known[name.lower()] = name
