"""A source's own validation split is listed with `train`, marked, and never used for testing."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from extract.config import ClipConfig, DataConfig
from extract.sources.open_source import ImageSource, open_source
from extract.sources.store_order import in_store_order
from store.errors import Note, UserError

SPLITS = ("train", "val", "test")
FILES = [f"{split}/{name}/{number}" for split in SPLITS for name in "ab" for number in "12"]


def open_at(source: str, root: Path | None, **options: Any) -> ImageSource:
    return open_source(DataConfig(source=source, root=root, **options))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(root: Path, names: Sequence[str]) -> Path:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


def write_table(path: Path, extension: str) -> None:
    lines = [f"{name}.{extension},{name.split('/')[1]},{name.split('/')[0]}\n" for name in FILES]
    path.write_text("path,label,split\n" + "".join(lines))


def write_tar(path: Path, split: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in (name for name in FILES if name.startswith(split)):
            key = name.partition("/")[2].replace("/", "")  # the same keys in every split
            for kind, content in (("png", png(FILES.index(name))), ("cls", key[0].encode())):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_folder(root: Path) -> tuple[str, Path]:
    return "folder", write_images(root, [f"{name}.png" for name in FILES])


def make_csv(root: Path) -> tuple[str, Path]:
    make_folder(root)
    write_table(root / "list.csv", "png")
    return "csv", root / "list.csv"


def make_parquet(root: Path) -> tuple[str, Path]:
    make_folder(root)
    columns = {
        "path": [f"{name}.png" for name in FILES],
        "label": [name.split("/")[1] for name in FILES],
        "split": [name.split("/")[0] for name in FILES],
    }
    pq.write_table(pa.table(columns), root / "list.parquet")
    return "parquet", root / "list.parquet"


def make_tars(root: Path) -> tuple[str, Path]:
    for split in SPLITS:
        write_tar(root / f"{split}-000000.tar", split)
    return "tars", root


def make_folders_of_tars(root: Path) -> tuple[str, Path]:
    for split in SPLITS:
        write_tar(root / split / "0.tar", split)
    return "tars", root


def make_video_folder(root: Path) -> tuple[str, Path]:
    write_images(root, [f"{name}.mp4" for name in FILES])  # listed, not decoded
    return "video_folder", root


def make_video_csv(root: Path) -> tuple[str, Path]:
    make_video_folder(root)
    write_table(root / "list.csv", "mp4")
    return "video_csv", root / "list.csv"


def make_torchvision(root: Path) -> tuple[str, Path]:
    folder_of = {"train": "train", "val": "valid", "test": "test"}
    names = [name.split("/") for name in FILES]
    classes = {"a": "negative", "b": "positive"}
    write_images(root, [f"rendered-sst2/{folder_of[s]}/{classes[c]}/{n}.png" for s, c, n in names])
    return "torchvision:RenderedSST2", root


MAKERS = [
    make_folder,
    make_csv,
    make_parquet,
    make_tars,
    make_folders_of_tars,
    make_video_folder,
    make_video_csv,
    make_torchvision,
]
Make = Callable[[Path], tuple[str, Path]]


@pytest.mark.parametrize("make", MAKERS)
def test_the_validation_split_follows_the_training_samples_and_is_marked(make: Make, tmp_path: Path) -> None:
    source = open_at(*make(tmp_path), val_split="val")  # without the warning of a split that is not used
    train, test = source.splits["train"], source.splits["test"]
    assert (source.val_split, source.drawn) == ("val", "")
    assert train.validation is not None
    assert train.validation.tolist() == [False] * 4 + [True] * 4
    assert train.labels.tolist() == [0, 0, 1, 1] * 2
    assert len(set(train.ids)) == 8
    assert test.validation is None
    assert len(test) == 4


@pytest.mark.parametrize("make", [maker for maker in MAKERS if maker is not make_torchvision])
@pytest.mark.filterwarnings("ignore:.*is used neither:store.errors.Note")
def test_the_split_is_that_of_the_source(make: Make, tmp_path: Path) -> None:
    own = open_at(*make(tmp_path), val_split="val").splits["train"]
    as_test = open_at(*make(tmp_path), test_split="val")
    validation = np.flatnonzero(own.validation)
    assert [own.digest(int(row)) for row in validation] == [as_test.splits["test"].digest(row) for row in range(4)]
    assert [own.digest(row) for row in range(4)] == [as_test.splits["train"].digest(row) for row in range(4)]


@pytest.mark.parametrize("make", [maker for maker in MAKERS if maker is not make_torchvision])
def test_without_the_option_nothing_is_marked_and_the_warning_offers_it(make: Make, tmp_path: Path) -> None:
    with pytest.warns(Note, match=r"val is used neither .* set data\.val_split to validate on them, or move them"):
        source = open_at(*make(tmp_path))
    assert (source.val_split, source.splits["train"].validation, len(source.splits["train"])) == ("", None, 4)


def test_every_view_of_a_video_is_marked(tmp_path: Path) -> None:
    kind, root = make_video_folder(tmp_path)
    source = open_at(kind, root, val_split="val", video=ClipConfig(clips=2, crops=3))
    assert source.splits["train"].validation is not None
    assert source.splits["train"].validation.tolist() == [False] * 24 + [True] * 24


def test_marks_follow_the_order_of_a_store(tmp_path: Path) -> None:
    source = open_at(*make_folder(tmp_path), val_split="val")
    stored = ["val/b/2.png", "train/a/1.png", "val/a/1.png"]
    train = in_store_order(source, {"train": stored}).splits["train"]
    assert train.validation is not None
    assert list(train.ids[:3]) == stored
    assert train.validation.tolist() == [name.startswith("val/") for name in train.ids]


@pytest.mark.parametrize("val_split", ["test", "val"])
def test_by_default_the_test_set_is_another_split(val_split: str, tmp_path: Path) -> None:
    kind, root = make_folder(tmp_path)
    source = open_at(kind, root, val_split=val_split)
    (expected,) = {"val", "test"} - {val_split}
    assert {name.split("/")[0] for name in source.splits["test"].ids} == {expected}


def test_if_no_other_split_is_left_the_test_set_is_drawn_from_train(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{number}.png" for split in ("train", "val") for name in "ab" for number in range(4)]
    source = open_at("folder", write_images(tmp_path, names), val_split="val", test_fraction=0.5)
    train, test = source.splits["train"], source.splits["test"]
    assert source.drawn
    assert len(test) == 4
    assert all(name.startswith("train/") for name in test.ids)
    assert [name for name in train.ids if name.startswith("val/")] == [
        name for name in names if name.startswith("val/")
    ]
    assert train.validation is not None
    assert train.validation.tolist() == [name.startswith("val/") for name in train.ids]


@pytest.mark.parametrize(
    ("make", "wanted", "message"),
    [
        (make_folder, "exam", r"data\.val_split is 'exam', but the splits of source folder at .* are test, train, val"),
        (make_csv, "train", r"data\.val_split is 'train', .*; name one other than train"),
        (make_tars, "exam", r"data\.val_split is 'exam', but the splits .* are test, train, val"),
        (
            make_torchvision,
            "exam",
            r"val_split is 'exam', which is not a validation split of .*RenderedSST2; name another",
        ),
        (make_torchvision, "train", r"val_split is 'train', which is not a validation split"),
    ],
)
def test_a_split_that_is_not_there_is_refused(make: Make, wanted: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_at(*make(tmp_path), val_split=wanted)


@pytest.mark.parametrize("source", ["digits", "folder", "torchvision:ImageFolder"])
def test_a_source_without_splits_has_none_to_validate_on(source: str, tmp_path: Path) -> None:
    root = None if source == "digits" else write_images(tmp_path, ["a/1.png", "b/1.png"])
    with pytest.raises(UserError, match=r"data\.val_split is 'val', but .* has no splits; remove val_split"):
        open_at(source, root, val_split="val")


def test_the_test_split_cannot_be_validated_on() -> None:
    with pytest.raises(ValueError, match=r"data\.val_split and data\.test_split are both 'val'; name two splits"):
        DataConfig(val_split="val", test_split="val")


def test_a_class_that_only_validation_has_is_refused(tmp_path: Path) -> None:
    kind, root = make_csv(tmp_path)
    text = root.read_text().replace("val/b/2.png,b,val", "val/b/2.png,c,val")
    root.write_text(text)
    with pytest.raises(UserError, match=r"the validation split of .* has classes that train lacks: c; known are a, b"):
        open_at(kind, root, val_split="val")
