"""A store grows by samples and layers: stored values are unchanged, and a kill at any write loses no data."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import yaml
import zarr
from crash import KilledError, killed_at
from PIL import Image
from small_store import contents
from tiny_vit import TINY

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from adapt.planning.job_facts import JobFacts
from extract.backbones.backbone import TimmBackbone, load_backbone
from extract.config import BackboneConfig, ClipConfig, DataConfig, ExtractConfig
from extract.job.extraction import Extraction, extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import ImageSource, open_source
from extract.sources.samples import FileBytes, Sample
from extract.sources.splits import draw_test
from extract.sources.store_order import in_store_order
from store.address import store_url
from store.config import SPLITS, Layers, Split, StoreConfig
from store.errors import ChangedError, JobError, UserError
from store.growing.growth import read_known
from store.kvstore import KeyValueStore
from store.reader import open_store
from store.verify import verify_store

SHARD = 4
CLASSES = ("blue", "red")
NEVER = float("inf")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """10 training and 4 test images of two classes; in shards of 4, the last one of train is not full."""
    add(tmp_path / "images", "train", "bcdef")
    add(tmp_path / "images", "test", "bc")
    return tmp_path / "images"


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip syncs to disk: processes are killed here, not machines."""
    context = ts.Context({"file_io_sync": False})
    monkeypatch.setattr("store.kvstore._context", lambda: context)


