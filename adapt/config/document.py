"""Reads a configuration, of a job or of a study, as plain dicts and lists before it is checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.config.overrides import apply_overrides
from adapt.config.pipeline import Config
from adapt.config.study_sections import StudySections, is_study
from adapt.config.yaml_text import read_yaml

Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A configuration as the user wrote it, with overrides applied.

    Attributes:
        values: its sections, with `${VARIABLE}` where the user wrote it.
        folder: where relative paths start.
    """

    values: dict[str, Any]
    folder: Path

    @property
    def is_study(self) -> bool:
        """Whether it has `datasets:` or `backbones:`."""
        return is_study(self.values)


def read_document(source: Source, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file or a dict of the same shape, and apply overrides.

    Args:
        source: path of a YAML file (relative paths in it are relative to its folder), or a mapping.
        overrides: `section.key=value` strings. A value is plain text if the key holds text, otherwise YAML.

    Raises:
        UserError: the file cannot be read, or is not YAML; an override is not of this form.
    """
    if isinstance(source, Mapping):
        values, folder = dict(source), Path.cwd()
    else:
        values = read_yaml(Path(source))
        folder = Path(source).expanduser().absolute().parent
    return Document(apply_overrides(values, overrides, Config | StudySections), folder)
