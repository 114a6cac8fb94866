"""Computes the conditions of a trial: the fingerprint of all settings other than method, options and seed.

Only rows with equal conditions are averaged.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from pydantic import BaseModel

from adapt.methods.registry import find_method
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings

READABLE = ("image_size", "weights", "extract.precision")  # conditions that `features`, a digest, includes too
_STORE_FIELDS = ("layers", "tokens", "dtype")
_SETTINGS_OF_SOLVED = ("balance_classes", "precision")  # the settings that affect a method without training steps


def conditions_of(
    method: str, identity: Mapping[str, Any], feature_source: str, *, settings: Settings, row_draw: RowDraw
) -> dict[str, Any]:
    """The conditions of a trial, by name, so that a table can show which ones differ; long values are digests.

    Args:
        method: name of the method.
        identity: everything that the features depend on.
        feature_source: what the trial is trained from.
        settings: hyperparameters.
        row_draw: how training and validation rows are drawn.
    """
    is_solved = find_method(method).solved
    stored = {f"store.{name}": identity.get(name) for name in _STORE_FIELDS}
    trained = {name: value for name, value in asdict(settings).items() if name in _SETTINGS_OF_SOLVED or not is_solved}
    return {
        "samples": digest(identity.get("samples"))[:8],
        **row_draw.conditions,
        "feature_source": feature_source,
        "features": features_digest(identity),
        **_of_backbone(identity),
        **stored,
        **trained,
    }


def features_digest(identity: Mapping[str, Any]) -> str:
    """The condition `features`: a digest of what features depend on, without samples and what the store keeps."""
    return digest({name: value for name, value in identity.items() if name not in ("samples", *_STORE_FIELDS)})[:8]


def _of_backbone(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a person can read of the settings behind the digest of all features; see `READABLE`."""
    found = dict[str, Any]()
    if size := identity.get("image_size"):
        found["image_size"] = "x".join(map(str, dict.fromkeys(size[-2:])))
    if weights := identity.get("weights_digest"):
        found["weights"] = weights[:8]
    if precision := identity.get("precision"):
        found["extract.precision"] = precision
    return found


def digest(*parts: Any) -> str:
    """A short hash of any values, such as all settings that a result depends on."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", serialize_as_any=True)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
