"""What a trial costs: peak memory, and when the cache has paid for itself."""

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
    """The highest memory in use while a block ran, in bytes; None where the system does not tell."""

    n_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure a block: allocations on a GPU, else the whole process's resident memory (Linux)."""
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _RESET.write_text("5")  # the kernel then restarts its high-water mark
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
    """Epochs of training after which extracting once has cost less than a forward pass in every epoch.

    Args:
        extract_seconds: what extraction took in all, encoding and writing included.
        forward_seconds: what reading the samples and the forward pass took of it: online training pays that again in
            every epoch, for the samples of an epoch.
        forward_samples: how many samples that was spent on.
    """
    if not forward_seconds or not forward_samples:
        return None
    return extract_seconds / (forward_seconds / forward_samples * samples_per_epoch)


def inference_gflops(
    name: str, options: MethodOptions, layers: Sequence[int], num_classes: int, backbone: ModelBackbone
) -> float:
    """10^9 operations (a multiplication and an addition are two) for one image, backbone included.

    Args:
        layers: those of the features.
        backbone: on the meta device, where nothing is computed.
    """
    with torch.device("meta"):
        spec = spec_of_backbone(backbone, layers)
        model: Any = build_model(name, spec, num_classes, options, backbone=backbone).eval()
        images = torch.zeros(1, *backbone.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images if find_method(name).trains_backbone else backbone.tokens(images, model.layers))
    return float(counter.get_total_flops()) / 1e9
