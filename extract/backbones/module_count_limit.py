"""Limits the number of modules of a model while it is built.

Tensors cost nothing on the meta device, but modules do: a depth of 16,384 would take minutes and gigabytes before its
parameters could be counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_MAX_MODULES = 5_000  # four times as many as the largest vision transformers of timm have


@contextmanager
def limit_module_count() -> Iterator[None]:
    """Stop building a model in this block, and in this thread, that has more modules than any real one.

    Raises:
        ValueError: the model has more.
    """
    built, thread = 0, get_ident()

    def count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal built
        built += get_ident() == thread
        if built > _MAX_MODULES:
            raise ValueError(f"it has more than {_MAX_MODULES:,} modules; give a smaller depth")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
