"""Every source gives the same kind of splits, and every fault in a listing has a clear message."""

import doctest
import functools
import io
import json
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from extract.config import DataConfig
from extract.images.decode import DecodeError
from extract.sources import user_datasets
from extract.sources.open_source import ImageSource, open_source, order_classes
from extract.sources.samples import FileBytes, Sample
from extract.sources.splits import draw_test
from store.errors import JobError, Note, UserError

DATA = os.environ.get("SIDECACHE_DATA")


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(root: Path, *names: str) -> Path:
    """Write a file for each name, each with different pixels."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


def open_at(source: str, root: Path | None, **options: Any) -> ImageSource:
    return open_source(DataConfig(source=source, root=root, **options))


def ids(source: ImageSource) -> dict[str, list[str]]:
    return {name: list(split.ids) for name, split in source.splits.items()}


# --- all sources


def make_folder(root: Path) -> tuple[str, Path]:
    return "folder", write_images(
        root / "set", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in "12")
    )


def make_csv(root: Path) -> tuple[str, Path]:
    make_folder(root)
    lines = [f"{s}/{c}/{i}.png,{c},{s}" for s in ("train", "test") for c in "ab" for i in "12"]
    return "csv", write_list(root / "set/list.csv", "path,label,split", *lines)


def make_parquet(root: Path) -> tuple[str, Path]:
    make_folder(root)
    rows = [(s, c, i) for s in ("train", "test") for c in "ab" for i in "12"]
    columns = {"path": [f"{s}/{c}/{i}.png" for s, c, i in rows], "label": [c for _, c, _ in rows]}
    pq.write_table(pa.table({**columns, "split": [s for s, _, _ in rows]}), root / "set/list.parquet")
    return "parquet", root / "set/list.parquet"


def make_tars(root: Path) -> tuple[str, Path]:
    for split in ("train", "test"):
        members = {f"{c}{i}.{k}": v for c in "ab" for i in "12" for k, v in (("png", png(ord(c))), ("cls", c.encode()))}
        write_tar(root / f"set/{split}-000000.tar", members)
    return "tars", root / "set"


def make_imagefolder(root: Path) -> tuple[str, Path]:
    return "torchvision:imagefolder", write_images(root / "set", *(f"{c}/{i}.png" for c in "ab" for i in "1234"))


def make_digits(root: Path) -> tuple[str, None]:
    return "digits", None


MAKERS = [make_digits, make_folder, make_csv, make_parquet, make_tars, make_imagefolder]


@pytest.mark.parametrize("make", MAKERS)
def test_a_source_gives_a_train_and_a_test_split_of_rgb_images(make: Any, tmp_path: Path) -> None:
    source = open_at(*make(tmp_path))
    assert sorted(source.splits) == ["test", "train"]
    assert not source.multi_label
    for split in source.splits.values():
        assert isinstance(split, Dataset)
        assert len(split) == len(split.ids) == len(set(split.ids)) == len(split.labels) > 0
        assert split.labels.dtype == np.int64
        assert set(split.labels.tolist()) == set(range(len(source.classes)))
        image = split[len(split) - 1]
        assert image.mode == "RGB"
        assert len(split.digest(0)) == 16


def test_the_example_of_from_datasets_runs() -> None:
    results = doctest.testmod(user_datasets)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("make", MAKERS)
def test_a_second_opening_gives_the_same(make: Any, tmp_path: Path) -> None:
    kind, root = make(tmp_path)
    first, second = open_at(kind, root), open_at(kind, root)
    assert ids(first) == ids(second)
    for name in ("train", "test"):
        assert np.array_equal(first.splits[name].labels, second.splits[name].labels)
        assert first.splits[name].digest(1) == second.splits[name].digest(1)


@pytest.mark.parametrize("make", [*MAKERS, lambda root: ("torchvision:FakeData", None)])
def test_threads_and_workers_read_what_one_thread_reads(make: Any, tmp_path: Path) -> None:
    split = open_at(*make(tmp_path)).splits["train"]
    rows = list(range(min(len(split), 40))) * 4
    expected = [(split[row].tobytes(), split.digest(row)) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: (split[row].tobytes(), split.digest(row)), rows)) == expected
    copy = pickle.loads(pickle.dumps(split))
    assert copy[1].tobytes() == split[1].tobytes()
    assert copy.ids == split.ids


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_torch_data_loader_takes_a_split(tmp_path: Path) -> None:
    split = open_at(*make_folder(tmp_path)).splits["train"]
    loader = DataLoader(split, batch_size=2, num_workers=1, collate_fn=lambda images: [i.size for i in images])
    assert list(loader) == [[(4, 3), (4, 3)]] * 2


def test_the_digest_is_blake2b_of_the_encoded_bytes(tmp_path: Path) -> None:
    kind, root = make_folder(tmp_path)
    split = open_at(kind, root).splits["train"]
    assert split.digest(0) == blake2b((root / split.ids[0]).read_bytes(), digest_size=16).digest()


def test_a_damaged_image_is_named_by_its_id_and_spares_the_others(tmp_path: Path) -> None:
    kind, root = make_folder(tmp_path)
    (root / "train/a/1.png").write_bytes(png()[:40])
    split = open_at(kind, root).splits["train"]
    with pytest.raises(DecodeError, match=r"sample 'train/a/1\.png' cannot be decoded"):
        split[0]
    assert split[1].size == (4, 3)


def test_a_file_that_went_away_is_a_failure_and_no_damaged_sample(tmp_path: Path) -> None:
    kind, root = make_folder(tmp_path)
    split = open_at(kind, root).splits["train"]
    (root / "train/a/1.png").unlink()
    with pytest.raises(JobError, match=r"sample 'train/a/1\.png' cannot be read"):
        split[0]


@pytest.mark.parametrize("source", ["folder", "csv", "parquet", "tars", "torchvision:CIFAR10"])
def test_a_missing_root_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"source {source} requires data\.root"):
        open_at(source, None)
    with pytest.raises(UserError, match=r"data\.root .*/nowhere does not exist"):
        open_at(source, tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["folder", "torchvision:CIFAR10"])
def test_a_file_for_a_folder_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match=r"f is a file; source .* requires a folder"):
        open_at(source, tmp_path / "f")


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_a_folder_for_a_list_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; source .* requires the path of the table file"):
        open_at(source, tmp_path)


# --- choice of the test split


@pytest.mark.parametrize(
    ("splits", "wanted", "chosen"),
    [
        (("train", "test", "val"), None, "test"),
        (("train", "val"), None, "val"),
        (("train", "validation"), None, "validation"),
        (("train", "valid", "extra"), None, "valid"),
        (("train", "test", "extra"), "extra", "extra"),
    ],
)
def test_the_test_set_is_the_one_named_or_test_or_val(splits: Any, wanted: Any, chosen: str, tmp_path: Path) -> None:
    root = write_images(tmp_path, *(f"{s}/{c}/1.png" for s in splits for c in "ab"))
    unused = set(splits) - {"train", chosen}
    with (
        pytest.warns(Note, match=f": {unused.pop()} is used neither for training nor for testing")
        if unused
        else nullcontext()
    ):
        source = open_at("folder", root, test_split=wanted)
    assert ids(source) == {
        "train": ["train/a/1.png", "train/b/1.png"],
        "test": [f"{chosen}/a/1.png", f"{chosen}/b/1.png"],
    }


@pytest.mark.parametrize(
    ("splits", "wanted", "message"),
    [
        (("train", "test"), "exam", r"test_split is 'exam', but the splits of source folder at .* are test, train"),
        (("train", "test"), "train", r"test_split is 'train', .* name one other than train"),
        (("test", "val"), None, r"has the splits test, val but no 'train'; rename"),
        (("Training", "Testing"), None, r"has the splits Testing, Training but no 'train'; rename"),
        (("train", "extra"), None, r"are extra, train, none named test, val.*set data\.test_split"),
        (("x", "y"), "test", r"has no splits; remove test_split"),
    ],
)
def test_splits_that_leave_the_test_set_open_are_refused(
    splits: Any, wanted: Any, message: str, tmp_path: Path
) -> None:
    root = write_images(tmp_path, *(f"{s}/{c}/1.png" for s in splits for c in "ab"))
    with pytest.raises(UserError, match=message):
        open_at("folder", root, test_split=wanted)


@pytest.mark.parametrize("folder", ["", "train/"])
def test_without_a_test_set_a_fraction_of_every_class_is_drawn(folder: str, tmp_path: Path) -> None:
    root = write_images(tmp_path, *(f"{folder}{c}/{i:02}.png" for c in "ab" for i in range(20)))
    source = open_at("folder", root, test_fraction=0.3)
    assert np.bincount(source.splits["test"].labels).tolist() == [6, 6]
    assert np.bincount(source.splits["train"].labels).tolist() == [14, 14]
    assert not set(source.splits["train"].ids) & set(source.splits["test"].ids)


def test_a_drawn_test_set_that_is_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the test split of .* is empty.*test_fraction"):
        open_at("folder", write_images(tmp_path, "a/1.png", "b/1.png"))


def samples_of(labels: dict[str, tuple[str, ...]]) -> list[Sample]:
    return [Sample(name, several, FileBytes(b"")) for name, several in labels.items()]


names = st.text("abcdef0123456789/", min_size=1, max_size=8)
fractions = st.floats(0.01, 0.99)
singles = st.dictionaries(names, st.sampled_from("xyz").map(lambda c: (c,)), min_size=1, max_size=40)
several = st.dictionaries(names, st.sets(st.sampled_from("wxyz"), min_size=1).map(tuple), min_size=1, max_size=40)


@given(singles, fractions)
def test_the_draw_takes_its_fraction_of_each_class_and_leaves_one(labels: Any, fraction: float) -> None:
    chosen = draw_test(samples_of(labels), fraction, multi_label=False)
    for label in set(labels.values()):
        members = {name for name, own in labels.items() if own == label}
        drawn = len(members & chosen)
        assert drawn < len(members)
        assert drawn == len(members) - 1 or abs(drawn - len(members) * fraction) <= 0.5 + 1e-9


@given(singles, fractions, st.randoms())
def test_the_draw_heeds_neither_order_nor_other_classes(labels: Any, fraction: float, random: Any) -> None:
    samples = samples_of(labels)
    chosen = draw_test(samples, fraction, multi_label=False)
    random.shuffle(samples)
    assert draw_test(samples, fraction, multi_label=False) == chosen
    only_x = [sample for sample in samples if sample.labels == ("x",)]
    assert draw_test(only_x, fraction, multi_label=False) == chosen & {sample.id for sample in only_x}


@given(singles, names, fractions)
def test_one_more_sample_moves_at_most_one_other(labels: Any, new: str, fraction: float) -> None:
    before = draw_test(samples_of(labels), fraction, multi_label=False)
    after = draw_test(samples_of({**labels, new: labels.get(new, ("x",))}), fraction, multi_label=False)
    assert len((before ^ after) - {new}) <= 1


@given(several, fractions)
def test_a_multi_label_draw_leaves_every_class_a_training_sample(labels: Any, fraction: float) -> None:
    chosen = draw_test(samples_of(labels), fraction, multi_label=True)
    kept = {label for name, own in labels.items() if name not in chosen for label in own}
    assert kept == {label for own in labels.values() for label in own}


def test_the_draw_of_digits_never_changes() -> None:
    source = open_source(DataConfig())
    assert source.name == "digits"
    assert source.classes == tuple("0123456789")
    assert [len(source.splits[name]) for name in ("train", "test")] == [1346, 451]
    assert list(source.splits["test"].ids[:3]) == ["digits/0004", "digits/0012", "digits/0013"]
    assert np.asarray(source.splits["train"][0]).max() == 239  # 15 of 16
    assert source.splits["train"].digest(0).hex() == "1a18de79a29c29ff1e6b901998f9920a"


@given(st.lists(st.integers(0, 300), unique=True, min_size=1))
def test_integer_classes_are_ordered_by_number(numbers: list[int]) -> None:
    assert order_classes([str(n) for n in numbers]) == tuple(str(n) for n in sorted(numbers))


def test_classes_of_text_are_ordered_as_text() -> None:
    assert order_classes({"10", "9", "a"}) == ("10", "9", "a")
    assert order_classes({"10", "9", "09"}) == ("09", "10", "9")


# --- folder


def test_folders_are_read_deep_and_in_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    root = write_images(tmp_path, "b/2.PNG", "b/deep/er/1.png", "a/10.png", "a/9.png", "a/.x.png", ".git/y.png")
    (root / "a/notes.txt").write_text("no image")
    (root / "loose.png").write_bytes(png())
    (root / "a/.deep").mkdir()
    with pytest.warns(Note) as notes:
        source = open_at("folder", root, test_fraction=0.5)
    assert [str(note.message).partition(": ")[2] for note in notes] == [
        "ignored 1 file (extensions other than those of images): 1 with .txt ('a/notes.txt')",
        "ignored 1 file (in no class folder): 1 with .png ('loose.png')",
    ]
    assert sorted(i for split in ids(source).values() for i in split) == [
        "a/10.png",
        "a/9.png",
        "b/2.PNG",
        "b/deep/er/1.png",
    ]
    assert source.classes == ("a", "b")
    assert source.name == tmp_path.name


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    root = write_images(tmp_path, *(f"{c}/{i}.png" for c in ("car", "train") for i in range(4)))
    assert open_at("folder", root).classes == ("car", "train")


def test_class_folders_with_subfolders_alike_are_no_splits(tmp_path: Path) -> None:
    root = write_images(tmp_path, *(f"{c}/images/{i}.png" for c in ("n01", "n02") for i in range(4)))
    assert open_at("folder", root).classes == ("n01", "n02")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"holds no class folders; legal: <root>/train/<class>"),
        (("1.png",), "holds no class folders"),
        (("a/1.png", "b/notes.txt"), r"/b holds no images; fill it or remove it \(.*\)\. Its files: 1 with \.txt"),
        (("a/1.png", "a/2.png", "a/3.png"), r"has only one class, 'a'.*at least two"),
        (("train/a/1.png", "train/b/1.png", "test/c/1.png"), r"has classes that train lacks: c; known are a, b"),
        (("train/a/1.png", "train/b/1.png", "test/1.png"), r"test holds no class folders"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(names: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_at("folder", write_images(tmp_path, *names))


def test_links_are_followed_but_not_in_circles_or_to_nothing(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    write_images(tmp_path, "elsewhere/3.png")
    (root / "b/more").symlink_to(tmp_path / "elsewhere")
    assert "b/more/3.png" in {i for split in ids(open_at("folder", root, test_fraction=0.5)).values() for i in split}
    (root / "b/up").symlink_to(root / "b")
    with pytest.raises(UserError, match="links back to a folder above itself"):
        open_at("folder", root)
    (root / "b/up").unlink()
    (root / "b/gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"gone\.png is a broken link"):
        open_at("folder", root)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows file names that are not UTF-8")
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    root = write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png")
    (root / "b/3.png").rename(os.fsdecode(os.fsencode(root / "b") + b"/\xff.png"))
    with pytest.raises(UserError, match=r"is not valid UTF-8; rename the file"):
        open_at("folder", root)


@pytest.mark.skipif(DATA is None, reason="SIDECACHE_DATA is unset: the real images are not here")
@pytest.mark.parametrize(
    ("name", "n_classes", "n_train", "n_test"), [("rsscn7", 7, 420, 280), ("trashnet", 6, 479, 239)]
)
def test_real_folders_are_read_whole(name: str, n_classes: int, n_train: int, n_test: int) -> None:
    source = open_at("folder", Path(str(DATA)) / "images" / name)
    assert (source.name, len(source.classes)) == (name, n_classes)
    assert {k: len(split) for k, split in source.splits.items()} == {"train": n_train, "test": n_test}
    for split in source.splits.values():
        assert all(split[row].width == 256 or split[row].height == 256 for row in range(0, len(split), 40))


# --- csv and parquet


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", *(f"{i}.png" for i in range(12)))


def test_a_csv_without_splits_is_drawn_from(images: Path) -> None:
    lines = [f"{i}.png,{'cat' if i % 2 else 'dog'},x" for i in range(12)]
    path = write_list(images / "l.csv", "\ufeffpath, label,comment", *lines, "")
    source = open_at("csv", path)
    assert source.name == "set-l"
    assert source.classes == ("cat", "dog")
    assert [len(source.splits[name]) for name in ("train", "test")] == [8, 4]


def test_integer_labels_of_a_list_are_their_own_index(images: Path) -> None:
    path = write_list(
        images / "l.csv", "path,label,split", *(f"{i}.png,{i},train" for i in range(11)), "11.png,10,test"
    )
    source = open_at("csv", path)
    assert source.splits["train"].labels.tolist() == list(range(11))
    assert source.splits["test"].labels.tolist() == [10]


@pytest.mark.parametrize("kind", ["csv", "text", "list"])
def test_several_labels_become_a_matrix(kind: str, images: Path) -> None:
    labels = [["b", "a"], ["c"], ["a"], ["c", "c", "b"]]
    files, splits = [f"{i}.png" for i in range(4)], ["train", "train", "test", "test"]
    path = images / f"l.{'csv' if kind == 'csv' else 'parquet'}"
    if kind == "csv":
        lines = zip(files, labels, splits, strict=True)
        write_list(path, "path,labels,split", *(f"{f},{'|'.join(own)},{s}" for f, own, s in lines))
    else:
        column = labels if kind == "list" else ["|".join(own) for own in labels]
        pq.write_table(pa.table({"path": files, "labels": column, "split": splits}), path)
    source = open_at(path.suffix[1:], path)
    assert source.multi_label
    assert source.classes == ("a", "b", "c")
    assert source.splits["train"].labels.dtype == np.uint8
    assert source.splits["train"].labels.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert source.splits["test"].labels.tolist() == [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), r"l\.csv is empty; legal: path, then label or labels"),
        (("path,label",), r"l\.csv lists no samples"),
        (("file,label", "0.png,a"), r"columns of .*l\.csv are file, label; legal: path"),
        (("path", "0.png"), r"columns of .* are path; legal: path, then label or labels"),
        (("path,label,labels", "0.png,a,a"), r"both label and labels; keep one"),
        (("path,label,label", "0.png,a,a"), r"one occurs twice"),
        (("path,label", "0.png,a", "1.png"), r"line 3 has 1 cells, but the header has 2 \(path, label\)"),
        (("path,label", "0.png,a", "1.png,a,b"), r"line 3 has 3 cells"),
        (("path,label", "0.png,a", "", "99.png,a"), r"line 4: the file '99\.png' does not exist in .*set"),
        (("path,label", ",a"), r"line 2: path is ''; legal: a file"),
        (("path,label", "0.png,"), r"line 2: the label is empty"),
        (("path,label", "0.png,-1"), r"line 2: the label is -1; integer labels start at 0"),
        (("path,labels", "0.png,a|"), r"line 2: the label is empty"),
        (("path,labels", "0.png,"), r"line 2: the label is empty"),
        (("path,label,split", "0.png,a,"), r"line 2: split is ''; legal: a name"),
        (("path,label,split", "0.png,a,test"), r"has the splits test but no 'train'"),
        (("path,label", "0.png,a", "./0.png,b"), r"line 3 names '0\.png', as does .*line 2"),
        (("path,label", "0.png,a", "1.png,a"), r"only one class, 'a'"),
        (("path,label,split", "0.png,a,train", "1.png,b,train", "2.png,c,test"), r"classes that train lacks: c"),
        (("path,label", '"0.png,a'), r"line 2 is not valid CSV: unexpected end of data"),
    ],
)
def test_a_faulty_csv_is_refused_by_line(lines: Any, message: str, images: Path) -> None:
    path = write_list(images / "l.csv", *lines)
    with pytest.raises(UserError, match=message):
        open_at("csv", path)


def test_a_csv_of_other_bytes_than_utf8_is_refused(images: Path) -> None:
    (images / "l.csv").write_bytes(b"path,label\n0.png,caf\xe9\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text .* at byte 20"):
        open_at("csv", images / "l.csv")


@pytest.mark.parametrize("way", ["../secret.png", "deep/../../secret.png", "ABSOLUTE", "link.png", "linked/secret.png"])
def test_a_path_out_of_the_lists_folder_is_refused(way: str, images: Path) -> None:
    secret = images.parent / "secret.png"
    secret.write_bytes(png())
    (images / "deep").mkdir()
    (images / "link.png").symlink_to(secret)
    (images / "linked").symlink_to(images.parent)
    path = write_list(images / "l.csv", "path,label", f"{secret if way == 'ABSOLUTE' else way},a")
    with pytest.raises(UserError, match=r"line 2: the path '.*' leads out of the table's folder"):
        open_at("csv", path)


def test_an_absolute_path_and_dots_within_the_folder_are_fine(images: Path) -> None:
    (images / "deep").mkdir()
    lines = (f"{images / '0.png'},a,train", "deep/../1.png,b,train", "2.png,a,test")
    source = open_at("csv", write_list(images / "l.csv", "path,label,split", *lines))
    assert ids(source) == {"train": ["0.png", "1.png"], "test": ["2.png"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"path": ["0.png", "1.png"], "label": ["a", None]},
            r"row 2: the label is None; legal: text or an integer",
        ),
        ({"path": ["0.png", "1.png"], "label": [0.0, 1.0]}, r"row 1: the label is 0\.0"),
        ({"path": ["0.png", "1.png"], "label": [0, -3]}, r"row 2: the label is -3; integer labels start at 0"),
        ({"path": ["0.png", None], "label": [0, 1]}, r"row 2: path is None"),
        ({"path": ["0.png", "1.png"], "labels": [["a"], []]}, r"row 2: labels is \[\]; legal: one or more"),
        ({"path": ["0.png", "1.png"]}, r"legal: path, then label or labels"),
    ],
)
def test_a_faulty_parquet_is_refused_by_row(columns: Any, message: str, images: Path) -> None:
    pq.write_table(pa.table(columns), images / "l.parquet")
    with pytest.raises(UserError, match=message):
        open_at("parquet", images / "l.parquet")


def test_a_file_that_is_no_parquet_is_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"0\.png cannot be read as a Parquet file"):
        open_at("parquet", images / "0.png")


# --- tars


def write_tar(path: Path, members: dict[str, Any], mode: str = "w") -> Path:
    """A member is bytes, or a TarInfo without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def pair(key: str, label: Any, value: int = 0) -> dict[str, Any]:
    return {f"{key}.png": png(value), f"{key}.cls": str(label).encode()}


