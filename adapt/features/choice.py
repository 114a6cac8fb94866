"""Chooses the feature source for `train.feature_source: auto` by the free memory."""

from dataclasses import dataclass

import torch
from rich.filesize import decimal

from extract.forward.device import free_memory_bytes

_SHARE_OF_MEMORY = 0.5  # of the free memory that resident features may take: training needs the rest


@dataclass(frozen=True)
class Choice:
    """A feature source, and the reason to choose it."""

    kind: str
    reason: str


def choose_source(wanted: str, needed: int, device: torch.device) -> Choice:
    """Resolve `train.feature_source`.

    Args:
        wanted: its value; anything but `auto` is taken as it is.
        needed: bytes of the features that training reads.
        device: where they would be kept.
    """
    if wanted != "auto":
        return Choice(wanted, "as asked for")
    free = free_memory_bytes(device)
    sizes = f"{decimal(needed)} of features, {decimal(free)} of memory free"
    return Choice("resident" if needed <= _SHARE_OF_MEMORY * free else "streamed", sizes)
