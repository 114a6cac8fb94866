"""Merges weight updates into the backbone: W <- W + dW, b <- b + db. The result is a plain model at no extra cost."""

from typing import Any, Protocol, runtime_checkable

from torch import nn

from store.errors import UserError

_UNMERGED = "_unmerged"  # attribute of a merged module: the module that it replaces


@runtime_checkable
class Mergeable(Protocol):
    """A module that a method puts in the place of a plain one, such as `updated_linear.UpdatedLinear`."""

    def merged(self) -> nn.Module:
        """A plain module that gives the same outputs and shares no tensor with this one."""
        ...


def can_merge(module: nn.Module) -> bool:
    """Whether a model has weight updates that are not merged."""
    return any(isinstance(child, Mergeable) for child in module.modules())


def merge(module: nn.Module) -> nn.Module:
    """Replace the modules of a weight-update method by plain ones, in place.

    The replaced modules are kept for `unmerge`, but not as a part of the model's state, parameters or modules.

    Returns:
        the module itself.

    Raises:
        UserError: there is nothing to merge.
    """
    found: dict[str, Any] = {path: child for path, child in module.named_modules() if isinstance(child, Mergeable)}
    if not found:
        raise UserError(
            "this model has no weight updates to merge, or has them merged already; "
            "legal: a model of a weight-update method (lora, lora_fix, kronecker, intrinsic) that is not merged"
        )
    for path, child in found.items():
        plain: nn.Module = child.merged().train(child.training)
        object.__setattr__(plain, _UNMERGED, child)  # `nn.Module` would register it as a part of the model
        _replace(module, path, plain)
    return module


def unmerge(module: nn.Module) -> nn.Module:
    """Undo `merge`, in place: the updates are back, and the frozen weights are those from before, to the last bit.

    Returns:
        the module itself.

    Raises:
        UserError: the model is not merged.
    """
    found = {path: child for path, child in module.named_modules() if hasattr(child, _UNMERGED)}
    if not found:
        raise UserError("this model is not merged, so there is nothing to undo; call merge first")
    for path, plain in found.items():
        unmerged: Any = getattr(plain, _UNMERGED)
        _replace(module, path, unmerged.to(next(plain.parameters())).train(plain.training))  # it may have been moved
    return module


def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