FOUR = {**pair("0", 0), **pair("1", 1), **pair("2", 0), **pair("3", 1)}


@pytest.mark.parametrize(
    "shards",
    [
        ("train-000000.tar", "test-000000.tar"),
        ("train.tar", "test.tar"),
        ("flowers-train-000.tar", "flowers-test-000.tar"),
        ("train/a.tar", "test/a.tar"),
    ],
)
def test_shards_name_their_split(shards: Any, tmp_path: Path) -> None:
    for number, name in enumerate(shards):
        write_tar(tmp_path / name, {**pair(f"x/{number}a", 0), **pair(f"x/{number}b", 1)})
    assert ids(open_at("tars", tmp_path)) == {"train": ["x/0a", "x/0b"], "test": ["x/1a", "x/1b"]}


def test_shards_without_splits_and_a_single_tar_are_drawn_from(tmp_path: Path) -> None:
    many = [write_tar(tmp_path / f"many/{i:06}.tar", {**pair(f"{i}a", 0), **pair(f"{i}b", 1)}) for i in range(4)]
    source = open_at("tars", tmp_path / "many")
    assert sorted(i for split in ids(source).values() for i in split) == [
        "0a",
        "0b",
        "1a",
        "1b",
        "2a",
        "2b",
        "3a",
        "3b",
    ]
    assert source.name == "many"
    single = write_tar(tmp_path / "one.tar", FOUR)
    assert open_at("tars", single, test_fraction=0.5).name == "one"
    assert len(many) == 4


