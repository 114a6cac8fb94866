"""A job is pickled for workers without a backbone that they can load themselves."""

import pickle
from pathlib import Path

import pytest
import torch
from tiny_vit import TINY

from extract.backbones.backbone import TimmBackbone, digests
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import open_source
from store.config import StoreConfig


@pytest.mark.parametrize("loadable", [True, False])
def test_a_worker_gets_the_same_job(loadable: bool, image_folder: Path, tiny_backbone: TimmBackbone) -> None:
    config = BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY)
    data = DataConfig(source="folder", root=image_folder)
    job = ExtractionJob(
        source=open_source(data),
        backbone=tiny_backbone,
        data=data,
        store=StoreConfig(path="cache.zarr"),
        extract=ExtractConfig(device="cpu"),
        backbone_config=config if loadable else None,
    )
    pickled = pickle.dumps(job)
    weights = tiny_backbone.module.blocks[0].attn.qkv.weight
    assert (weights.numpy().tobytes() in pickled) == (not loadable)
    on_worker = pickle.loads(pickled).on_worker("cuda:1")
    assert on_worker.extract.device == "cuda:1"
    assert digests(on_worker.backbone) == digests(job.backbone)
    assert torch.equal(on_worker.backbone.module.cls_token, tiny_backbone.module.cls_token)
    assert (on_worker.data, on_worker.store, on_worker.layers) == (job.data, job.store, job.layers)
