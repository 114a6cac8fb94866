"""What a trial costs: memory above what was in use, operations after merging, epochs until the store has paid."""

import sys

import pytest
import torch

from adapt.job.cost import break_even_epochs, inference_gflops, peak_memory
from adapt.methods.registry import METHODS
from extract.backbones.backbone import empty_backbone

CPU = torch.device("cpu")
MIB = 2**20


def gflops(method: str, **options: object) -> float:
    backbone = empty_backbone("vit_tiny_patch16_224", {"depth": 3})
    return inference_gflops(method, METHODS[method].options.model_validate(options), range(3), 10, backbone=backbone)


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 8}), ("lora_fix", {}), ("kronecker", {"n": 4}), ("intrinsic", {})]
)
def test_a_method_that_merges_costs_no_more_than_its_backbone(method: str, options: dict[str, object]) -> None:
    assert gflops(method, **options) == gflops("bitfit")


def test_a_method_that_cannot_merge_costs_more_than_its_backbone() -> None:
    assert gflops("adapter") > gflops("bitfit")


def test_a_multiplication_and_an_addition_are_two_operations() -> None:
    heads = [gflops("linear_probe", pool=pool) for pool in ("cls", "cls_mean")]
    assert heads[1] - heads[0] == pytest.approx(2 * 10 * 192 / 1e9)


@pytest.mark.parametrize(
    ("extraction", "online", "cached", "epochs"),
    [(100.0, 12.0, 2.0, 10.0), (0.0, 12.0, 2.0, 0.0), (100.0, 2.0, 2.0, None), (100.0, 2.0, 3.0, None)],
)
def test_a_store_has_paid_for_itself_once_reading_it_has_saved_its_extraction(
    extraction: float, online: float, cached: float, epochs: float | None
) -> None:
    assert break_even_epochs(extraction, online_seconds=online, cached_seconds=cached) == epochs


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak of a process")
@pytest.mark.parametrize("used_before", [0, 512])
def test_peak_memory_is_that_above_what_was_in_use(used_before: int) -> None:
    """Also where the process has freed memory that the block could take, or used more of it before."""
    before = [torch.ones(MIB // 4) for _ in range(used_before)]  # 1 MiB each
    del before
    with peak_memory(CPU) as peak:
        torch.ones(256 * MIB // 4)  # freed before the block ends
    assert peak.n_bytes is not None
    assert 250 * MIB < peak.n_bytes < 280 * MIB