def test_members_are_grouped_up_to_the_first_dot_and_read_at_their_offset(tmp_path: Path) -> None:
    members: dict[str, Any] = {"./README": b"hello", "info.json": b"{}", "._a.png": b"junk"}
    for i in range(12):
        members |= {
            f"./d.x/{i}.extra.txt": b"?",
            f"./d.x/{i}.PNG": png(i),
            f"./d.x/{i}.json": json.dumps({"label": i}).encode(),
        }
    train = write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "test-0.tar", pair("t", 11))
    with pytest.warns(
        Note, match=r"ignored 2 files \(.*\): 1 with no extension \('README'\), 1 with \.json \('info\.json'\)"
    ):
        split = open_at("tars", tmp_path).splits["train"]
    assert list(split.ids) == [f"d.x/{i}" for i in range(12)]
    assert split.labels.tolist() == list(range(12))
    assert [np.asarray(split[row])[0, 0, 0] for row in (11, 3, 0)] == [11, 3, 0]
    assert split.digest(5) == blake2b(png(5), digest_size=16).digest()
    train.write_bytes(train.read_bytes()[:2048])
    with pytest.raises(JobError, match=r"sample 'd\.x/11': .* is shorter than when it was listed"):
        split[11]


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"hold no samples; legal: an image such as 000\.jpg"),
        ({"a.png": png()}, r"the sample 'a' of .* has no label; .*use source folder"),
        ({"a.cls": b"0"}, r"the sample 'a' of .* has 0 images \(cls\)"),
        ({"a.png": png(), "a.jpg": png(), "a.cls": b"0"}, r"has 2 images \(png, jpg, cls\)"),
        ({"a.png": png(), "a.cls": b" "}, r"the sample 'a' of .*: the label is empty"),
        ({"a.png": png(), "a.cls": b"-1"}, r"the label is -1; integer labels start at 0"),
        ({"a.png": png(), "a.json": b"{"}, r"the sample 'a' of .* has no readable label in its \.json"),
        ({"a.png": png(), "a.json": b"{}"}, r"KeyError\('label'\)"),
        ({"a.png": png(), "a.json": b"[1]"}, "TypeError"),
        ({"a.png": png(), "a.json": b'{"label": true}'}, r"the label is True; legal: text or an integer"),
        ({"/a.png": png()}, r"holds '/a\.png', which leads out of the archive"),
        ({"b/../../a.png": png()}, r"holds 'b/\.\./\.\./a\.png', which leads out"),
        ({"a.png": link(tarfile.SYMTYPE)}, r"holds 'a\.png', a link, device or sparse file"),
        ({"a.png": link(tarfile.LNKTYPE)}, "a link, device or sparse file"),
        ({"a.png": link(tarfile.CHRTYPE)}, "a link, device or sparse file"),
        ({"a.png": png(), "a.PNG": png()}, r"holds 'a\.PNG' twice"),
        ({**pair("a", 0), **pair("b", 0), **pair("c", 0)}, r"only one class, '0'"),
    ],
)
def test_a_faulty_tar_is_refused(members: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_at("tars", write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_compressed_tar_is_refused(mode: str, ending: str, tmp_path: Path) -> None:
    write_tar(tmp_path / f"x{ending}", FOUR, mode)
    with pytest.raises(UserError, match=r"is compressed, so its members .*; unpack it to a plain \.tar"):
        open_at("tars", tmp_path)


@pytest.mark.parametrize("cut", [512, 600, 700, 1024, 1536, 2048])
def test_a_tar_cut_short_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FOUR)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"truncated|cannot be read as a tar"):
        open_at("tars", path)


