"""Measures what a trial costs: peak memory, inference operations, and when the store has paid for its extraction."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from adapt.features.specs import spec_of_backbone
from adapt.methods.options import MethodOptions
from adapt.methods.registry import build_model, find_method
from extract.backbones.backbone import ModelBackbone

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak memory of a block in bytes; None where the system does not report it."""

    n_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of a block: allocations on a GPU, else resident memory of the process (Linux only)."""
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _RESET.write_text("5")  # resets the kernel's high-water mark
    yield peak
    peak.n_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water_mark()


def _high_water_mark() -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def break_even_epochs(
    extract_seconds: float, forward_seconds: float, forward_samples: int, samples_per_epoch: int
) -> float | None:
    """After how many training epochs the extraction has cost less than a forward pass in every epoch.

    Args:
        extract_seconds: the whole extraction, encoding and writing included.
        forward_seconds: the part of it that online training repeats in every epoch: decoding and the forward pass.
        forward_samples: samples that `forward_seconds` was spent on.
        samples_per_epoch: samples of an epoch.

    Returns:
        epochs; None where no forward pass was measured.
    """
    if not forward_seconds or not forward_samples:
        return None
    return extract_seconds / (forward_seconds / forward_samples * samples_per_epoch)


def inference_gflops(
    name: str, options: MethodOptions, layers: Sequence[int], num_classes: int, backbone: ModelBackbone
) -> float:
    """Operations to classify one image, in 10^9, backbone included; a multiplication and an addition count as two.

    Args:
        name: the method.
        options: its options.
        layers: layers of the features.
        num_classes: width of the classifier.
        backbone: the backbone on the meta device, where nothing is computed.
    """
    with torch.device("meta"):
        spec = spec_of_backbone(backbone, layers)
        model: Any = build_model(name, spec, num_classes, options, backbone=backbone).eval()
        images = torch.zeros(1, *backbone.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images if find_method(name).trains_backbone else backbone.tokens(images, model.layers))
    return float(counter.get_total_flops()) / 1e9
