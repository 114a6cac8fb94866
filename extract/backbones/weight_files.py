"""Files of weights, none of them trusted: tensors only, never objects, and no tensor larger than the file it is in."""

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from extract.backbones.checkpoint_layouts import find_state_dict
from store.errors import Note

_MOST_EXPANSION = 10  # of a compressed .npz; weights shrink by a tenth


def read_tensors(file: Path) -> dict[str, Any]:
    """The state dict of a ViT in a .safetensors or torch file, without wrappers; a note says what else it holds.

    Raises:
        ValueError: what is in it is no weights, or more than the file can hold. Libraries raise others for damage.
    """
    zipped = file.suffix != ".safetensors" and zipfile.is_zipfile(file)
    if zipped:
        _require_plain(file)
    # Mapped, a tensor is a part of the file: older versions of torch let it reach into the memory behind a record.
    state, left_out = find_state_dict(
        load_file(file) if file.suffix == ".safetensors" else _load_torch(file, mmap=zipped)
    )
    if left_out:
        warnings.warn(f"{file} also holds weights under {', '.join(left_out)}, which are left out", Note, stacklevel=2)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} is no tensor")
        if tensor.layout != torch.strided or tensor.nbytes > file.stat().st_size:
            raise ValueError(f"{name!r} of shape {tuple(tensor.shape)} is larger than the file, or sparse")
        if tensor.is_complex():
            raise ValueError(f"{name!r} holds complex numbers")
    return state


def _load_torch(file: Path, mmap: bool) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of a training script: names and values
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, no state dict")
    return checkpoint


def _require_plain(file: Path) -> None:
    """A zip archive as torch writes it: whole records, none compressed (by which it would grow), none over another."""
    with zipfile.ZipFile(file) as archive:
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if compressed or _unpacked(archive) > file.stat().st_size or archive.testzip():
            raise ValueError("its records are compressed, damaged or one over another; write it anew with torch.save")


def _unpacked(archive: zipfile.ZipFile) -> int:
    return sum(entry.file_size for entry in archive.infolist())


def load_npz(file: Path, model: nn.Module) -> None:
    """The JAX layout, which timm reads tensor by tensor: none may be left out, and no block left over."""
    with zipfile.ZipFile(file) as archive:
        if (n_bytes := _unpacked(archive)) > _MOST_EXPANSION * file.stat().st_size:
            raise ValueError(f"it unpacks to {n_bytes:,} bytes, more than {_MOST_EXPANSION} times its size")
    for tensor in model.parameters():
        tensor.detach().fill_(torch.nan)
    model.load_pretrained(str(file))  # type: ignore[operator]
    if unset := [name for name, tensor in model.named_parameters() if tensor.isnan().any()]:
        raise ValueError(f"it does not set {unset[:3]}")
    with np.load(file) as arrays:
        numbers = {match[1] for name in arrays.files if (match := re.search(r"encoderblock_(\d+)/", name))}
        stacked = [name for name in arrays.files if "encoderblock/" in name]
        n_blocks = len(arrays[stacked[0]]) if stacked else len(numbers)
    if n_blocks != len(model.blocks):  # type: ignore[arg-type]
        raise ValueError(f"it has {n_blocks} blocks, the model {len(model.blocks)}")  # type: ignore[arg-type]
