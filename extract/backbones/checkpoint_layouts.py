"""Finds a ViT's state dict in the checkpoint of a training script, and compares it with the model.

Training scripts wrap the state dict: `{"model": ...}` (timm, MAE), `{"module": ...}` (DeepSpeed), `{"student": ...,
"teacher": ...}` (DINO, iBOT), `{"encoder": ..., "target_encoder": ...}` (I-JEPA), `state_dict_ema` and `model_ema`
(timm's averages). They also prefix its names: `module.`, `_orig_mod.`, `backbone.`, `teacher.backbone.` (DINOv2). Names
of other libraries (OpenCLIP, DINOv2, BEiT) are left to timm's own filters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# in order of preference; averages and teachers first, because the methods' authors evaluate these
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "target_encoder",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "_orig_mod",
    "backbone",
    "encoder",
    "student",
)
# not used by a backbone: classifiers, and what only pretraining needs
UNUSED = ("head", "fc_norm", "classifier", "decoder_", "mask_token", "predictor.", "dino_head.", "ibot_head.")
_FIRST_BLOCK = "blocks.0."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float16).max  # all published weights fit into float16

StateDict = dict[str, Tensor]


def find_state_dict(checkpoint: Mapping[str, Any]) -> tuple[StateDict, list[str]]:
    """The weights of one ViT in a checkpoint.

    Args:
        checkpoint: what `torch.load` or safetensors returned.

    Returns:
        the state dict without wrappers and prefixes, and the paths of other weights in the checkpoint.

    Raises:
        ValueError: the checkpoint holds no tensors, or only under unknown keys.
    """
    # unwrap until the values are tensors
    flat, path, left_out = dict(checkpoint), list[str](), list[str]()
    while not any(isinstance(value, Tensor) for value in flat.values()):
        inner = {str(key): value for key, value in flat.items() if isinstance(value, Mapping) and _has_tensors(value)}
        chosen = next((key for key in _WRAPPERS if key in inner), None)
        if chosen is None:
            keys = ", ".join(map(repr, sorted(inner))) or "none"
            raise ValueError(
                f"no weights under a known key; keys that hold tensors: {keys}; save the right ones by themselves: "
                "torch.save(torch.load(FILE)[KEY], NEW)"
            )
        path.append(chosen)
        left_out += [".".join([*path[:-1], key]) for key in sorted(inner) if key != chosen and _has_blocks(inner[key])]
        flat = dict(inner[chosen])
    state, others = _without_prefix(flat)
    return state, left_out + [".".join([*path, other]) for other in others]


def require_fit(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Compare shapes, types and values of a state dict with a model; keys that the model lacks are ignored.

    Raises:
        ValueError: a tensor does not fit; the message has its name, what it holds and what is legal.
    """
    own = model.state_dict()
    shapes = [
        f"{name} is {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if shapes:
        raise ValueError(f"{len(shapes)} tensors have another shape: {'; '.join(shapes[:3])}")
    for name, tensor in state.items():
        if name in own:
            _require_values(name, tensor, is_float=own[name].is_floating_point())


def _require_values(name: str, tensor: Tensor, is_float: bool) -> None:
    if not is_float:
        if tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, in the model it holds integers")
        return
    if tensor.dtype not in _FLOATS:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise ValueError(f"{name} holds {tensor.dtype}; legal: {legal} (dequantize quantized weights first)")
    largest = float(tensor.abs().amax()) if tensor.numel() else 0.0
    if not largest <= _LARGEST:  # NaN fails this too
        raise ValueError(f"{name} holds a value of {largest}; legal: finite, at most {_LARGEST:,.0f}")
    if tensor.ndim > 1 and name.endswith(".weight") and _is_integral(tensor.flatten()[:64]) and _is_integral(tensor):
        raise ValueError(f"{name} holds integers only: it is quantized, damaged, or was never trained")


def _is_integral(tensor: Tensor) -> bool:
    return bool((tensor.frac() == 0).all())


def _without_prefix(flat: Mapping[str, Any]) -> tuple[StateDict, list[str]]:
    """Tensors without the prefix of the preferred wrapper, if the names have one, and the other such prefixes."""
    flat = {_without_data_parallel(name): value for name, value in flat.items()}
    if any(name.startswith(_FIRST_BLOCK) for name in flat):
        return flat, []
    found = {name[: name.index(_FIRST_BLOCK)] for name in flat if f".{_FIRST_BLOCK}" in name}
    known = sorted((prefix for prefix in found if set(_words(prefix)) <= {*_WRAPPERS}), key=_rank)
    if not known:
        return flat, []  # perhaps the names of another library, which timm's filter knows
    chosen, *others = known
    stripped = {name.removeprefix(chosen): value for name, value in flat.items() if name.startswith(chosen)}
    return stripped, [prefix.removesuffix(".") for prefix in others]


def _without_data_parallel(name: str) -> str:
    """Strip the prefixes of DistributedDataParallel and torch.compile."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", maxsplit=1)[1]
    return name


def _rank(prefix: str) -> tuple[int, str]:
    return min(_WRAPPERS.index(word) for word in _words(prefix)), prefix


def _words(prefix: str) -> Sequence[str]:
    return prefix.removesuffix(".").split(".")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(inner) for inner in value.values())
    return isinstance(value, Tensor)


def _has_blocks(value: Any, name: str = "") -> bool:
    """Whether nested tensors contain the first block of a ViT."""
    if isinstance(value, Mapping):
        return any(_has_blocks(inner, f"{name}.{key}") for key, inner in value.items())
    return f".{_FIRST_BLOCK}" in name