def test_a_damaged_header_or_a_second_archive_does_not_hide_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FOUR)
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + b"\x07" * 300 + whole[2348:])
    with pytest.raises(UserError, match="is damaged or continues after its end mark at byte 2048"):
        open_at("tars", path)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="continues after its end mark"):
        open_at("tars", path)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(png())
    with pytest.raises(UserError, match=r"x\.tar cannot be read as a tar"):
        open_at("tars", tmp_path)


def test_folders_of_tars_are_sound_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tars; legal: train-000000\.tar"):
        open_at("tars", tmp_path)
    write_tar(tmp_path / "a/0.tar", FOUR)
    with pytest.raises(UserError, match="has the splits a but no 'train'"):
        open_at("tars", tmp_path)
    write_tar(tmp_path / "0.tar", FOUR)
    with pytest.raises(UserError, match="holds tars beside folders of tars"):
        open_at("tars", tmp_path)


def test_a_key_in_two_shards_of_a_split_is_refused_but_not_in_two_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", FOUR)
    write_tar(tmp_path / "test-0.tar", FOUR)
    assert ids(open_at("tars", tmp_path)) == {"train": ["0", "1", "2", "3"], "test": ["0", "1", "2", "3"]}
    write_tar(tmp_path / "train-1.tar", FOUR)
    with pytest.raises(UserError, match=r"the sample '0' of .*train-1\.tar is also in another shard"):
        open_at("tars", tmp_path)


