"""Jobs with `data.val_split`: every feature source has the validation rows, and a store keeps them as it grows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.job.feature_set import open_features
from adapt.job.inputs import Inputs
from adapt.planning.job_facts import JobFacts
from adapt.training.row_draw import RowDraw, draw_rows
from sidecache.command_line import app
from store.errors import ChangedError, Note, OtherStoreError, UserError
from store.verify import verify_store

MakeConfig = Callable[..., Config]
VAL = "data.val_split=val"
CLASSES = ("blue", "green", "red")


def draw_image(file: Path, seed: list[int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(autouse=True)
def val_folder(image_folder: Path) -> Path:
    """A validation split of two images a class, beside 24 training and 12 test images."""
    for k, name in enumerate(CLASSES):
        for number in range(2):
            draw_image(image_folder / "val" / name / f"{number}.png", [k, number])
    return image_folder / "val"


def validation_ids(store: sc.Store) -> list[str]:
    rows = store.validation_rows()
    assert rows is not None
    ids = store.sample_ids("train")
    return [ids[row] for row in rows]


@pytest.mark.parametrize("source", ["resident", "streamed", "online"])
def test_every_feature_source_and_the_images_have_the_validation_rows(tiny_config: MakeConfig, source: str) -> None:
    config = tiny_config(VAL, f"train.feature_source={source}", "methods=[bitfit]")
    if source != "online":
        assert validation_ids(sc.extract(config).store) == [f"val/{name}/{k}.png" for name in CLASSES for k in "01"]
    opened = open_features(config, Inputs(config), lambda _: None)
    features, images = opened.pooled.features, opened.training_data(trains_backbone=True).images
    for inputs in (features, images):
        rows = inputs.validation_rows()
        assert rows is not None
        assert rows.tolist() == list(range(24, 30))
        assert inputs.labels("train")[torch.from_numpy(rows)].tolist() == [0, 0, 1, 1, 2, 2]
    for seed in (0, 1):
        draw = RowDraw.of(config)
        drawn = draw_rows(features.labels("train"), draw, seed=seed, validation_rows=features.validation_rows())
        assert [part.tolist() for part in drawn] == [list(range(24)), list(range(24, 30))]


def test_skipped_samples_are_in_no_feature_source(tiny_config: MakeConfig, val_folder: Path) -> None:
    (val_folder / "blue" / "1.png").write_bytes(b"no image")
    (val_folder.parent / "train" / "blue" / "3.png").write_bytes(b"no image")
    config = tiny_config(VAL, "data.on_error=skip", "methods=[bitfit]")
    store = sc.extract(config).store
    assert len(validation_ids(store)) == 5
    assert all(name.startswith("val/") for name in validation_ids(store))
    opened = open_features(config, Inputs(config), lambda _: None)
    streamed = StreamedFeatures(store, torch.device("cpu"))
    for inputs in (
        streamed,
        ResidentFeatures(streamed, [2]),
        opened.training_data(trains_backbone=True).images,
    ):
        rows = inputs.validation_rows()
        assert rows is not None
        assert rows.tolist() == list(range(23, 28))


@pytest.mark.parametrize(("stored", "wanted"), [(VAL, "data.val_split=null"), ("data.val_split=null", VAL)])
@pytest.mark.filterwarnings("ignore:.*val is used neither:store.errors.Note")
def test_a_store_with_another_val_split_is_refused(tiny_config: MakeConfig, stored: str, wanted: str) -> None:
    sc.extract(tiny_config(stored))
    with pytest.raises(OtherStoreError, match="val_split: stored"):
        sc.extract(tiny_config(wanted))
    with pytest.raises(OtherStoreError, match=r"data\.val_split: stored"):
        sc.train(tiny_config(wanted))


def test_growth_keeps_the_marks_and_adds_those_of_new_samples(
    tiny_config: MakeConfig, val_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(VAL)
    before = sc.extract(config).store
    draw_image(val_folder / "blue" / "0-new.png", [7, 0])
    draw_image(val_folder.parent / "train" / "red" / "0-new.png", [7, 1])
    grown = sc.extract(config)
    ids = grown.store.sample_ids("train")
    assert ids[:30] == before.sample_ids("train")
    assert set(ids[30:]) == {"val/blue/0-new.png", "train/red/0-new.png"}
    assert validation_ids(grown.store) == [name for name in ids if name.startswith("val/")]
    assert validation_ids(before) == validation_ids(grown.store)[:6]
    report = verify_store(tmp_path / "cache.zarr")
    assert (report.ok, report.complete, report.notes) == (True, True, [])
    assert sc.extract(config).shards_written == 0


def test_growth_by_layers_keeps_the_marks(tiny_config: MakeConfig) -> None:
    before = sc.extract(tiny_config(VAL, "store.layers=[2]")).store
    after = sc.extract(tiny_config(VAL)).store
    assert after.layers == (0, 1, 2)
    assert validation_ids(after) == validation_ids(before)


def test_a_sample_that_moves_into_validation_is_refused(tiny_config: MakeConfig, image_folder: Path) -> None:
    lines = [
        f"{f.relative_to(image_folder)},{f.parent.name},{f.parent.parent.name}" for f in image_folder.rglob("*.png")
    ]
    table = image_folder / "list.csv"
    table.write_text("\n".join(["path,label,split", *sorted(lines)]))
    config = tiny_config(VAL, "data.source=csv", f"data.root={table}")
    sc.extract(config)
    moved = table.read_text().replace("train/red/3.png,red,train", "train/red/3.png,red,val")
    table.write_text(moved)
    with pytest.raises(ChangedError, match=r"train: 1 \('train/red/3\.png'\) moved between training and validation"):
        sc.extract(config)


def test_an_own_source_without_validation_split_is_no_match(tiny_config: MakeConfig) -> None:
    pairs = [(Image.new("RGB", (32, 32), (k, 0, 0)), k % 2) for k in range(8)]
    source = sc.from_datasets({"train": pairs, "test": pairs[:2]}, classes=["a", "b"])
    config = tiny_config(VAL, "train.feature_source=online")
    features = open_features(config, Inputs(config, source), lambda _: None).pooled.features
    assert features.validation_rows() is None
    with pytest.raises(UserError, match=r"data\.val_split is set, but these samples have no validation split"):
        draw_rows(features.labels("train"), RowDraw.of(config), seed=0, validation_rows=features.validation_rows())


def test_classes_with_fewer_samples_than_shots_are_named(tiny_config: MakeConfig) -> None:
    config = tiny_config(VAL, "train.shots=5", "train.feature_source=online")
    root = config.data.root
    assert root is not None
    for number in range(5):
        (root / "train" / "green" / f"{number}.png").unlink()
    with pytest.warns(
        Note, match=r"train\.shots is 5, but there are fewer training samples of green \(3\); all of them"
    ):
        open_features(config, Inputs(config), lambda _: None)


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ((VAL,), 24),
        ((VAL, "train.refit=true"), 30),
        ((VAL, "train.shots=2"), 6),
        ((VAL, "train.fraction=0.5"), 12),
        ((VAL, "train.shots=1"), 3),
    ],
)
def test_a_plan_counts_the_rows_that_are_trained_on(
    tiny_config: MakeConfig, overrides: tuple[str, ...], rows: int
) -> None:
    config = tiny_config(*overrides)
    assert JobFacts(config).trained_rows == rows
    sc.extract(config)
    for file in (config.data.root or Path()).rglob("*.png"):
        file.unlink()  # the store alone tells them too
    assert JobFacts(config).trained_rows == rows


def test_inspect_counts_the_validation_samples(tiny_config: MakeConfig, tmp_path: Path) -> None:
    sc.extract(tiny_config(VAL))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "cache.zarr")], env={"COLUMNS": "200"}).output
    assert "30 samples (6 of them for validation)" in shown
    assert "val_split" in shown
