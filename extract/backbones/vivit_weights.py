"""Builds ViViT models through transformers and loads their weights strictly."""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extract.backbones.checkpoint_layouts import require_fit
from extract.backbones.model_spec import reaching_hub
from extract.backbones.module_count_limit import limit_module_count
from extract.backbones.weights import require_room
from extract.config import BackboneConfig
from store.errors import UserError

VIVIT = "vivit"  # the `backbone.name` of every ViViT
_HUB = "hf-hub:"
_LEGAL = (
    "legal for a ViViT: random, hf-hub:ORG/NAME such as hf-hub:google/vivit-b-16x2-kinetics400, or a local folder with "
    "config.json (model_type vivit) and model.safetensors or pytorch_model.bin"
)
_UNUSED = ("classifier.", "pooler.")  # weights of a checkpoint that no token depends on


def load_vivit(config: BackboneConfig, frames: int) -> tuple[nn.Module, dict[str, Any]]:
    """Load a ViViT through transformers.

    Args:
        frames: of a clip.

    Returns:
        a `transformers.VivitModel` without pooler, on the CPU in eval mode, frozen; and the fields of its
            `preprocessor_config.json`, empty if it has none.

    Raises:
        UserError: no transformers; a folder that is missing, damaged or of another model; another number of frames.
        JobError: the model hub cannot be reached.
    """
    overrides = config.model_kwargs | ({"image_size": config.image_size} if config.image_size else {})
    if config.weights == "random":
        return _random(overrides, frames), {}
    # read the architecture and the preprocessing
    path, transformers = _hub_name_or_folder(config.weights), _transformers()
    with _opening(config.weights):
        document, _ = transformers.VivitConfig.get_config_dict(path)
        preprocessor_config = _read_preprocessor_config(path)
    if document.get("model_type") != VIVIT:
        raise UserError(
            f"backbone.weights {config.weights!r} holds a {document.get('model_type')!r}, no ViViT; {_LEGAL}"
        )
    vivit_config = _configure(document, overrides, frames)
    # check the size before anything is allocated, then load
    require_room(VIVIT, overrides, _empty(vivit_config), _weights_file(path))
    return _load(config.weights, path, vivit_config), preprocessor_config


def _random(overrides: Mapping[str, Any], frames: int) -> nn.Module:
    vivit_config = _configure({}, overrides, frames)
    require_room(VIVIT, overrides, _empty(vivit_config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(vivit_config)


def _load(weights: str, path: str, vivit_config: Any) -> nn.Module:
    """The model with the weights at `path`, which must be exactly its own."""
    transformers = _transformers()
    with _opening(weights), _quiet(transformers):
        model, report = transformers.VivitModel.from_pretrained(
            path,
            config=vivit_config,
            add_pooling_layer=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    _require_exact(weights, report)
    with _opening(weights):
        require_fit(model.state_dict(), model)
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def empty_vivit(model_kwargs: Mapping[str, Any], frames: int | None = None) -> nn.Module:
    """The architecture without weights, on the meta device."""
    return _empty(_configure({}, model_kwargs, frames))


def _empty(vivit_config: Any) -> nn.Module:
    with torch.device("meta"):
        return _build(vivit_config)


def _weights_file(path: str) -> Path | None:
    """The weights file of a folder; None for weights in the hub, or in several files."""
    found = [Path(path) / name for name in ("model.safetensors", "pytorch_model.bin")]
    return next((file for file in found if file.is_file()), None)


def architecture(config: Any) -> dict[str, Any]:
    """The fields in which a configuration differs from ViViT-B, as JSON values; enough to rebuild it."""
    values = {name: _as_json(getattr(config, name)) for name in _fields() if not name.startswith("pooler_")}
    return {name: value for name, value in values.items() if value != _as_json(_fields()[name])}


def frame_size(config: Any) -> tuple[int, int]:
    """(height, width) of a frame, in pixels."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def token_grid(config: Any) -> tuple[int, ...]:
    """Number of tubelets over (time, height, width)."""
    return tuple(
        side // part for side, part in zip((config.num_frames, *frame_size(config)), config.tubelet_size, strict=True)
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError("ViViT needs transformers; install it with: pip install 'sidecache[video]'") from error


def _fields() -> dict[str, Any]:
    """Name -> default of the fields that only ViViT has; fields that all transformers models share affect no token."""
    transformers = _transformers()
    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    return {field.name: field.default for field in fields(transformers.VivitConfig) if field.name not in common}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _configure(document: Mapping[str, Any], overrides: Mapping[str, Any], frames: int | None) -> Any:
    legal = _fields()
    if unknown := [name for name in overrides if name not in legal]:  # transformers would ignore it silently
        raise UserError(f"backbone.model_kwargs: a ViViT has no {unknown[0]!r}; legal: {', '.join(legal)}")
    config_fields = {name: document[name] for name in legal if name in document} | dict(overrides)
    try:
        config = _transformers().VivitConfig(**config_fields)
        grid = token_grid(config)
    except Exception as error:  # transformers raises its own types
        raise UserError(f"no ViViT can be built with {dict(overrides)}: {' '.join(str(error).split())}") from error
    if config.num_channels != 3 or min(grid) < 1:
        raise UserError(
            f"no ViViT can be built with {dict(overrides)}: frames have 3 channels, and at least one tubelet "
            f"{tuple(config.tubelet_size)} must fit into {config.num_frames} frames of {frame_size(config)} pixels"
        )
    if frames not in (None, config.num_frames):
        raise UserError(f"this ViViT takes {config.num_frames} frames; set data.video.frames: {config.num_frames}")
    return config


def _build(vivit_config: Any) -> nn.Module:
    try:
        with limit_module_count():
            model: nn.Module = _transformers().VivitModel(vivit_config, add_pooling_layer=False)
    except Exception as error:  # wrong sizes surface anywhere in the constructor
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"transformers cannot build this ViViT: {reason}") from error
    return model.eval().requires_grad_(False)


def _hub_name_or_folder(weights: str) -> str:
    """The name that transformers loads the model by: a repository of the hub, or a folder."""
    if weights.startswith(_HUB):
        return weights.removeprefix(_HUB)
    if not Path(weights).is_dir():
        raise UserError(f"backbone.weights {weights!r}: there is no such folder; {_LEGAL}")
    if not (Path(weights) / "config.json").exists():
        raise UserError(f"backbone.weights {weights!r} has no config.json; {_LEGAL}")
    return weights


@contextmanager
def _opening(weights: str) -> Iterator[None]:
    if weights.startswith(_HUB):
        with reaching_hub(weights, _LEGAL):
            yield
        return
    try:
        yield
    except Exception as error:  # torch, pickle and safetensors each have their own errors for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"backbone.weights {weights!r} does not load: {reason[:300]}; {_LEGAL}") from error


def _read_preprocessor_config(path: str) -> dict[str, Any]:
    name = "preprocessor_config.json"
    file = _transformers().utils.cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return dict(json.loads(Path(file).read_text())) if file else {}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Hide transformers' progress bar, and its table of mismatches, which `_require_exact` reports."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _require_exact(weights: str, report: Mapping[str, Any]) -> None:
    """Check that the checkpoint has exactly the weights of the model."""
    missing, other_shape = sorted(report["missing_keys"]), sorted(str(key[0]) for key in report["mismatched_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(_UNUSED))
    if missing or other_shape or unexpected:
        raise UserError(
            f"backbone.weights {weights!r} is not a checkpoint of this ViViT: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of another shape {other_shape[:3]}; check image_size and model_kwargs"
        )
