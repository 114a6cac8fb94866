"""Loads a configuration: reads pipeline.yaml, applies overrides and variables, checks it and makes paths absolute."""

import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapt.config.document import Document, Source, read_document
from adapt.config.messages import explain, show
from adapt.config.pipeline import Config
from adapt.config.variables import ExpandedText, Keys, expand, expanded_texts
from store.errors import UserError


def load_config(source: Source, overrides: Sequence[str] = ()) -> Config:
    """Read pipeline.yaml, or a dict of the same shape.

    Args:
        source: path of a YAML file (relative paths in it are relative to its folder), or a mapping.
        overrides: `section.key=value` strings. A value is plain text if the key holds text, otherwise YAML.

    Raises:
        UserError: not YAML, an unknown key or an illegal value; the message names the key and the legal values.
    """
    document = read_document(source, overrides)
    if document.is_study:
        name = "this configuration" if isinstance(source, Mapping) else str(source)
        raise UserError(
            f"{name} is a study of several jobs, since it has `datasets:` or `backbones:`; give the configuration of "
            "one job, such as the config.yaml that a study writes for each of its parts. From Python, load a study "
            "with `load_study`"
        )
    return parse_config(document)


def parse_config(document: Document, more_keys: Sequence[str] = ()) -> Config:
    """Check the configuration of a job, expand its variables and make its paths absolute.

    Args:
        more_keys: further legal keys of the document, which the caller has removed.

    Raises:
        UserError: an unknown key or an illegal value.
    """
    try:
        config = Config.model_validate(expand(document.values))
    except ValidationError as error:
        raise UserError(explain(error, Config, more_keys)) from error
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply, or holds itself") from error
    folder, texts = document.folder, expanded_texts(document.values)
    config = _make_paths_absolute(config, folder)
    config._expanded_texts = tuple(_make_text_absolute(text, config, folder) for text in texts)
    return config


def _make_paths_absolute(config: Config, folder: Path) -> Config:
    """Make relative paths absolute, from the folder of the YAML file; URLs and names of weights are kept."""
    data, backbone, store = config.data, config.backbone, config.store
    if data.root is not None:
        data = data.model_copy(update={"root": _absolute("data.root", data.root, folder)})
    if backbone.weights not in ("pretrained", "random") and not backbone.weights.startswith("hf-hub:"):
        weights = _absolute("backbone.weights", backbone.weights, folder)
        backbone = backbone.model_copy(update={"weights": str(weights)})
    if "://" not in store.path:
        store = store.model_copy(update={"path": str(_absolute("store.path", store.path, folder))})
    run_dir = _absolute("run_dir", config.run_dir, folder)
    return config.model_copy(update={"run_dir": run_dir, "data": data, "backbone": backbone, "store": store})


def _make_text_absolute(text: ExpandedText, config: Config, folder: Path) -> ExpandedText:
    """The same for a text with variables, if it is one of these paths."""
    absolute_paths: dict[Keys, Any] = {
        ("run_dir",): config.run_dir,
        ("data", "root"): config.data.root,
        ("backbone", "weights"): config.backbone.weights,
        ("store", "path"): config.store.path,
    }
    value = str(absolute_paths.get(text.keys, text.value))
    if value == text.value:
        return text
    is_absolute = Path(text.value).expanduser().is_absolute()
    return ExpandedText(text.keys, text.written if is_absolute else str(folder / text.written), value)


def _absolute(key: str, path: str | Path, folder: Path) -> Path:
    try:
        absolute = Path(os.path.normpath(folder / Path(path).expanduser()))
    except RuntimeError as error:
        raise UserError(f"{key}: given {show(str(path))}; there is no home folder of that user") from error
    if not str(path) or "\0" in str(path):
        raise UserError(f"{key}: given {show(str(path))}; legal: a path")
    return absolute
