"""Video sources work as image sources do, with rows for views, parts of files, and a choice of the label column."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_vit import TINY
from torch.utils.data import DataLoader, Dataset
from video_files import write_video

from extract.backbones.backbone import load_backbone
from extract.config import BackboneConfig, ClipConfig, DataConfig, ExtractConfig
from extract.images.decode import DecodeError
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import ImageSource, open_source
from extract.sources.samples import FileBytes, Sample
from extract.sources.splits import draw_test
from extract.video.containers import EXTENSIONS
from store.config import StoreConfig
from store.errors import JobError, Note, UserError


def open_at(source: str, root: Path, **options: Any) -> ImageSource:
    return open_source(DataConfig(source=source, root=root, **options))


def ids(source: ImageSource) -> dict[str, list[str]]:
    return {name: list(split.ids) for name, split in source.splits.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """100 frames of 64 x 48 pixels, 4 seconds long."""
    return write_video(tmp_path_factory.mktemp("clip") / "v.mp4", 100).read_bytes()


@pytest.fixture
def put(tmp_path: Path, clip: bytes) -> Callable[..., Path]:
    """Write files that are all copies of the clip."""

    def write(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(clip)
        return tmp_path

    return write


FOLDERS = tuple(f"{split}/{name}/{k}.mp4" for split in ("train", "test") for name in "ab" for k in "12")


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# --- folders


def test_a_folder_of_videos_gives_two_splits_of_clips(put: Any) -> None:
    with pytest.warns(Note, match=r"extensions other than those of videos\): 1 with \.txt \('train/a/notes\.txt'\)"):
        source = open_at("video_folder", put(*FOLDERS, "train/a/deep/3.WEBM", "train/a/notes.txt"))
    assert source.classes == ("a", "b")
    assert (source.views, not source.multi_label) == (1, True)
    assert ids(source)["train"] == ["train/a/1.mp4", "train/a/2.mp4", "train/a/deep/3.WEBM", *ids(source)["train"][3:]]
    for split in source.splits.values():
        assert isinstance(split, Dataset)
        clip = split[1]
        assert isinstance(clip, tuple)
        assert [(frame.mode, frame.size) for frame in clip] == [("RGB", (64, 48))] * 8
        assert split.digest(1) == split.digest(0)  # the same bytes


def test_folders_without_splits_are_drawn_from(put: Any) -> None:
    source = open_at("video_folder", put(*(f"{name}/{k}.mkv" for name in "ab" for k in range(8))), test_fraction=0.25)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 12, "test": 4}


def test_a_folder_of_images_is_no_folder_of_videos(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a/1.gif")
    with pytest.raises(
        UserError, match=r"the class folder .*/a holds no videos; .*\(extensions: \.3gp \.avi .*\.wmv\)"
    ):
        open_at("video_folder", tmp_path)
    with pytest.raises(UserError, match=r"legal: <root>/train/<class>/<videos>"):
        open_at("video_folder", tmp_path / "a")
    assert ".gif" not in EXTENSIONS


def test_a_pipe_among_the_videos_is_refused(put: Any) -> None:
    root = put(*FOLDERS)
    os.mkfifo(root / "train/a/pipe.mp4")
    with pytest.raises(UserError, match=r"pipe\.mp4 is a broken link or no regular file"):
        open_at("video_folder", root)


# --- views


def test_every_video_gives_its_views_one_after_the_other(put: Any) -> None:
    source = open_at("video_folder", put(*FOLDERS), video=ClipConfig(frames=2, clips=2, crops=3))
    assert source.views == 6
    split = source.splits["train"]
    assert split.ids[:7] == (*(f"train/a/1.mp4#{view}" for view in range(6)), "train/a/2.mp4#0")
    assert split.labels.tolist() == [0] * 12 + [1] * 12
    with ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(split.__getitem__, range(12)))
    assert {frame.size for clip in clips for frame in clip} == {(48, 48)}
    assert len({tuple(frame.tobytes() for frame in clip) for clip in clips}) == 6  # both videos are the same
    assert len({split.digest(row) for row in range(12)}) == 1


def test_views_of_one_video_are_never_divided_between_the_splits(put: Any) -> None:
    root = put(*(f"{name}/{k}.mp4" for name in "ab" for k in range(8)))
    whole = open_at("video_folder", root)
    source = open_at("video_folder", root, video=ClipConfig(clips=3))
    for name, split in source.splits.items():
        assert list(split.ids) == [f"{video}#{view}" for video in whole.splits[name].ids for view in range(3)]


def test_the_sampling_names_all_that_decides_a_view_and_nothing_else(put: Any) -> None:
    root = put(*FOLDERS)

    def sampling(**clips: Any) -> str:
        return open_at("video_folder", root, video=ClipConfig(**clips)).sampling

    assert sampling() == '{"clips": 1, "crops": 1, "frames": 8, "stride": null, "version": 2}'
    assert sampling(time_limit=1.0) == sampling()
    assert len({sampling(), sampling(frames=4), sampling(stride=2), sampling(clips=2), sampling(crops=3)}) == 5
    assert open_source(DataConfig()).sampling == ""
    assert open_source(DataConfig()).views == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_torch_data_loader_takes_a_split_of_videos(put: Any) -> None:
    split = open_at("video_folder", put(*FOLDERS), video=ClipConfig(frames=2)).splits["train"]
    expected = np.asarray(split[0][1]).mean()
    loader = DataLoader(
        split, batch_size=2, num_workers=2, collate_fn=lambda clips: [np.asarray(c[1]).mean() for c in clips]
    )
    assert list(loader) == [[expected] * 2] * 2


# --- lists


def test_a_list_of_videos_names_parts_of_files(put: Any) -> None:
    root = put("a.mp4", "b/c.mp4")
    lines = ("a.mp4,0,1,x", "a.mp4,1,2.5,y", "a.mp4,2.5,,x", "b/c.mp4,,3,y", "b/c.mp4,,,x", "a.mp4,1.25,1.5,y")
    path = write_list(root / "l.csv", "path,start,end,label", *lines)
    source = open_at("video_csv", path, test_fraction=0.34, video=ClipConfig(frames=1))
    rows = {sample: (split, row) for split in source.splits.values() for row, sample in enumerate(split.ids)}
    named = ["a.mp4#0-1", "a.mp4#1-2.5", "a.mp4#2.5-", "b/c.mp4#-3", "b/c.mp4", "a.mp4#1.25-1.5"]
    assert sorted(rows) == sorted(named)
    frames = {name: split[row][0].tobytes() for name, (split, row) in rows.items()}
    assert frames["b/c.mp4"] != frames["b/c.mp4#-3"]
    digests = {name: split.digest(row) for name, (split, row) in rows.items()}
    assert len(set(digests.values())) == len(named)
    assert digests["b/c.mp4"] == blake2b((root / "a.mp4").read_bytes(), digest_size=16).digest()


def test_views_of_a_part_are_numbered_after_it(put: Any) -> None:
    path = write_list(
        put("a.mp4") / "l.csv",
        "path,start,end,label,split",
        "a.mp4,0,1,x,train",
        "a.mp4,1,2,y,train",
        "a.mp4,2,3,x,test",
    )
    source = open_at("video_csv", path, video=ClipConfig(clips=2))
    assert ids(source)["test"] == ["a.mp4#2-3#0", "a.mp4#2-3#1"]
    message = r"sample 'a\.mp4#9-' cannot be decoded: it is 4 s long, but its part starts at 9 s"
    write_list(path, "path,start,label,split", "a.mp4,0,x,train", "a.mp4,1,y,train", "a.mp4,9,x,test")
    with pytest.raises(DecodeError, match=message):
        open_at("video_csv", path, video=ClipConfig(clips=2)).splits["test"][1]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("a.mp4,x,2,c", r"line 2: start is 'x'; legal: seconds from 0 on, such as 12\.5, or an empty cell"),
        ("a.mp4,-1,2,c", "start is '-1'"),
        ("a.mp4,0,inf,c", "end is 'inf'"),
        ("a.mp4,nan,,c", "start is 'nan'"),
        ("a.mp4,3,2.5,c", r"end is 2\.5, not after start, 3; correct the line"),
        ("a.mp4,,0,c", "end is 0, not after start, 0"),
        ("nowhere.mp4,,,c", "the file 'nowhere.mp4' does not exist"),
    ],
)
def test_lines_that_name_no_part_of_a_video_are_refused(cells: str, message: str, put: Any) -> None:
    path = write_list(put("a.mp4") / "l.csv", "path,start,end,label", cells)
    with pytest.raises(UserError, match=message):
        open_at("video_csv", path)


def test_the_same_part_twice_is_refused(put: Any) -> None:
    path = write_list(put("a.mp4") / "l.csv", "path,start,end,label", "a.mp4,1,2,c", "a.mp4,1.0,2.00,d")
    with pytest.raises(UserError, match=r"line 3 names 'a\.mp4#1-2', as does .*line 2"):
        open_at("video_csv", path)


def test_the_label_may_stand_in_a_column_of_another_name(tmp_path: Path) -> None:
    for k in range(4):
        Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / f"{k}.png")
    rows = [(f"{k}.png", "xy"[k % 2], "no class", ("train", "test")[k // 2]) for k in range(4)]
    write_list(tmp_path / "l.csv", "path,class,label,split", *(",".join(row) for row in rows))
    columns = dict(zip(("path", "class", "label", "split"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    for source in ("csv", "parquet"):
        opened = open_at(source, tmp_path / f"l.{source}", label_column="class")
        assert opened.classes == ("x", "y")
        with pytest.raises(
            UserError, match=r"legal: path, then species or labels .*data\.label_column names the column"
        ):
            open_at(source, tmp_path / f"l.{source}", label_column="species")
        with pytest.raises(UserError, match=r"data\.label_column is 'split', which has another meaning"):
            open_at(source, tmp_path / f"l.{source}", label_column="split")


def test_a_label_column_beside_labels_is_refused(tmp_path: Path) -> None:
    path = write_list(tmp_path / "l.csv", "path,class,labels", "x,y,z")
    with pytest.raises(UserError, match="both class and labels; keep one of them"):
        open_at("csv", path, label_column="class")


# --- all sources


def test_the_split_seed_draws_another_test_set_and_seed_zero_the_one_of_old() -> None:
    drawn = [open_source(DataConfig(split_seed=seed)).splits["test"].ids for seed in (0, 1, 2, 1)]
    assert list(drawn[0][:3]) == ["digits/0004", "digits/0012", "digits/0013"]
    assert drawn[1] == drawn[3]
    assert len(set(drawn)) == 3
    assert {len(ids) for ids in drawn} == {451}


def test_without_pyav_a_source_of_videos_is_refused_at_once(put: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"video needs PyAV; install it with: pip install 'sidecache\[video\]'"):
        open_at("video_folder", put(*FOLDERS))


def test_a_video_that_went_away_is_a_failure_and_no_damaged_sample(put: Any) -> None:
    root = put(*FOLDERS)
    split = open_at("video_folder", root).splits["train"]
    (root / "train/a/1.mp4").unlink()
    with pytest.raises(JobError, match=r"sample 'train/a/1\.mp4' cannot be read"):
        split[0]
    with pytest.raises(JobError, match=r"sample 'train/a/1\.mp4' cannot be read"):
        split.digest(0)


def test_all_views_of_a_damaged_video_are_skipped_and_reported(
    put: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, path = put(*FOLDERS), str(tmp_path_factory.mktemp("store") / "c.zarr")
    (root / "train/b/1.mp4").write_bytes((root / "train/b/1.mp4").read_bytes()[:-2000])
    clips = ClipConfig(frames=2, clips=2)
    data = DataConfig(source="video_folder", root=root, video=clips, on_error="skip")
    backbone = load_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY), clips
    )
    config = ExtractConfig(precision="float32", device="cpu")
    stored = StoreConfig(path=path)
    job = ExtractionJob(source=open_source(data), backbone=backbone, data=data, store=stored, extract=config)
    store = extract_tokens(job).store
    assert store.schema.views == 2
    assert sorted(store.skipped("train")) == ["train/b/1.mp4#0", "train/b/1.mp4#1"]
    (reason,) = set(store.skipped("train").values())
    assert "sample 'train/b/1.mp4' cannot be decoded: it is damaged" in reason
    assert store.skipped("test") == {}
    failing = data.model_copy(update={"on_error": "fail"})
    with pytest.raises(UserError, match=r"sample 'train/b/1\.mp4' cannot be decoded"):
        extract_tokens(replace(job, data=failing, store=StoreConfig(path=str(root / "d.zarr"))))


def test_real_videos_are_listed_alike_by_folder_and_by_list(real_data: Path) -> None:
    root = real_data / "videos/drone_vs_bird_cc0"
    if not root.exists():
        pytest.skip("the real clips are not here")
    listed = open_at("video_csv", root / "labels.csv", label_column="class", video=ClipConfig(frames=4))
    assert listed.classes == ("airplane", "bird", "drone", "helicopter")
    found = open_at("video_folder", root)
    assert {i for split in ids(listed).values() for i in split} == {i for split in ids(found).values() for i in split}
    assert [frame.size for frame in listed.splits["test"][0]] == [(640, 512)] * 4


def test_parts_of_a_file_are_drawn_together() -> None:
    samples = [
        Sample(f"{file}#{part}", ("a",), FileBytes(b""), part_of=str(file)) for file in range(10) for part in range(3)
    ]
    chosen = draw_test(samples, 0.4, multi_label=False)
    assert len(chosen) == 12
    assert len({sample_id.partition("#")[0] for sample_id in chosen}) == 4
