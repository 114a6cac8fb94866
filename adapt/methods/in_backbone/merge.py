"""Folding weight updates into the backbone: W <- W + dW, b <- b + db, which leaves a plain model at no extra cost."""

from typing import Any, Protocol, runtime_checkable

from torch import nn

from store.errors import UserError

_UNMERGED = "_unmerged"  # the attribute by which a merged module remembers what stood in its place


@runtime_checkable
class Mergeable(Protocol):
    """What a method puts in the place of a module, for example `linear_updates.UpdatedLinear`."""

    def merged(self) -> nn.Module:
        """A plain module that gives the same outputs and shares no tensor with this one."""
        ...


def merge(module: nn.Module) -> nn.Module:
    """Put plain modules in the place of what a weight-update method has put there, in place.

    What was there is kept for `unmerge`, out of the model's sight: no part of its state, its parameters or its modules.

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
        object.__setattr__(plain, _UNMERGED, child)  # past `nn.Module`, which would make it a part of the model
        _replace(module, path, plain)
    return module


def unmerge(module: nn.Module) -> nn.Module:
    """Undo `merge`, in place: the updates are back, over the frozen weights as they were to the last bit.

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
