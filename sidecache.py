"""sidecache: run a frozen vision transformer once, keep its per-layer tokens, then train adaptors in seconds.

The command line, and the public names: `import sidecache as sc`.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from adapt.adaptor import Adaptor, load_adaptor
    from adapt.config import Config, load_config
    from adapt.losa import LoSA
    from adapt.probes import LinearProbe
    from adapt.results import Row
    from extract.backbone import Backbone, TappedBackbone
    from extract.run import Extraction
    from extract.sources import ImageSource
    from store.errors import JobError, UserError
    from store.reader import Store, open_store

__version__ = "0.1.0"

# Public names and where they live, loaded when first used: `sidecache --help` waits for no torch.
_HOME = {
    "Adaptor": "adapt.adaptor",
    "Config": "adapt.config",
    "JobError": "store.errors",
    "LinearProbe": "adapt.probes",
    "LoSA": "adapt.losa",
    "Store": "store.reader",
    "TappedBackbone": "extract.backbone",
    "UserError": "store.errors",
    "create_model": "adapt.create",
    "from_datasets": "extract.datasets",
    "load_adaptor": "adapt.adaptor",
    "load_config": "adapt.config",
    "open_store": "store.reader",
}
__all__ = [*_HOME, "extract", "run", "train"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sidecache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
