"""Reads a folder in timm's hub format, config.json beside the weights, without trusting it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from store.errors import UserError

_MAX_CONFIG_BYTES = 1 << 20
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Preprocessing(BaseModel):
    """The fields of `pretrained_cfg` in which a wrong value would only show later."""

    mean: tuple[_Finite, _Finite, _Finite] | None = None
    std: tuple[_Positive, _Positive, _Positive] | None = None
    crop_pct: Annotated[float, Field(gt=0.0, le=2.0)] | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class HubFolder:
    """The architecture of a hub folder, and the file with its weights."""

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any] | None
    weights: Path


def read_hub_folder(folder: Path) -> HubFolder:
    """Read a folder's config.json; the weights are not read.

    Raises:
        UserError: config.json is missing, damaged or holds an illegal value; there are no weights.
    """
    try:
        if (folder / "config.json").stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("it is larger than 1 MiB")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture, model_args = str(config["architecture"]), dict(config.get("model_args") or {})
        pretrained_cfg = config.get("pretrained_cfg")
        _Preprocessing.model_validate(pretrained_cfg or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("pretrained_cfg", *first["loc"])))
        raise UserError(f"backbone.weights {folder}: {where} of config.json: {first['msg']}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"backbone.weights {folder}: no readable config.json with an architecture ({error})") from error
    file = next((folder / f for f in ("model.safetensors", "pytorch_model.bin") if (folder / f).exists()), None)
    if file is None:
        raise UserError(f"backbone.weights {folder}: neither model.safetensors nor pytorch_model.bin is there")
    return HubFolder(architecture, model_args, pretrained_cfg, file)
