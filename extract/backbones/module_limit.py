"""A limit on the modules of a model, which holds while the model is built.

Sizes cost nothing on the meta device, but modules are built one by one, there too: a depth of 16,384 would take minutes
and gigabytes before its parameters could be counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_MOST_MODULES = 5_000  # four times those of the largest vision transformers of timm


@contextmanager
def limited_modules() -> Iterator[None]:
    """Stop a model that is built in the block, in this thread, at a number of modules that no real one has.

    Raises:
        ValueError: the model has more.
    """
    built, thread = 0, get_ident()

    def count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal built
        built += get_ident() == thread
        if built > _MOST_MODULES:
            raise ValueError(f"it has more than {_MOST_MODULES:,} modules; give a smaller depth")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