# --- torchvision


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A CIFAR-10 of 20 + 10 images in torchvision's own files."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    classes = [f"c{9 - k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None], ["data_batch_2", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    return pixels


@pytest.mark.parametrize("name", ["CIFAR10", "cifar10"])
def test_a_torchvision_set_with_train_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    source = open_at(f"torchvision:{name}", tmp_path)
    assert source.name == "cifar10"
    assert source.classes == tuple(f"c{9 - k}" for k in range(10))  # in the order of the data set
    assert [len(source.splits[s]) for s in ("train", "test")] == [20, 10]
    assert source.splits["train"].ids[3] == "cifar10/train/0000003"
    assert source.splits["test"].labels.tolist() == list(range(10))
    expected = pixels[4].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(source.splits["test"][4]), expected)
    digest = blake2b(b"RGB 32 32 " + expected.tobytes(), digest_size=16).digest()
    assert source.splits["test"].digest(4) == digest
    with pytest.raises(
        UserError, match=r"test_split is 'val', which is not a test split of torchvision\.datasets\.CIFAR10"
    ):
        open_at("torchvision:CIFAR10", tmp_path, test_split="val")


def write_dtd(root: Path) -> Path:
    """Write a DTD of 2 classes, a data set that has an argument for the split and takes a loader."""
    write_images(root / "dtd/dtd/images", *(f"{c}/{i}.jpg" for c in ("x", "y") for i in range(3)))
    (root / "dtd/dtd/labels").mkdir()
    for i, split in enumerate(("train", "val", "test")):
        write_list(root / f"dtd/dtd/labels/{split}1.txt", f"x/{i}.jpg", f"y/{i}.jpg")
    return root


