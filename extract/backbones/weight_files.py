"""Reads weights files without trusting them: only tensors, never objects, and no tensor larger than its file."""

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

_MAX_EXPANSION = 10  # of a compressed .npz; weights shrink by about a tenth


def read_tensors(file: Path) -> dict[str, Any]:
    """The state dict of a ViT in a .safetensors or torch file, without wrappers; warns about other weights in it.

    Raises:
        ValueError: it holds no weights, or a tensor larger than the file. Libraries raise other types for damage.
    """
    zipped = file.suffix != ".safetensors" and zipfile.is_zipfile(file)
    if zipped:
        _require_uncompressed(file)
    # memory-mapped, because older versions of torch let a tensor read beyond its record
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
    with torch.serialization.safe_globals([argparse.Namespace]):  # arguments of a training script
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, no state dict")
    return checkpoint


def _require_uncompressed(file: Path) -> None:
    """Check that a zip archive is as torch writes it: records are whole, not compressed and do not overlap."""
    with zipfile.ZipFile(file) as archive:
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if compressed or _unpacked_bytes(archive) > file.stat().st_size or archive.testzip():
            raise ValueError("its records are compressed, damaged or overlapping; save it again with torch.save")


def _unpacked_bytes(archive: zipfile.ZipFile) -> int:
    return sum(entry.file_size for entry in archive.infolist())


def load_npz(file: Path, model: nn.Module) -> None:
    """Load a file in Google's JAX layout with timm.

    Raises:
        ValueError: the file lacks a tensor, or has another number of blocks than the model.
    """
    with zipfile.ZipFile(file) as archive:
        if (n_bytes := _unpacked_bytes(archive)) > _MAX_EXPANSION * file.stat().st_size:
            raise ValueError(f"it unpacks to {n_bytes:,} bytes, more than {_MAX_EXPANSION} times its size")
    # timm skips tensors that the file lacks: they stay NaN
    for tensor in model.parameters():
        tensor.detach().fill_(torch.nan)
    model.load_pretrained(str(file))  # type: ignore[operator]
    if unset := [name for name, tensor in model.named_parameters() if tensor.isnan().any()]:
        raise ValueError(f"it does not set {unset[:3]}")
    # and it ignores further blocks of the file
    with np.load(file) as arrays:
        numbers = {match[1] for name in arrays.files if (match := re.search(r"encoderblock_(\d+)/", name))}
        stacked = [name for name in arrays.files if "encoderblock/" in name]
        n_blocks = len(arrays[stacked[0]]) if stacked else len(numbers)
    if n_blocks != len(model.blocks):  # type: ignore[arg-type]
        raise ValueError(f"it has {n_blocks} blocks, the model {len(model.blocks)}")  # type: ignore[arg-type]
