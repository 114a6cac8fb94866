"""Frozen weights: found, loaded strictly, and digested."""

import difflib
import hashlib
import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from rich.filesize import decimal
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, load_model_config_from_hf
from torch import nn

from extract.backbones.checkpoint_layouts import UNUSED, require_fit
from extract.backbones.hub_folder import read_hub_folder
from extract.backbones.module_limit import limited_modules
from extract.backbones.weight_files import load_npz, read_tensors
from extract.config import BackboneConfig
from store.errors import JobError, Note, UserError
from store.out_of_memory import is_shortage

_ALTERNATIVES = (
    "give backbone.weights a local .safetensors, .pth or .npz file, or a folder in timm's hub format "
    "(config.json and model.safetensors), or `random` for untrained weights"
)
# Arguments of timm.create_model that would go round what this module decides.
_OURS = {
    "pretrained": "set backbone.weights",
    "checkpoint_path": "set backbone.weights",
    "num_classes": "a backbone has no classifier",
    "in_chans": "images have three channels",
    "features_only": "tokens are tapped from the whole model",
}
_MOST = 16_384  # for a whole number of model_kwargs, also inside a list
_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".npz")


@dataclass(frozen=True)
class Recipe:
    """What to build and what to load into it, after a weights folder has been read."""

    name: str
    kwargs: dict[str, Any]
    file: Path | None = None
    pretrained_cfg: dict[str, Any] | None = None


def load_model(config: BackboneConfig) -> tuple[str, dict[str, Any], nn.Module]:
    """Build a timm model with its weights, without a classifier.

    Returns:
        the architecture's name, the keyword arguments it was built with, and the model on the CPU in eval mode.

    Raises:
        UserError: unknown name, a file that is missing, damaged or of another model.
        JobError: the model hub cannot be reached.
    """
    recipe = recipe_of(config)
    if config.weights.startswith("hf-hub:"):
        build_empty(recipe.name, recipe.kwargs)  # a wrong argument is the user's mistake, not the hub's
        model = _fetch(config.weights, recipe.kwargs)
    elif config.weights in ("pretrained", "random"):
        model = _pretrained(recipe) if config.weights == "pretrained" else _random(recipe)
    else:
        model = _from_file(recipe)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)  # type: ignore[operator]
    return recipe.name, recipe.kwargs, model.eval().requires_grad_(False)


def recipe_of(config: BackboneConfig) -> Recipe:
    """What a configuration names; nothing is built or loaded yet. Errors are those of `load_model`."""
    if config.weights.startswith("hf-hub:"):
        return _hub_recipe(config)
    if config.weights in ("pretrained", "random"):
        return Recipe(_require_name(config), _with_size(config, config.model_kwargs))
    return _local_recipe(config, Path(config.weights))


def build_empty(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The architecture without weights, on the meta device: shapes for free, even of ViT-g."""
    with torch.device("meta"):
        model: nn.Module = _create(Recipe(name, kwargs), num_classes=0)
    return model


def weights_digest(model: nn.Module) -> str:
    """A digest of every tensor's name, shape and values, whatever file it came from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _with_size(config: BackboneConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | ({"img_size": config.image_size} if config.image_size else {})


def _require_name(config: BackboneConfig) -> str:
    if config.name is None:
        raise UserError(f"backbone.weights is {config.weights!r}, so backbone.name must name a timm model")
    return config.name


def _create(recipe: Recipe, **more: Any) -> nn.Module:
    _require_known(recipe)
    try:
        with limited_modules():
            model: nn.Module = timm.create_model(recipe.name, **recipe.kwargs, **more)
    except Exception as error:  # wrong arguments surface anywhere in a model's constructor
        if is_shortage(error):
            raise
        raise UserError(
            f"timm cannot build {recipe.name!r} with model_kwargs {recipe.kwargs}: {first_line(error)}"
        ) from error
    return model


def _require_known(recipe: Recipe) -> None:
    if ":" in recipe.name:  # timm would go and fetch it
        raise UserError(f"backbone.name {recipe.name!r} is no timm model; write it as backbone.weights: {recipe.name}")
    if not timm.is_model(recipe.name):
        near = difflib.get_close_matches(recipe.name, timm.list_models(), n=5, cutoff=0.5) or ["vit_base_patch16_224"]
        raise UserError(
            f"backbone.name {recipe.name!r} is no timm model; near ones: {', '.join(near)} (see timm.list_models())"
        )
    if taken := [name for name in recipe.kwargs if name in _OURS]:
        raise UserError(f"backbone.model_kwargs may not hold {taken[0]!r}: {_OURS[taken[0]]}")
    for key, value in recipe.kwargs.items():
        if (largest := _largest(value)) > _MOST:
            raise UserError(f"backbone.model_kwargs.{key} is {largest:,}; legal: at most {_MOST:,}")


def _largest(value: Any) -> int:
    """The largest whole number in a value of model_kwargs; 0 where there is none."""
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int) else 0