@pytest.mark.parametrize(("wanted", "red"), [(None, 2), ("val", 1)])
def test_a_torchvision_set_with_split_is_read(wanted: str | None, red: int, tmp_path: Path) -> None:
    source = open_at("torchvision:dtd", write_dtd(tmp_path), test_split=wanted)
    assert source.classes == ("x", "y")
    assert np.asarray(source.splits["test"][0])[0, 0, 0] == red


def test_a_torchvision_set_reads_16_bits_and_damage_as_the_other_sources_do(tmp_path: Path) -> None:
    root = write_dtd(tmp_path)
    Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16)).save(root / "dtd/dtd/images/x/0.jpg", "PNG")
    (root / "dtd/dtd/images/y/0.jpg").write_bytes(b"junk")
    split = open_at("torchvision:DTD", root).splits["train"]
    assert (np.asarray(split[0]) == 128).all()
    with pytest.raises(DecodeError, match="not an image in a known format"):
        split[1]


def test_a_torchvision_set_without_splits_is_drawn_from() -> None:
    source = open_source(DataConfig(source="torchvision:FakeData"))
    assert [len(source.splits[s]) for s in ("train", "test")] == [750, 250]
    assert source.classes == tuple("0123456789")
    with pytest.raises(UserError, match=r"source torchvision:FakeData has no splits; remove test_split"):
        open_source(DataConfig(source="torchvision:FakeData", test_split="test"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", r"no data set 'CIFAR11'; legal: the classes of torchvision.datasets; did you mean 'CIFAR10'"),
        ("qqqqqq", r"no data set 'qqqqqq'; legal: the classes"),
        ("CIFAR10", r"download it with: python -c .*CIFAR10\(root='.*', train=True, download=True\)"),
        ("flowers102", r"Flowers102\(root='.*', split='train', download=True\)"),
        ("ImageNet", r"ImageNet cannot be read from .* put its files there as torchvision's documentation"),
        ("CocoDetection", r"requires annFile, which data: has no keys for"),
        ("VOCDetection", r"VOCDetection cannot be read from"),
    ],
)
def test_a_torchvision_set_that_cannot_be_had_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_at(f"torchvision:{name}", tmp_path)


