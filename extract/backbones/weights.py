"""Builds timm models with their weights, loaded strictly, and computes digests of weights."""

import hashlib
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from rich.filesize import decimal
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch import nn

from extract.backbones.checkpoint_layouts import UNUSED, require_fit
from extract.backbones.model_spec import ALTERNATIVES, reaching_hub
from extract.backbones.timm_models import ModelSpec, create_model, first_line
from extract.backbones.weight_files import load_npz, read_tensors
from store.errors import Note, UserError
from store.out_of_memory import is_shortage


def load_model(spec: ModelSpec, weights: str, empty: nn.Module) -> nn.Module:
    """Build a timm model with its weights, without a classifier.

    Args:
        weights: the `backbone.weights` that `spec` was resolved from.
        empty: the model on the meta device, as of `build_empty`; its size is checked before anything is allocated.

    Returns:
        the model on the CPU in eval mode, frozen.

    Raises:
        UserError: not enough memory; a file that is damaged or of another model; timm has no weights of that name.
        JobError: the model hub cannot be reached.
    """
    if weights.startswith("hf-hub:"):
        model = _fetch(weights, spec.kwargs)
    elif weights == "pretrained":
        model = _fetch_pretrained(spec)
    else:
        require_room(spec.name, spec.kwargs, empty, spec.file)
        model = _from_file(spec, spec.file) if spec.file else _random(spec)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)  # type: ignore[operator]
    return model.eval().requires_grad_(False)


def weights_digest(model: nn.Module) -> str:
    """A digest of every tensor's name, shape and values; it does not depend on the format of the file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def require_room(name: str, kwargs: Mapping[str, Any], empty: nn.Module, file: Path | None = None) -> None:
    """Check that a model fits into memory and, at one byte a value, into the file it is loaded from.

    Args:
        empty: the model on the meta device.

    Raises:
        UserError: it does not fit.
    """
    n_parameters = sum(tensor.numel() for tensor in empty.parameters())
    n_buffers = sum(tensor.numel() for tensor in empty.buffers())
    if (needed := 4 * (n_parameters + n_buffers)) > (free := psutil.virtual_memory().available):
        raise UserError(
            f"{name!r} with model_kwargs {dict(kwargs)} takes {decimal(needed)} of memory, "
            f"{decimal(needed - free)} more than are free; give a smaller one"
        )
    if file and n_parameters > (n_bytes := file.stat().st_size):
        raise UserError(
            f"backbone.weights {file} does not load into {name!r}: the model has {n_parameters:,} values, "
            f"the file {n_bytes:,} bytes; check backbone.name, image_size and model_kwargs"
        )


def _random(spec: ModelSpec) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(spec)


def _fetch_pretrained(spec: ModelSpec) -> nn.Module:
    if not timm.is_model_pretrained(spec.name):
        tags = timm.list_pretrained(f"{spec.name.split('.')[0]}*")[:6]
        raise UserError(
            f"timm has no pretrained weights for {spec.name!r}; "
            + (f"names that have: {', '.join(tags)}" if tags else ALTERNATIVES)
        )
    return _fetch(spec.name, spec.kwargs)


def _fetch(name: str, kwargs: dict[str, Any]) -> nn.Module:
    with reaching_hub(name):
        model: nn.Module = timm.create_model(name, pretrained=True, **kwargs)
    return model


def _from_file(spec: ModelSpec, file: Path) -> nn.Module:
    # a hub folder brings its own preprocessing; otherwise it is that of timm's name
    overlay = {"pretrained_cfg_overlay": spec.pretrained_cfg} if spec.pretrained_cfg else {}
    model = create_model(spec, num_classes=0, **overlay)
    if not spec.pretrained_cfg:
        _note_preprocessing(spec.name, file)
    try:
        missing, unexpected = _load_file(model, file)
    except Exception as error:  # torch, pickle, safetensors and numpy each have their own errors for a damaged file
        if is_shortage(error):
            raise
        raise UserError(f"backbone.weights {file} does not load into {spec.name!r}: {first_line(error)}") from error
    # a classifier in the file is dropped; any other difference means that it is the file of another model
    unexpected = [key for key in unexpected if not key.startswith(UNUSED)]
    if missing or unexpected:
        raise UserError(
            f"backbone.weights {file} is not a checkpoint of {spec.name!r}: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}; check backbone.name, image_size and model_kwargs"
        )
    return model


def _load_file(model: nn.Module, file: Path) -> tuple[list[str], list[str]]:
    """Load a file into a model; returns missing and unexpected keys."""
    if file.suffix == ".npz":
        load_npz(file, model)
        require_fit(model.state_dict(), model)
        return [], []
    state = read_tensors(file)
    filter_keys = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    state = filter_keys(state, model) if filter_keys else state
    require_fit(state, model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    return missing, unexpected


def _note_preprocessing(name: str, file: Path) -> None:
    """Warn which preprocessing is used, if the name has no tag and timm has several for that architecture."""
    tagged = get_arch_pretrained_cfgs(name)
    if "." in name or len({_preprocessing(cfg) for cfg in tagged.values()}) < 2:
        return
    default = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert default is not None
    mean, std, interpolation, crop = _preprocessing(default)
    warnings.warn(
        f"images are preprocessed as for timm's {name}.{default.tag}: mean {mean}, std {std}, {interpolation}, "
        f"crop {crop}; if {file} holds other weights, write their tag into backbone.name. Tags of this "
        f"architecture: {', '.join(sorted(tag.split('.', 1)[1] for tag in tagged if '.' in tag))}",
        Note,
        stacklevel=2,
    )


def _preprocessing(cfg: PretrainedCfg) -> tuple[tuple[float, ...], tuple[float, ...], str, float]:
    return tuple(cfg.mean), tuple(cfg.std), cfg.interpolation, cfg.crop_pct
