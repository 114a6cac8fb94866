"""Benchmarks run at a small size and say all that they should; what they measure is not judged here."""

import json
from pathlib import Path

import pytest

from benchmarks import device
from benchmarks.readers import KEPT, MEMMAP, READERS, SIDECACHE
from benchmarks.reading import Setting, measure
from benchmarks.record import machine, save

SMALL = Setting("small", samples=24, dim=8, layers=2, grid=(2, 2), shard_samples=10, batch_size=4, batches=3)


@pytest.mark.slow
def test_all_readers_return_equal_bytes_and_every_figure_is_there(tmp_path: Path) -> None:
    figures = measure(SMALL, tmp_path, repeats=2)
    save({**machine(), "settings": [figures]}, tmp_path / "reading.json")
    document = json.loads((tmp_path / "reading.json").read_text())
    assert {"commit", "machine", "versions"} <= set(document)
    (found,) = document["settings"]
    read = set(READERS) - set(found["warm"]["left_out"])
    assert {SIDECACHE, MEMMAP, KEPT, "tensorstore", "zarr-python"} <= read
    for figure in ("gb_per_second", "ratio_to_memmap", "seconds"):
        assert set(found["warm"][figure]) == read
    assert all(len(values) == 2 for values in found["warm"]["seconds"].values())
    passes = {"sequential", "shuffle_block 1", "shuffle_block 8", "shuffle_block 32"}
    assert set(found["cold"]["seconds"]) == set(found["cold"]["gb_per_second"]) == passes
    assert all(share > 0 for share in found["cold"]["ratio_to_sequential"].values())


def test_the_limits_of_a_device_are_measured(tmp_path: Path) -> None:
    args = device.parse(["extraction", "transfer", "--device", "cpu", "--small", "--batch", "2", "--rounds", "1"])
    args.folder, args.samples = tmp_path, 4
    found = device.extraction(args)
    assert found["images_per_second"] > 0
    assert set(found["operations_per_second"]) == {"extraction", "forward", "matmul"}
    moved = device.transfer(args)
    assert moved["bytes"] == 4 * (1 + 16 * 16) * 96
    assert moved["transfer and decoding / copy"] > 0