def require_room(name: str, kwargs: Mapping[str, Any], empty: nn.Module, file: Path | None = None) -> None:
    """Before anything is allocated: a model fits into memory and, at a byte a value, into the file it comes from.

    Args:
        empty: the model on the meta device.

    Raises:
        UserError: it does not.
    """
    n_values = sum(tensor.numel() for tensor in empty.parameters())
    n_more = sum(tensor.numel() for tensor in empty.buffers())
    if (wanted := 4 * (n_values + n_more)) > (free := psutil.virtual_memory().available):
        raise UserError(
            f"{name!r} with model_kwargs {dict(kwargs)} takes {decimal(wanted)} of memory, "
            f"{decimal(wanted - free)} more than are free; give a smaller one"
        )
    if file and n_values > (n_bytes := file.stat().st_size):
        raise UserError(
            f"backbone.weights {file} does not load into {name!r}: the model has {n_values:,} values, "
            f"the file {n_bytes:,} bytes; check backbone.name, image_size and model_kwargs"
        )


def _require_room(recipe: Recipe) -> None:
    require_room(recipe.name, recipe.kwargs, build_empty(recipe.name, recipe.kwargs), recipe.file)


def _random(recipe: Recipe) -> nn.Module:
    _require_room(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _create(recipe)


def _pretrained(recipe: Recipe) -> nn.Module:
    build_empty(recipe.name, recipe.kwargs)  # a wrong name or argument is the user's mistake, not the hub's
    if not timm.is_model_pretrained(recipe.name):
        tags = timm.list_pretrained(f"{recipe.name.split('.')[0]}*")[:6]
        raise UserError(
            f"timm has no pretrained weights for {recipe.name!r}; "
            + (f"names that have: {', '.join(tags)}" if tags else _ALTERNATIVES)
        )
    return _fetch(recipe.name, recipe.kwargs)


def _hub_recipe(config: BackboneConfig) -> Recipe:
    """The architecture behind `hf-hub:ORG/NAME`, so that it can be built again without the hub."""
    with reaching_hub(config.weights):
        _, name, model_args = load_model_config_from_hf(config.weights.removeprefix("hf-hub:"))
    if config.name not in (None, name):
        raise UserError(f"backbone.name is {config.name!r}, but {config.weights} holds a {name!r}; leave the name out")
    return Recipe(name, _with_size(config, _plain_args(model_args) | config.model_kwargs))


def _fetch(name: str, kwargs: dict[str, Any]) -> nn.Module:
    with reaching_hub(name):
        model: nn.Module = timm.create_model(name, pretrained=True, **kwargs)
    return model


@contextmanager
def reaching_hub(what: str, alternatives: str = _ALTERNATIVES) -> Iterator[None]:
    """Turn what goes wrong on the way to the model hub into a JobError that says what to do without it."""
    try:
        yield
    except Exception as error:  # the hub client raises a dozen unrelated types for "cannot be reached"
        raise JobError(
            f"the weights of {what!r} could not be fetched from the model hub ({first_line(error)}); {alternatives}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _plain_args(model_args: dict[str, Any] | None) -> dict[str, Any]:
    """Of what a hub card gives, less what goes without saying."""
    given = model_args or {}
    return {name: given[name] for name in given if name != "num_classes" and (name, given[name]) != ("in_chans", 3)}


def _local_recipe(config: BackboneConfig, path: Path) -> Recipe:
    if path.is_dir():
        return _folder_recipe(config, path)
    if not path.exists():
        raise UserError(f"backbone.weights {config.weights!r}: there is no such file or folder; {_ALTERNATIVES}")
    if path.suffix not in _FILE_ENDINGS:
        raise UserError(f"backbone.weights {config.weights!r}: legal endings are {', '.join(_FILE_ENDINGS)}")
    return Recipe(_require_name(config), _with_size(config, config.model_kwargs), path)


def _folder_recipe(config: BackboneConfig, folder: Path) -> Recipe:
    card = read_hub_folder(folder)
    if config.name not in (None, card.architecture):
        raise UserError(
            f"backbone.name is {config.name!r}, but {folder} holds a {card.architecture!r}; leave the name out"
        )
    kwargs = _with_size(config, _plain_args(card.model_args) | config.model_kwargs)
    return Recipe(card.architecture, kwargs, card.weights, card.pretrained_cfg)


def _note_preprocessing(recipe: Recipe) -> None:
    """Say which preprocessing a file gets whose name has no tag, where timm knows several for that architecture."""
    tagged = get_arch_pretrained_cfgs(recipe.name)
    if "." in recipe.name or len({_preprocessing(cfg) for cfg in tagged.values()}) < 2:
        return
    default = timm.get_pretrained_cfg(recipe.name, allow_unregistered=False)
    assert default is not None
    mean, std, interpolation, crop = _preprocessing(default)
    warnings.warn(
        f"images are preprocessed as for timm's {recipe.name}.{default.tag}: mean {mean}, std {std}, {interpolation}, "
        f"crop {crop}; if {recipe.file} holds other weights, write their tag into backbone.name. Tags of this "
        f"architecture: {', '.join(sorted(name.split('.', 1)[1] for name in tagged if '.' in name))}",
        Note,
        stacklevel=2,
    )


def _preprocessing(cfg: PretrainedCfg) -> tuple[tuple[float, ...], tuple[float, ...], str, float]:
    return tuple(cfg.mean), tuple(cfg.std), cfg.interpolation, cfg.crop_pct


def _from_file(recipe: Recipe) -> nn.Module:
    assert recipe.file is not None
    _require_room(recipe)
    overlay = {"pretrained_cfg_overlay": recipe.pretrained_cfg} if recipe.pretrained_cfg else {}
    model = _create(recipe, num_classes=0, **overlay)
    if not recipe.pretrained_cfg:
        _note_preprocessing(recipe)
    try:
        if recipe.file.suffix == ".npz":
            load_npz(recipe.file, model)
            require_fit(model.state_dict(), model)
            return model
        state = read_tensors(recipe.file)
        filter_keys = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
        state = filter_keys(state, model) if filter_keys else state
        require_fit(state, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:  # torch, pickle, safetensors and numpy each have their own errors for a damaged file
        if is_shortage(error):
            raise
        raise UserError(
            f"backbone.weights {recipe.file} does not load into {recipe.name!r}: {first_line(error)}"
        ) from error
    # Heads in the file are expected and dropped; anything else means that it is the file of another model.
    unexpected = [key for key in unexpected if not key.startswith(UNUSED)]
    if missing or unexpected:
        raise UserError(
            f"backbone.weights {recipe.file} is not a checkpoint of {recipe.name!r}: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}; check backbone.name, image_size and model_kwargs"
        )
    return model
