"""What decided the outcome of a trial beside its method, its options and its seed, so that only like is averaged."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from pydantic import BaseModel

from adapt.methods.registry import find_method
from adapt.training.loop import Settings

_OF_THE_STORE = ("layers", "tokens", "dtype")
_OF_SOLVED = ("balance_classes", "precision")  # the settings that reach a method without steps of training


def conditions_of(
    method: str, identity: Mapping[str, Any], feature_source: str, settings: Settings, val_fraction: float
) -> dict[str, Any]:
    """By name, so that a table can tell what is different; what would be too long to read is a digest.

    Args:
        identity: everything that decides a feature.
    """
    solved, features = find_method(method).solved, dict(identity)
    samples = features.pop("samples", None)
    stored = {f"store.{name}": features.pop(name, None) for name in _OF_THE_STORE}
    trained = {name: value for name, value in asdict(settings).items() if name in _OF_SOLVED or not solved}
    trained.pop("seed", None)
    return {
        "samples": digest(samples)[:8],
        "val_fraction": val_fraction,
        "feature_source": feature_source,
        "features": digest(features)[:8],
        **stored,
        **trained,
    }


def digest(*parts: Any) -> str:
    """A short id of everything that decides an outcome."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", serialize_as_any=True)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
