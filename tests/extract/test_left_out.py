"""Files of a source that are ignored are counted and named, and class names that look alike are reported."""

import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from extract.config import DataConfig
from extract.sources.open_source import ImageSource, open_source
from store.errors import Note, UserError


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


def classes_of(*classes: str) -> list[str]:
    return [f"{name}/{k}.png" for name in classes for k in range(4)]


def open_with_notes(source: str, root: Path, **options: Any) -> tuple[ImageSource, list[str]]:
    """The source and its warnings, without the place at their beginning."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        opened = open_source(DataConfig(source=source, root=root, **options))
    assert all(issubclass(note.category, Note) for note in notes)
    return opened, [str(note.message).removeprefix(f"{root}: ") for note in notes]


def size(source: ImageSource) -> int:
    return sum(map(len, source.splits.values()))


# Folders


def test_files_of_other_endings_in_a_class_are_counted_and_named(tmp_path: Path) -> None:
    others = ("IMG_1.CR3", "IMG_2.cr3", "IMG_3.dng", "noending", "1.txt", "1.json", "1.xml", "boxes.csv")
    root = write(tmp_path, *classes_of("a", "b"), *(f"b/{name}" for name in others))
    source, notes = open_with_notes("folder", root)
    assert size(source) == 8
    assert notes == [
        "ignored 8 files (extensions other than those of images): 2 with .cr3 ('b/IMG_1.CR3'), "
        "1 with .json ('b/1.json'), 1 with .txt ('b/1.txt'), 1 with .xml ('b/1.xml'), 1 with .dng ('b/IMG_3.dng'), ..."
    ]


@pytest.mark.parametrize("ending", ["JPG", "JPEG", "jfif", "jpe", "tif", "TIFF", "webp", "mpo", "bmp", "gif"])
def test_every_usual_ending_is_taken(ending: str, tmp_path: Path) -> None:
    source, notes = open_with_notes("folder", write(tmp_path, *classes_of("a", "b"), f"a/more.{ending}"))
    assert (size(source), notes) == (9, [])


@pytest.mark.parametrize(
    "dropping",
    [
        *("a/.DS_Store", "a/Thumbs.db", "a/desktop.ini", "a/._0.png", "a/@eaDir/0.png/THUMB_M.png", "__MACOSX/a/0.png"),
        *(".ipynb_checkpoints/0.png", "a/.ipynb_checkpoints/0-checkpoint.png", "lost+found/0.png", "@eaDir/a/0.png"),
    ],
)
def test_what_systems_leave_beside_data_is_neither_a_sample_nor_a_class(dropping: str, tmp_path: Path) -> None:
    source, notes = open_with_notes("folder", write(tmp_path, *classes_of("a", "b"), dropping))
    assert (source.classes, size(source), notes) == (("a", "b"), 8, [])


def test_images_beside_the_class_folders_are_counted(tmp_path: Path) -> None:
    paths = [f"{split}/{path}" for split in ("train", "test") for path in classes_of("a", "b")]
    root = write(tmp_path, *paths, "1.png", "train/2.png", "test/3.png", "train/README.md")
    source, notes = open_with_notes("folder", root)
    assert size(source) == 16
    assert notes == ["ignored 3 files (in no class folder): 3 with .png ('1.png')"]


@pytest.mark.parametrize("names", [("seg_train", "seg_test", "seg_pred"), ("train_images", "val_images", "extra")])
def test_folders_that_are_called_like_splits_are_not_taken_for_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{name}/{name}/{path}" for name in names for path in classes_of("sea", "street")))
    with pytest.raises(UserError, match=rf"has the splits .*{names[0]}.* but no 'train'; rename the one to train on"):
        open_with_notes("folder", root)


def test_classes_that_are_called_a_little_like_splits_are_classes(tmp_path: Path) -> None:
    root = write(tmp_path, *classes_of("train_station/x", "valley/x", "testament/x", "car/x"))
    assert open_with_notes("folder", root)[0].classes == ("car", "testament", "train_station", "valley")


@pytest.mark.parametrize("above", ["train/train", "train/images", "data", "data/train"])
def test_one_folder_too_many_is_named(above: str, tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{above}/{path}" for path in classes_of("sea", "street")))
    with pytest.raises(UserError, match=r"holds only the folder '\w+', which holds the folders .*: move these up into"):
        open_with_notes("folder", root)


def test_a_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    root = write(tmp_path, *classes_of("a", "b"), "c/IMG_1.CR3", "c/IMG_2.CR3")
    with pytest.raises(UserError, match=r"c holds no images; fill it or remove it .* Its files: 2 with \.cr3"):
        open_with_notes("folder", root)


def test_of_three_splits_the_note_says_which_is_what(tmp_path: Path) -> None:
    paths = [f"{split}/{path}" for split in ("train", "valid", "testing") for path in classes_of("a", "b")]
    _, notes = open_with_notes("folder", write(tmp_path, *paths))
    (note,) = notes
    assert "testing is used neither for training nor for testing; training uses train, testing uses valid" in note
    assert "set data.test_split for another" in note


# Tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(*keys: str) -> dict[str, bytes]:
    return {f"{key}.{kind}": content for key in keys for kind, content in (("png", png()), ("cls", key[-1:].encode()))}


FOUR = pairs("0", "1", "x0", "x1")


def test_a_key_of_a_tar_ends_at_the_first_dot_of_its_last_part(tmp_path: Path) -> None:
    members = {**FOUR, **pairs("v1.0/a.b/c0"), "v1.0/a.b/c0.depth.png": png(), "v1.0/a.b/c0.txt": b"a caption"}
    source, notes = open_with_notes("tars", write_tar(tmp_path / "x.tar", members))
    assert "v1.0/a.b/c0" in {*source.splits["train"].ids, *source.splits["test"].ids}
    assert (size(source), notes) == (5, [])


def test_members_of_a_tar_that_are_no_samples_are_counted(tmp_path: Path) -> None:
    members = {**FOUR, "photo.v2.png": png(), "photo.v2.cls": b"0", "README": b"?", "b.cr3": b"?"}
    source, notes = open_with_notes("tars", write_tar(tmp_path / "x.tar", members))
    assert size(source) == 4
    (note,) = notes
    assert note.startswith("ignored 4 files (no image and label with this name up to its first dot): ")
    for count in ("1 with .png ('photo.v2.png')", "1 with no extension ('README')", "1 with .cr3 ('b.cr3')"):
        assert count in note


@pytest.mark.parametrize(
    "dropping", ["__MACOSX/._0.png", "__MACOSX/0.png", "a/@eaDir/0.png/T.png", "a/._0.png", ".DS_Store"]
)
def test_droppings_in_a_tar_are_no_samples(dropping: str, tmp_path: Path) -> None:
    source, notes = open_with_notes("tars", write_tar(tmp_path / "x.tar", {**FOUR, dropping: png()}))
    assert (size(source), notes) == (4, [])


# Lists


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write(tmp_path / "set", *(f"{k}.png" for k in range(12)))


def write_labels(images: Path, kind: str, labels: list[Any]) -> Path:
    """Write a table with three images for each label."""
    rows = [(f"{k}.png", label) for k, label in enumerate(label for label in labels for _ in range(3))]
    path = images / f"l.{kind}"
    if kind == "csv":
        path.write_text("\ufeffpath,label\n" + "".join(f"{name},{label}\n" for name, label in rows), encoding="utf-8")
    else:
        pq.write_table(pa.table({"path": [name for name, _ in rows], "label": [label for _, label in rows]}), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_class_may_be_called_like_a_missing_value(kind: str, images: Path) -> None:
    source, notes = open_with_notes(kind, write_labels(images, kind, ["nan", "NA", "None", "null"]))
    assert (source.classes, notes) == (("NA", "None", "nan", "null"), [])


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("csv", "", "line 8: the label is empty"),
        ("csv", "  ", "line 8: the label is empty"),
        ("parquet", None, "row 7: the label is None"),
        ("parquet", "", "row 7: the label is empty"),
    ],
)
def test_a_missing_label_is_refused(kind: str, label: Any, message: str, images: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_with_notes(kind, write_labels(images, kind, ["a", "b", label]))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    "labels", [["01", "1"], ["1.0", "1"], ["Cat", "cat"], ["caf\u00e9", "cafe\u0301"], ["a  b", "a b"], ["\uff21", "A"]]
)
def test_classes_that_look_alike_stay_apart_with_a_note(kind: str, labels: list[str], images: Path) -> None:
    source, notes = open_with_notes(kind, write_labels(images, kind, [*labels, "other"]))
    assert set(source.classes) == {*labels, "other"}
    (note,) = notes
    assert "has classes whose names differ only in case, spaces, Unicode form or the way a number is written" in note
    assert all(ascii(label) in note for label in labels)
    assert note.isascii()


@pytest.mark.parametrize("labels", [["1", "10", "100"], ["0", "00a", "1.5", "15"], ["a.b", "ab"], [".0", "x"]])
def test_classes_that_differ_are_not_called_alike(labels: list[str], images: Path) -> None:
    assert open_with_notes("csv", write_labels(images, "csv", labels))[1] == []


def test_numbers_of_a_parquet_column_are_the_same_classes_as_in_a_csv(images: Path) -> None:
    of_parquet, _ = open_with_notes("parquet", write_labels(images, "parquet", [0, 2, 10]))
    of_csv, _ = open_with_notes("csv", write_labels(images, "csv", [0, 2, 10]))
    assert of_parquet.classes == of_csv.classes == ("0", "2", "10")


def test_folders_that_differ_only_in_a_space_are_noted(tmp_path: Path) -> None:
    source, notes = open_with_notes("folder", write(tmp_path, *classes_of("a", "a ", "b")))
    assert source.classes == ("a", "a ", "b")
    assert "'a' and 'a '" in notes[0]


@pytest.mark.parametrize(("sign", "shown"), [(";", "';'"), ("\t", r"'\\t'"), ("|", r"'\|'")])
def test_a_csv_of_another_separator_is_named(sign: str, shown: str, images: Path) -> None:
    (images / "l.csv").write_text(f"path{sign}label\n0.png{sign}a\n1.png{sign}b\n")
    with pytest.raises(UserError, match=rf"The file seems to be separated by {shown}; save it with commas"):
        open_with_notes("csv", images / "l.csv")
