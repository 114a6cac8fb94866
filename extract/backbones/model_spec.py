"""Resolves the `backbone:` section to a timm model and a weights file; nothing is built or loaded yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.models import load_model_config_from_hf

from extract.backbones.hub_connection import offline_without_hub
from extract.backbones.hub_folder import read_hub_folder
from extract.backbones.timm_models import ModelSpec, first_line
from extract.config import BackboneConfig
from store.errors import JobError, UserError

ALTERNATIVES = (
    "give backbone.weights a local .safetensors, .pth or .npz file, or a folder in timm's hub format "
    "(config.json and model.safetensors), or `random` for untrained weights"
)
_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".npz")


def resolve_model(config: BackboneConfig) -> ModelSpec:
    """Find the model's name, its arguments and its weights file.

    Raises:
        UserError: no name, or another one than the weights are for; no such file, or a damaged folder.
        JobError: the model hub cannot be reached.
    """
    if config.weights.startswith("hf-hub:"):
        return _from_hub(config)
    if config.weights in ("pretrained", "random"):
        return ModelSpec(_require_name(config), _with_size(config, config.model_kwargs))
    path = Path(config.weights)
    if path.is_dir():
        return _from_folder(config, path)
    if not path.exists():
        raise UserError(f"backbone.weights {config.weights!r}: there is no such file or folder; {ALTERNATIVES}")
    if path.suffix not in _FILE_ENDINGS:
        raise UserError(f"backbone.weights {config.weights!r}: legal endings are {', '.join(_FILE_ENDINGS)}")
    return ModelSpec(_require_name(config), _with_size(config, config.model_kwargs), path)


@contextmanager
def reaching_hub(name: str, alternatives: str = ALTERNATIVES) -> Iterator[None]:
    """Turn every error on the way to the model hub into a JobError that names the alternatives.

    If the hub cannot be reached, the weights come from its cache, or the error comes at once.
    """
    with offline_without_hub() as obstacle:
        try:
            yield
        except Exception as error:  # the hub client raises a dozen unrelated types for "cannot be reached"
            reason = obstacle or first_line(error)
            raise JobError(
                f"the weights of {name!r} could not be fetched from the model hub ({reason}); {alternatives}"
            ) from error


def _from_hub(config: BackboneConfig) -> ModelSpec:
    """The architecture behind `hf-hub:ORG/NAME`, so that it can be built later without the hub."""
    with reaching_hub(config.weights):
        _, name, model_args = load_model_config_from_hf(config.weights.removeprefix("hf-hub:"))
    if config.name not in (None, name):
        raise UserError(f"backbone.name is {config.name!r}, but {config.weights} holds a {name!r}; leave the name out")
    return ModelSpec(name, _with_size(config, _without_defaults(model_args) | config.model_kwargs))


def _from_folder(config: BackboneConfig, folder: Path) -> ModelSpec:
    hub_folder = read_hub_folder(folder)
    if config.name not in (None, hub_folder.architecture):
        raise UserError(
            f"backbone.name is {config.name!r}, but {folder} holds a {hub_folder.architecture!r}; leave the name out"
        )
    kwargs = _with_size(config, _without_defaults(hub_folder.model_args) | config.model_kwargs)
    return ModelSpec(hub_folder.architecture, kwargs, hub_folder.weights, hub_folder.pretrained_cfg)


def _require_name(config: BackboneConfig) -> str:
    if config.name is None:
        raise UserError(f"backbone.weights is {config.weights!r}, so backbone.name must name a timm model")
    return config.name


def _with_size(config: BackboneConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | ({"img_size": config.image_size} if config.image_size else {})


def _without_defaults(model_args: dict[str, Any] | None) -> dict[str, Any]:
    """A hub config's model arguments without those that every backbone has: no classifier, three channels."""
    args = model_args or {}
    return {name: args[name] for name in args if name != "num_classes" and (name, args[name]) != ("in_chans", 3)}