def put_targets(targets: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace CIFAR-10's targets by `targets`, repeated."""
    build = datasets.CIFAR10.__init__

    def build_with_other_targets(self: Any, *args: Any, train: bool = True, **kwargs: Any) -> None:
        build(self, *args, train=train, **kwargs)
        self.targets = targets * (len(self.data) // 2)

    # functools.wraps keeps the signature, which the source inspects
    monkeypatch.setattr(datasets.CIFAR10, "__init__", functools.wraps(build)(build_with_other_targets))


def test_torchvision_targets_of_zeros_and_ones_are_several_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path, monkeypatch)
    put_targets([[0, 1] * 5, [1, 0] * 5], monkeypatch)
    source = open_at("torchvision:CIFAR10", tmp_path)
    assert source.multi_label
    assert source.splits["test"].labels.tolist() == [[0, 1] * 5, [1, 0] * 5] * 5


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["a caption", "another"], "has no class labels; use one for classification"),
        ([None, None], "has no class labels"),
        ([-1, 0], "has the label -1: unlabeled"),
    ],
)
def test_torchvision_targets_that_are_no_classes_are_refused(
    targets: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path, monkeypatch)
    put_targets(targets, monkeypatch)
    with pytest.raises(UserError, match=message):
        open_at("torchvision:CIFAR10", tmp_path)