def add(images: Path, split: str, names: Iterable[str]) -> None:
    for k, folder in enumerate(CLASSES):
        (images / split / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            pixels = np.random.default_rng([ord(name), k, len(split)]).integers(0, 255, (32, 40, 3), np.uint8)
            Image.fromarray(pixels).save(images / split / folder / f"{name}.png")


def data_of(images: Path, **options: Any) -> DataConfig:
    return DataConfig(source="folder", root=images, **options)


def extract(
    images: Path,
    store: Path,
    backbone: TimmBackbone,
    dtype: str = "float16",
    layers: Layers = "all",
    splits: Sequence[Split] = SPLITS,
    **options: Any,
) -> Extraction:
    """Open the source as the command does, with the samples of the store."""
    data = data_of(images, **options)
    source = open_source(data, read_known(KeyValueStore(store_url(store))))
    return extract_source(source, data, store, backbone, dtype, layers, splits=splits)


def extract_source(
    source: ImageSource,
    data: DataConfig,
    store: Path,
    backbone: TimmBackbone,
    dtype: str,
    layers: Layers = "all",
    config: ExtractConfig = ExtractConfig(device="cpu", batch_size=3),  # noqa: B008 (it is frozen)
    splits: Sequence[Split] = SPLITS,
) -> Extraction:
    stored = StoreConfig(path=str(store), shard_samples=SHARD, dtype=dtype, layers=layers, splits=list(splits))  # type: ignore[arg-type]
    return extract_tokens(ExtractionJob(source=source, backbone=backbone, data=data, store=stored, extract=config))


def assert_sound(store: Path) -> None:
    report = verify_store(store)
    assert (report.ok, report.complete, report.notes) == (True, True, []), report.document()
    assert [file.name for file in (store / "_log").iterdir()] == ["zarr.json"]
    zarr.open_group(store, mode="r").tree()  # warns of anything that is no node


def full_shards(store: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of the files that growth by samples must not touch."""
    rows = {split: open_store(store).schema.splits[split].num_samples for split in ("train", "test")}
    files = {
        file: int(file.relative_to(store).parts[3])
        for split in rows
        for file in store.glob(f"{split}/*/c/**/*")
        if file.is_file() and file.relative_to(store).parts[1].startswith(("layer", "scale", "status", "shard_digest"))
    }
    return {
        str(file.relative_to(store)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file, shard in files.items()
        if (shard + 1) * SHARD <= rows[file.relative_to(store).parts[0]]
    }


def assert_kept(before: dict[str, tuple[bytes, int]], store: Path) -> None:
    assert before
    after = full_shards(store)
    assert {name: after[name] for name in before} == before


# Samples


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize(("train", "test", "shards"), [("a", "", 1), ("", "a", 1), ("ag", "ad", 3)])
def test_new_samples_follow_whatever_their_names(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone, dtype: str, train: str, test: str, shards: int
) -> None:
    store = extract(images, tmp_path / "c.zarr", tiny_backbone, dtype).store
    before, kept = {split: store.sample_ids(split) for split in store.splits}, full_shards(tmp_path / "c.zarr")
    add(images, "train", train)
    add(images, "test", test)
    grown = extract(images, tmp_path / "c.zarr", tiny_backbone, dtype)
    for split, names in (("train", train), ("test", test)):
        new = sorted(f"{split}/{folder}/{name}.png" for folder in CLASSES for name in names)
        assert grown.store.sample_ids(split) == before[split] + new
        folders = [CLASSES.index(sample.split("/")[1]) for sample in grown.store.sample_ids(split)]
        assert grown.store.labels(split).tolist() == folders
    assert grown.shards_written == shards
    assert_kept(kept, tmp_path / "c.zarr")
    assert_sound(tmp_path / "c.zarr")
    assert extract(images, tmp_path / "c.zarr", tiny_backbone, dtype).shards_written == 0


def test_a_store_that_grew_is_the_one_that_was_made_in_its_order_at_once(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[0, 2])
    for names in ("a", "Zz", "y"):
        add(images, "train", names)
        add(images, "test", names[:1])
        store = extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[0, 2]).store
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    data = data_of(images)
    ordered = in_store_order(open_source(data), {split: store.sample_ids(split) for split in store.splits})
    extract_source(ordered, data, tmp_path / "once.zarr", tiny_backbone, "float16")
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "once.zarr")
    assert_sound(tmp_path / "c.zarr")


def test_a_store_that_is_not_finished_grows_too(images: Path, tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    (tmp_path / "c.zarr/train/status/c/0").unlink()
    add(images, "train", "a")
    assert extract(images, tmp_path / "c.zarr", tiny_backbone).shards_written == 2
    assert_sound(tmp_path / "c.zarr")


def test_the_views_of_a_new_video_stay_together(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from video_files import write_video

    clips = ClipConfig(frames=2, clips=3)
    data = DataConfig(source="video_folder", root=tmp_path / "videos", video=clips)
    backbone = load_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY), clips
    )
    for names in ("bc", "a"):
        for split in ("train", "test"):
            for folder in CLASSES:
                for name in names:
                    write_video(tmp_path / "videos" / split / folder / f"{name}.mp4")
        store = extract_source(open_source(data), data, tmp_path / "c.zarr", backbone, "float16").store
    assert store.schema.shard_samples == 6
    assert store.sample_ids("train") == [
        f"train/{folder}/{name}.mp4#{view}"
        for folder, name in (("blue", "b"), ("blue", "c"), ("red", "b"), ("red", "c"), ("blue", "a"), ("red", "a"))
        for view in range(3)
    ]
    assert_sound(tmp_path / "c.zarr")


def test_a_store_that_is_open_while_it_grows_keeps_its_full_shards(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    store = open_store(tmp_path / "c.zarr")
    full = store.read("train", range(8))
    add(images, "train", "a")
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    np.testing.assert_equal(store.read("train", range(8)), full)
    assert len(store.labels("train")) == len(store.sample_ids("train")) == 10


# Splits


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_a_split_is_added_and_the_store_is_as_if_made_with_both(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone, dtype: str
) -> None:
    store = extract(images, tmp_path / "c.zarr", tiny_backbone, dtype, splits=["train"]).store
    assert store.splits == ("train",)
    assert_sound(tmp_path / "c.zarr")
    values, kept = store.read("train", range(10)), contents(tmp_path / "c.zarr")
    assert extract(images, tmp_path / "c.zarr", tiny_backbone, dtype).shards_written == 1
    np.testing.assert_equal(store.read("train", range(10)), values, "open since before")
    grown = contents(tmp_path / "c.zarr")
    assert {name for name, content in kept.items() if grown[name] != content} == {"zarr.json"}
    extract(images, tmp_path / "once.zarr", tiny_backbone, dtype)
    assert grown == contents(tmp_path / "once.zarr")
    assert_sound(tmp_path / "c.zarr")


def test_a_job_that_asks_for_fewer_splits_keeps_those_of_the_store(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    (tmp_path / "c.zarr/test/status/c/0").unlink()
    again = extract(images, tmp_path / "c.zarr", tiny_backbone, splits=["train"])
    assert (again.store.splits, again.shards_written) == (("train", "test"), 1)
    assert extract(images, tmp_path / "c.zarr", tiny_backbone, splits=["train"]).shards_written == 0


def test_samples_layers_and_a_split_are_added_together(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[2], splits=["train"])
    add(images, "train", "a")
    grown = extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[0, 2]).store
    assert (grown.layers, grown.num_samples("train"), grown.num_samples("test")) == ((0, 2), 12, 4)
    assert_sound(tmp_path / "c.zarr")


# Layers


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_layers_are_added_and_those_that_are_there_are_not_touched(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone, dtype: str
) -> None:
    store = extract(images, tmp_path / "c.zarr", tiny_backbone, dtype, [1]).store
    before, values, kept = full_shards(tmp_path / "c.zarr"), store.read("train", range(10)), contents(tmp_path)
    grown = extract(images, tmp_path / "c.zarr", tiny_backbone, dtype, [0, -1])
    assert grown.store.layers == (0, 1, 2)
    assert grown.shards_written == 3 + 1
    assert_kept({name: file for name, file in before.items() if "shard_digest" not in name}, tmp_path / "c.zarr")
    assert {name for name, file in kept.items() if contents(tmp_path)[name] != file} == {
        "c.zarr/zarr.json",
        *(f"c.zarr/{split}/shard_digest/zarr.json" for split in ("train", "test")),
        *(f"c.zarr/train/shard_digest/c/{shard}/0" for shard in range(3)),
        "c.zarr/test/shard_digest/c/0/0",
    }
    np.testing.assert_equal({1: grown.store.read("train", range(10))[1]}, values)
    assert_sound(tmp_path / "c.zarr")
    extract(images, tmp_path / "once.zarr", tiny_backbone, dtype)
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "once.zarr"), "as if made at once"
    assert extract(images, tmp_path / "c.zarr", tiny_backbone, dtype, [1]).shards_written == 0


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_samples_and_layers_are_added_together(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone, dtype: str
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone, dtype, [2])
    add(images, "train", "a")
    grown = extract(images, tmp_path / "c.zarr", tiny_backbone, dtype, [0, 2]).store
    assert (grown.layers, grown.num_samples("train")) == ((0, 2), 12)
    assert_sound(tmp_path / "c.zarr")


def test_a_store_is_whole_and_trainable_while_layers_are_added(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    before = extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[1]).store.read("train", range(10))
    with killed_at(20), pytest.raises(KilledError):
        extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[0, 1, 2])
    store = open_store(tmp_path / "c.zarr")
    store.require_complete()
    np.testing.assert_equal(store.read("train", range(10)), before)
    report = verify_store(tmp_path / "c.zarr")
    assert (report.ok, report.complete) == (True, True)
    (note,) = report.notes
    assert "files are of layers that are being added; they are not part of the store yet" in note


def test_layers_given_up_half_way_leave_nothing(images: Path, tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone, "int8", [1])
    with killed_at(25), pytest.raises(KilledError):
        extract(images, tmp_path / "c.zarr", tiny_backbone, "int8", [0, 1])
    assert (tmp_path / "c.zarr/train/layer_00").exists()
    extract(images, tmp_path / "c.zarr", tiny_backbone, "int8", [1, 2])
    assert not (tmp_path / "c.zarr/train/layer_00").exists()
    assert_sound(tmp_path / "c.zarr")


@pytest.mark.usefixtures("quick_disk")
def test_a_job_that_is_killed_as_it_gives_up_layers_leaves_them_to_be_extracted_again(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    half, store = tmp_path / "half.zarr", tmp_path / "c.zarr"
    extract(images, half, tiny_backbone, "float16", [1])
    with killed_at(25), pytest.raises(KilledError):
        extract(images, half, tiny_backbone, "float16", [0, 1])
    for k in range(8):
        shutil.copytree(half, store)
        with killed_at(k), pytest.raises(KilledError):
            extract(images, store, tiny_backbone, "float16", [1, 2])
        assert extract(images, store, tiny_backbone, "float16", [0, 1]).store.layers == (0, 1)
        assert_sound(store)
        shutil.rmtree(store)


# Kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "shard_samples", "every"),
    [("samples", SHARD, 1), ("layers", SHARD, 1), ("samples and layers", 50, 5), ("samples and a split", SHARD, 1)],
)
@pytest.mark.usefixtures("quick_disk")
def test_a_kill_at_any_write_of_growth_costs_no_byte(
    tmp_path: Path, tiny_backbone: TimmBackbone, what: str, shard_samples: int, every: int, monkeypatch: Any
) -> None:
    """With 50 samples a shard, growth clears every mark."""
    monkeypatch.setitem(globals(), "SHARD", shard_samples)
    images, base, store = tmp_path / "images", tmp_path / "base.zarr", tmp_path / "c.zarr"
    add(images, "train", "bcd")
    add(images, "test", "b")
    full, splits = range(6 // SHARD * SHARD), SPLITS[:1] if "split" in what else SPLITS
    before = extract(images, base, tiny_backbone, "int8", [1], splits).store.read("train", full)
    layers = [0, 1] if "layers" in what else [1]
    if "samples" in what:
        add(images, "train", "a")
        add(images, "test", "a")
    shutil.copytree(base, store)
    with killed_at(NEVER) as life:
        extract(images, store, tiny_backbone, "int8", layers)
    whole = contents(store)
    refusals = 0
    for k in range(0, life.writes, every):
        shutil.rmtree(store)
        shutil.copytree(base, store)
        with killed_at(k), pytest.raises(KilledError):
            extract(images, store, tiny_backbone, "int8", layers)
        refusals += reads_or_refuses(store, before)
        extract(images, store, tiny_backbone, "int8", layers)
        assert contents(store) == whole, k
        assert [file.name for file in (store / "_log").iterdir()] == ["zarr.json"], k
    assert_sound(store)
    assert life.writes > refusals > 0


def reads_or_refuses(store: Path, before: dict[int, np.ndarray]) -> bool:
    """Whether a store is refused after a kill; if not, the rows of its full shards must be unchanged."""
    if (store / "_log/next/zarr.json").exists() and KeyValueStore(store_url(store)).read_group("_log/next"):
        for read in (open_store, verify_store):
            with pytest.raises(
                JobError, match="was interrupted, or is under way; run the same `sidecache extract` again"
            ):
                read(store)
        return True
    opened = open_store(store)
    np.testing.assert_equal(opened.read("train", range(len(before[1])), [1]), before)
    assert verify_store(store).ok
    return False


def test_a_growth_that_was_decided_is_finished_without_its_samples(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    """It needs the redo log only: the source may have grown again, and a drawn test split is not drawn again."""
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    add(images, "train", "a")
    with killed_at(14), pytest.raises(KilledError):
        extract(images, tmp_path / "c.zarr", tiny_backbone)
    with pytest.raises(JobError, match="was interrupted"):
        open_store(tmp_path / "c.zarr")
    add(images, "train", "B")
    store = extract(images, tmp_path / "c.zarr", tiny_backbone).store
    assert [name.split("/")[2] for name in store.sample_ids("train")[10:]] == ["a.png"] * 2 + ["B.png"] * 2
    assert_sound(tmp_path / "c.zarr")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # dask's own, as in test_cluster.py
def test_workers_let_a_store_grow_to_the_same_bytes(images: Path, tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone, "int8", [1])
    shutil.copytree(tmp_path / "c.zarr", tmp_path / "alone.zarr")
    add(images, "train", "a")
    extract(images, tmp_path / "alone.zarr", tiny_backbone, "int8", [0, 1])
    data = data_of(images)
    source = open_source(data, read_known(KeyValueStore(store_url(tmp_path / "c.zarr"))))
    many = ExtractConfig(device="cpu", batch_size=3, workers=2)
    extract_source(source, data, tmp_path / "c.zarr", tiny_backbone, "int8", [0, 1], many)
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "alone.zarr")
    assert_sound(tmp_path / "c.zarr")


def test_stores_in_memory_grow_too(images: Path, tiny_backbone: TimmBackbone) -> None:
    """A store with keys only, as an object store: no folders, no renaming."""
    place: Any = "memory://growing/c.zarr"
    extract(images, place, tiny_backbone, "int8", [1])
    add(images, "train", "a")
    store = extract(images, place, tiny_backbone, "int8", [0, 1]).store
    report = verify_store(place)
    assert (report.ok, report.complete, report.notes) == (True, True, [])
    assert (store.num_samples("train"), store.layers) == (12, (0, 1))


# Refusals


def refused(images: Path, store: Path, backbone: TimmBackbone, **options: Any) -> str:
    before = contents(store)
    with pytest.raises(UserError) as error:
        extract(images, store, backbone, **options)
    assert contents(store) == before
    return str(error.value)


def test_samples_that_are_gone_changed_or_of_another_class_are_refused_by_name(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    rows = [f"{split}/{folder}/{name}.png" for split, names in (("train", "bcdef"), ("test", "bc"))
            for folder in CLASSES for name in names]  # fmt: skip
    labels = {row: row.split("/")[1] for row in rows}

    def write_list() -> DataConfig:
        lines = [f"{row},{label},{row.split('/')[0]}" for row, label in labels.items()]
        (images / "list.csv").write_text("\n".join(["path,label,split", *lines]))
        return DataConfig(source="csv", root=images / "list.csv")

    def run() -> Extraction:
        data = write_list()
        return extract_source(open_source(data), data, tmp_path / "c.zarr", tiny_backbone, "float16")

    run()
    before = contents(tmp_path / "c.zarr")
    for name in "bcde":
        del labels[f"train/red/{name}.png"]
    shutil.copy(images / "test/red/b.png", images / "test/red/c.png")
    labels["test/blue/b.png"] = "red"
    add(images, "train", "a")
    labels["train/blue/a.png"] = "blue"
    with pytest.raises(ChangedError) as error:
        run()
    assert str(error.value).splitlines()[1:-1] == [
        "  train: 4 ('train/red/b.png', 'train/red/c.png', 'train/red/d.png', ...) gone",
        "  test: 1 ('test/red/c.png') changed",
        "  test: 1 ('test/blue/b.png') of another class",
    ]
    assert "Only new samples of its classes can be added." in str(error.value)
    assert "`sidecache extract --on-changed new-store`" in str(error.value)
    assert contents(tmp_path / "c.zarr") == before


def test_new_classes_are_refused_by_name(images: Path, tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    shutil.copytree(images / "train/blue", images / "train/green")
    assert "\n  classes: 1 ('green') new\n" in refused(images, tmp_path / "c.zarr", tiny_backbone)


def test_another_way_of_extracting_is_refused_before_the_samples_are(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone)
    (images / "train/red/b.png").unlink()
    assert "provenance.dtype: stored" in refused(images, tmp_path / "c.zarr", tiny_backbone, dtype="int8")


def test_growth_that_cannot_fit_is_refused_before_anything_changes(
    images: Path, tmp_path: Path, tiny_backbone: TimmBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[1])
    before = contents(tmp_path / "c.zarr")
    add(images, "train", "a")
    monkeypatch.setattr("extract.job.open_store.free_disk_bytes", lambda url: 100)
    with pytest.raises(JobError, match="4 samples need"):
        extract(images, tmp_path / "c.zarr", tiny_backbone, layers=[1])
    shutil.rmtree(images / "train")
    add(images, "train", "bcdef")
    with pytest.raises(JobError, match="14 samples need"):
        extract(images, tmp_path / "c.zarr", tiny_backbone)
    assert contents(tmp_path / "c.zarr") == before


# Test splits that are drawn


def drawn_folder(tmp_path: Path, names: str) -> Path:
    add(tmp_path / "flat", ".", names)
    return tmp_path / "flat"


def test_samples_of_a_drawn_split_keep_their_side_and_new_ones_keep_the_fraction(
    tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    root, store, sides = tmp_path / "flat", tmp_path / "c.zarr", dict[str, list[str]]()
    for names in ("klmnopqr", "a", "b", "c", "d"):
        drawn_folder(tmp_path, names)
        grown = extract(root, store, tiny_backbone).store
        for split in grown.splits:
            ids = grown.sample_ids(split)
            assert ids[: len(sides.get(split, []))] == sides.get(split, [])
            sides[split] = ids
    assert (len(sides["train"]), len(sides["test"])) == (18, 6), "a quarter, though no step had four of a class"
    assert_sound(store)


def test_parts_of_a_known_file_go_to_its_side() -> None:
    parts = [Sample(f"{file}#{k}", ("a",), FileBytes(b""), part_of=str(file)) for file in range(6) for k in range(3)]
    sides = {"0#0": "test", "1#1": "train"}
    chosen = draw_test(parts, 0.5, multi_label=False, stored_splits=sides)
    assert {f"0#{k}" for k in range(3)} <= chosen
    assert not {f"1#{k}" for k in range(3)} & chosen
    assert len(chosen) == 9


def test_another_draw_than_the_stores_is_refused(tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    root = drawn_folder(tmp_path, "abcdefgh")
    extract(root, tmp_path / "c.zarr", tiny_backbone)
    message = refused(root, tmp_path / "c.zarr", tiny_backbone, split_seed=1)
    assert 'provenance.drawn: stored \'{"test_fraction": 0.25, "split_seed": 0}\', wanted' in message


# Whole jobs


@pytest.fixture
def config(tmp_path: Path, images: Path) -> Callable[..., Config]:
    def build(*overrides: str) -> Config:
        document = {
            "run_dir": str(tmp_path / "run"),
            "data": {"source": "folder", "root": str(images)},
            "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": TINY},
            "store": {"path": str(tmp_path / "cache.zarr"), "dtype": "float32", "shard_samples": SHARD},
            "train": {"epochs": 1, "batch_size": 4, "seeds": [0]},
            "methods": ["linear_probe", "full"],
        }
        return sc.load_config(document, overrides)

    return build


@pytest.mark.parametrize("drawn", [False, True])
def test_methods_that_read_the_images_again_see_the_stores_rows(
    config: Callable[..., Config], images: Path, tmp_path: Path, drawn: bool
) -> None:
    job = config(f"data.root={drawn_folder(tmp_path, 'klmnop')}") if drawn else config()
    sc.extract(job)
    add(images, "train", "a")
    drawn_folder(tmp_path, "abc")
    rows = sc.run(job)
    assert {row.method for row in rows} == {"linear_probe", "full"}
    store, source = sc.open_store(job.store.path), Inputs(job).source
    for split in store.splits:
        labels = dict(zip(source.splits[split].ids, source.splits[split].labels, strict=True))
        assert [labels[sample] for sample in store.sample_ids(split)] == store.labels(split).tolist()
        assert len(labels) == len(store.labels(split))


def test_a_new_store_lies_beside_one_whose_samples_changed(
    config: Callable[..., Config], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = config("methods=[linear_probe]")
    sc.extract(job)
    before = contents(tmp_path / "cache.zarr")
    (images / "train/red/b.png").unlink()
    with pytest.raises(UserError, match=r"1 \('train/red/b.png'\) gone"):
        sc.run(job)
    with killed_at(40), pytest.raises(KilledError):
        sc.extract(job, on_changed="new-store")
    sc.run(job, on_changed="new-store")
    assert f"{tmp_path}/cache.zarr is left as it is, {tmp_path}/cache-2.zarr takes its place" in capsys.readouterr().err
    assert contents(tmp_path / "cache.zarr") == before
    assert sc.open_store(tmp_path / "cache-2.zarr").num_samples("train") == 9
    assert_sound(tmp_path / "cache-2.zarr")
    add(images, "train", "a")
    assert sc.extract(job, on_changed="new-store").path == str(tmp_path / "cache-2.zarr"), "which grows"
    (images / "train/red/c.png").unlink()
    assert sc.extract(job, on_changed="new-store").path == str(tmp_path / "cache-3.zarr")
    add(images, "train", "bc")
    (images / "train/blue/a.png").unlink()
    (images / "train/red/a.png").unlink()
    assert sc.extract(job, on_changed="new-store").path == str(tmp_path / "cache.zarr"), "as all is as it was"


def test_the_plan_counts_what_growth_extracts(config: Callable[..., Config], images: Path) -> None:
    job = config()
    sc.extract(job)
    assert JobFacts(job).rows_to_extract == 0
    add(images, "train", "a")
    assert JobFacts(job).rows_to_extract == sc.extract(job).samples_written == 4


def test_the_command_shows_what_changed_and_names_the_way_out(
    config: Callable[..., Config],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["sidecache", *arguments])
        status = 0
        try:
            sc.main()
        except SystemExit as done:
            status = int(done.code or 0)
        return status, capsys.readouterr().err

    file = str(tmp_path / "pipeline.yaml")
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(config().model_dump(mode="json")))
    assert command("extract", file)[0] == 0
    (images / "test/red/b.png").write_bytes((images / "test/red/c.png").read_bytes())
    status, err = command("extract", file)
    assert status == 2
    assert err.startswith(f"sidecache: the samples are no longer those that the store {tmp_path}/cache.zarr/ holds:\n")
    assert "\n  test: 1 ('test/red/b.png') changed\n" in err
    assert command("extract", file, "--on-changed", "fail") == (2, err)
    status, err = command("extract", file, "--on-changed", "new-store")
    assert status == 0
    assert err.splitlines()[0].endswith(f"set store.path={tmp_path}/cache-2.zarr")
    assert command("extract", file, "--on-changed", "maybe")[0] == 2
