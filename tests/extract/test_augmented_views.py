"""Augmented views of the training samples: decided by seed, id and number alone, and none of the samples that judge."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash import KilledError, killed_at
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_store import contents

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from extract.backbones.backbone import TimmBackbone
from extract.config import DataConfig
from extract.forward.frozen_forward import FrozenForward
from extract.sources.augmented_views import AugmentedImage, AugmentedSplit, with_views
from extract.sources.open_source import SampleSplit, open_source
from extract.sources.samples import FileBytes, Sample
from extract.sources.store_order import in_store_order
from store.errors import OtherStoreError, UserError
from store.verify import verify_store

MakeConfig = Callable[..., Config]
VIEWS = "data.views=3"
GRAY = b"P5 8 8 255\n" + bytes(range(64))


def split_of(ids: list[str]) -> SampleSplit:
    return SampleSplit([Sample(name, ("a",), FileBytes(GRAY)) for name in ids], np.zeros(len(ids), np.int64))


def seeds_of(ids: list[str], views: int, seed: int = 0) -> dict[str, int]:
    split = AugmentedSplit(split_of(ids), views, seed)
    return {split.ids[row]: split[row].seed for row in range(len(split))}


@given(st.permutations(list("abcdef")), st.integers(1, 4), st.integers(0, 2**63 - 1))
def test_a_view_depends_on_seed_id_and_number_alone(ids: list[str], views: int, seed: int) -> None:
    all_views = seeds_of(ids, views, seed)
    assert len(set(all_views.values())) == len(ids) * views
    assert seeds_of(sorted(ids), views, seed) == all_views
    some = seeds_of(ids[:3], views + 1, seed)
    assert {name: some[name] for name in some if name in all_views}.items() <= all_views.items()
    assert not set(seeds_of(ids, views, seed + 1).values()) & set(all_views.values())


def test_views_follow_one_another_with_the_digest_of_their_sample() -> None:
    split = AugmentedSplit(split_of(["a", "b"]), 2, seed=0)
    assert split.ids == ("a#1", "a#2", "b#1", "b#2")
    assert [split.digest(row) for row in range(4)] == [split_of(["a"]).digest(0)] * 4
    assert isinstance(split[0], AugmentedImage)


def test_the_views_of_a_source_are_in_the_order_of_train(image_folder: Path) -> None:
    data = DataConfig(source="folder", root=image_folder, views=3)
    stored = ["train/red/3.png", "train/blue/0.png"]
    source = in_store_order(with_views(open_source(data), data), {"train": stored})
    train, augmented = source.splits["train"].ids, source.splits["augmented"].ids
    assert list(train[:2]) == stored
    assert list(augmented) == [f"{name}#{view}" for name in train for view in (1, 2)]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_all_but_the_augmented_views_is_byte_for_byte_the_store_without_them(
    tiny_config: MakeConfig, tmp_path: Path, dtype: str
) -> None:
    for views in (1, 3):
        sc.extract(tiny_config(f"data.views={views}", f"store.dtype={dtype}", f"store.path={tmp_path}/{views}.zarr"))
    plain, more = contents(tmp_path / "1.zarr"), contents(tmp_path / "3.zarr")
    root = {name for name in plain if name in ("zarr.json", "_log/zarr.json")}
    assert all(more[name] == plain[name] for name in plain.keys() - root)
    assert {name.split("/")[0] for name in more.keys() - plain.keys()} == {"augmented"}
    assert b"augment" not in plain["zarr.json"]


def test_a_store_holds_the_crops_that_the_backbone_draws(tiny_config: MakeConfig, tiny_backbone: TimmBackbone) -> None:
    config = tiny_config(VIEWS)
    inputs = Inputs(config)
    store = sc.extract(config).store
    assert (store.num_samples("train"), store.num_samples("augmented"), store.num_samples("test")) == (24, 48, 12)
    assert store.labels("augmented").tolist() == np.repeat(store.labels("train"), 2).tolist()
    split, forward = inputs.source.splits["augmented"], FrozenForward(inputs.backbone, (2,), "all", config.extract)
    pixels = torch.stack(
        [inputs.backbone.augment(split[row].image, np.random.default_rng(split[row].seed)) for row in (0, 1, 47)]
    )
    assert torch.equal(forward(pixels)[2], torch.from_numpy(store.read("augmented", [0, 1, 47])[2]))
    assert not torch.equal(pixels[0], pixels[1])


def test_a_store_with_views_verifies_and_is_complete(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(VIEWS)
    sc.extract(config)
    report = verify_store(tmp_path / "cache.zarr")
    assert (report.ok, report.complete, report.notes) == (True, True, [])
    assert sc.extract(config).shards_written == 0


def test_views_grow_with_the_samples(tiny_config: MakeConfig, image_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(VIEWS)
    before = sc.extract(config).store
    for name in ("train/blue/!.png", "train/red/9.png", "test/red/!.png"):
        Image.new("RGB", (40, 32), (len(name), 9, 90)).save(image_folder / name)
    grown = sc.extract(config).store
    assert (grown.num_samples("train"), grown.num_samples("augmented")) == (26, 52)
    assert grown.sample_ids("augmented") == [f"{name}#{view}" for name in grown.sample_ids("train") for view in (1, 2)]
    old = before.read("augmented", range(48))
    assert all((grown.read("augmented", range(48))[layer] == old[layer]).all() for layer in old)
    fresh = sc.extract(tiny_config(VIEWS, f"store.path={tmp_path}/fresh.zarr")).store
    rows = [fresh.sample_ids("augmented").index(name) for name in grown.sample_ids("augmented")]
    assert all((fresh.read("augmented", rows)[k] == v).all() for k, v in grown.read("augmented", range(52)).items())
    assert verify_store(tmp_path / "cache.zarr").ok


def test_a_kill_at_any_write_costs_no_byte(tiny_config: MakeConfig, image_folder: Path, tmp_path: Path) -> None:
    """First while the store is made, then while it grows."""
    config, store, base = tiny_config(VIEWS, "store.layers=[2]"), tmp_path / "cache.zarr", tmp_path / "base.zarr"
    for step in ("make", "grow"):
        if step == "grow":
            Image.new("RGB", (40, 32), (7, 9, 90)).save(image_folder / "train/blue/!.png")
        with killed_at(math.inf) as life:
            sc.extract(config)
        whole = contents(store)
        for writes in range(0, life.writes, 1 + life.writes // 8):
            shutil.rmtree(store)
            if step == "grow":
                shutil.copytree(base, store)
            with killed_at(writes), pytest.raises(KilledError):
                sc.extract(config)
            sc.extract(config)
            assert contents(store) == whole, (step, writes)
        shutil.copytree(store, base, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_workers_make_the_same_store(tiny_config: MakeConfig, tmp_path: Path) -> None:
    sc.extract(tiny_config(VIEWS))
    sc.extract(tiny_config(VIEWS, f"store.path={tmp_path}/by_two.zarr", "extract.workers=2", "extract.device=cpu"))
    assert contents(tmp_path / "by_two.zarr") == contents(tmp_path / "cache.zarr")


@pytest.mark.parametrize(
    ("stored", "wanted"), [(VIEWS, "data.views=1"), ("data.views=1", VIEWS), (VIEWS, "data.views=2")]
)
def test_a_store_with_other_views_is_refused(tiny_config: MakeConfig, stored: str, wanted: str) -> None:
    sc.extract(tiny_config(stored))
    with pytest.raises(OtherStoreError, match=r"provenance\.augmentation: stored"):
        sc.extract(tiny_config(wanted))
    with pytest.raises(OtherStoreError, match=r"data\.views, how random crops are drawn: stored"):
        sc.train(tiny_config(wanted))


def test_a_damaged_image_is_skipped_in_all_its_views(tiny_config: MakeConfig, image_folder: Path) -> None:
    (image_folder / "train/blue/3.png").write_bytes(b"no image")
    config = tiny_config(VIEWS, "data.on_error=skip", "methods=[{name: losa, rank: 4, token_rank: 2}]")
    store = sc.extract(config).store
    assert (store.num_samples("train"), store.num_samples("augmented")) == (23, 46)
    assert set(store.skipped("augmented")) == {"train/blue/3.png#1", "train/blue/3.png#2"}
    assert len(sc.train(config)) == 1


def test_videos_have_no_random_crops() -> None:
    with pytest.raises(ValueError, match=r"data\.views is 2, but data\.source is video_folder.*set data\.views to 1"):
        DataConfig(source="video_folder", views=2)


def pairs_of(sample: Any) -> list[tuple[Any, int]]:
    return [(sample, row % 2) for row in range(8)]


def test_a_users_own_images_have_views_and_other_samples_are_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config(VIEWS)
    images, tensors = pairs_of(Image.new("RGB", (40, 32), (9, 80, 90))), pairs_of(torch.zeros(3, 32, 32))
    wrong = sc.from_datasets({"train": tensors, "test": tensors}, ["a", "b"])
    for command in (sc.extract, sc.run):
        with pytest.raises(UserError, match=r"'train/00000000' is of type Tensor; set data\.views to 1, or let"):
            command(config, wrong)
    right = sc.from_datasets({"train": images, "test": images}, ["a", "b"])
    assert sc.extract(config, right).store.num_samples("augmented") == 16


def test_a_users_own_module_has_no_random_crops(tiny_config: MakeConfig) -> None:
    module = torch.nn.Conv2d(3, 16, kernel_size=8, stride=8)
    own = sc.TappedBackbone(
        module, lambda net, images: {0: net(images).flatten(2).transpose(1, 2)}, example=torch.zeros(3, 32, 32)
    )
    with pytest.raises(UserError, match=r"data\.views is 3, but a module of your own has no random crops; set"):
        sc.extract(tiny_config(VIEWS), backbone=own)
