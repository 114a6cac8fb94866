"""Shards do not depend on how many batches are pending, as on a GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sidecache as sc
from adapt.config.pipeline import Config
from extract.backbones.backbone import load_backbone
from extract.config import ExtractConfig
from extract.job.extraction_job import ExtractionJob
from extract.job.shard_extractor import ExtractedShard, ShardExtractor
from extract.sources.open_source import open_source
from store.arrays import SKIPPED


@pytest.fixture
def extract_shards(tiny_config: Callable[..., Config], image_folder: Path) -> Callable[[int], list[ExtractedShard]]:
    """Extracts all five shards of a training split; the third shard and one other sample cannot be decoded."""
    names = sorted((image_folder / "train").rglob("*.png"))
    for path in (names[0], *names[10:15]):
        path.write_bytes(b"no image")
    config = tiny_config("data.on_error=skip")
    sc.extract(config)
    schema, source = sc.open_store(config.store.path).schema, open_source(config.data)

    def extract(ahead: int) -> list[ExtractedShard]:
        job = ExtractionJob(
            source=source,
            backbone=load_backbone(config.backbone),
            data=config.data,
            store=config.store,
            extract=ExtractConfig(batch_size=2),
        )
        extractor = ShardExtractor(job, schema, {})
        extractor._ahead = ahead
        return list(extractor.extract("train", range(5)))

    return extract


@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_shards_are_those_of_one_batch_at_a_time(
    ahead: int, extract_shards: Callable[[int], list[ExtractedShard]]
) -> None:
    expected, found = extract_shards(0), extract_shards(ahead)
    assert [len(shard.status) for shard in found] == [5, 5, 5, 5, 4]
    assert (found[2].status == SKIPPED).all()
    assert sum(len(shard.skipped) for shard in found) == 6
    for one, other in zip(expected, found, strict=True):
        assert (one.status == other.status).all()
        assert one.skipped == other.skipped
        for layer, part in one.tokens.items():
            np.testing.assert_array_equal(part.values, other.tokens[layer].values)
