"""Measures what a trial costs: peak memory, inference operations, and when the store has paid for its extraction."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapt.features.specs import spec_of_backbone
from adapt.methods.in_backbone.merge import can_merge, merge
from adapt.methods.options import MethodOptions
from adapt.methods.registry import build_model, find_method
from extract.backbones.backbone import ModelBackbone, TokensByLayer, reduce_tokens
from extract.forward.device import release_freed_memory
from store.config import Tokens
from store.reader import Store

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class ExtractionCosts:
    """What the store of a job has cost; None where there is no store, or its log does not say.

    Attributes:
        extract_seconds: the whole extraction, encoding and writing included.
        forward_seconds_per_sample: decoding and the forward pass.
        store_bytes: size of the store.
    """

    extract_seconds: float | None = None
    forward_seconds_per_sample: float | None = None
    store_bytes: int | None = None

    @classmethod
    def of_store(cls, store: Store) -> "ExtractionCosts":
        """The costs by the log of a store."""
        n_samples, log = sum(store.num_samples(split) for split in store.splits), store.log
        return cls(
            extract_seconds=log.get("extract_seconds"),
            forward_seconds_per_sample=_forward_seconds_per_sample(log, n_samples),
            store_bytes=store.n_bytes(),
        )


def _forward_seconds_per_sample(log: Mapping[str, float], n_samples: int) -> float | None:
    """Seconds of decoding and the forward pass; a sample counts again for layers that were added."""
    if not (seconds := log.get("forward_seconds")):
        return None
    return seconds / max(1, n_samples, round(log.get("forward_samples", 0)))  # older logs do not have the latter


class PeakMemory:
    """How far a block rose above the memory in use before it, in bytes; None where the system does not report it."""

    n_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure how far a block rises above the memory in use before it.

    Measured are allocations on a GPU, else the resident memory of the process (Linux only), to some MB. What the
    process has freed is given back to the system first, so that the block does not take it uncounted.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        release_freed_memory()
        before = _resident("VmRSS:")
        with suppress(OSError):
            _RESET.write_text("5")  # resets the kernel's high-water mark
    yield peak
    highest = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM:")
    if highest is not None and before is not None:
        peak.n_bytes = max(0, highest - before)


def _resident(name: str) -> int | None:
    """A field of the kernel's report on this process, in bytes."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def break_even_epochs(extract_seconds: float, online_seconds: float, cached_seconds: float) -> float | None:
    """After how many training epochs the extraction has cost less than a forward pass in every epoch.

    Args:
        extract_seconds: the whole extraction, encoding and writing included.
        online_seconds: that an epoch spends on decoding and the forward pass where nothing is stored, validation
            included.
        cached_seconds: that an epoch spends on reading the store, validation included.

    Returns:
        epochs; None where an epoch from the store is not faster.
    """
    saved = online_seconds - cached_seconds
    return extract_seconds / saved if saved > 0 else None


def inference_gflops(
    name: str,
    options: MethodOptions,
    layers: Sequence[int],
    num_classes: int,
    *,
    backbone: ModelBackbone,
    tokens: Tokens = "all",
) -> float:
    """Operations to classify one image, in 10^9, backbone included; a multiplication and an addition count as two.

    Weight updates are merged into the backbone first, as they can be for use.

    Args:
        name: the method.
        options: its options.
        layers: layers of the features.
        num_classes: width of the classifier.
        backbone: the backbone on the meta device, where nothing is computed.
        tokens: which tokens the model reads, as in `store.tokens`.
    """
    with torch.device("meta"):
        spec = spec_of_backbone(backbone, layers, tokens)
        model: Any = build_model(name, spec, num_classes, options, backbone=backbone).eval()
        if can_merge(model):
            merge(model)
        images = torch.zeros(1, *backbone.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if find_method(name).trains_backbone:
                model(images)
            else:
                model(_reduced(backbone, images, model.layers, tokens))
    return float(counter.get_total_flops()) / 1e9


def backbone_gflops(layers: Sequence[int], backbone: ModelBackbone) -> float:
    """Operations to compute the tokens of some layers of one image, in 10^9; see `inference_gflops`."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.tokens(torch.zeros(1, *backbone.image_size), layers)
    return float(counter.get_total_flops()) / 1e9


def _reduced(backbone: ModelBackbone, images: Tensor, layers: Sequence[int], how: Tokens) -> TokensByLayer:
    tokens = backbone.tokens(images, layers)
    return {layer: reduce_tokens(values, backbone.layout, how) for layer, values in tokens.items()}
