"""The whole job on videos, with an image ViT on every frame and with ViViT; several views; damaged videos."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_command import Command
from tiny_vit import TINY
from transformers import VivitModel
from video_files import spoiled, write_endless, write_video

import sidecache as sc
from adapt.adaptors.files import load_adaptor
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from adapt.run_dir.results import Row
from extract.forward.frozen_forward import preprocess
from extract.sources.open_source import open_source
from store.errors import UserError

FRAMES = 4
BACKBONES: dict[str, dict[str, Any]] = {
    "frame by frame": {
        "name": "vit_tiny_patch16_224",
        "weights": "random",
        "image_size": 32,
        "model_kwargs": dict(TINY),
    },
    "vivit": {
        "name": "vivit",
        "weights": "random",
        "image_size": 32,
        "model_kwargs": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_frames": FRAMES,
            "tubelet_size": [2, 8, 8],
        },
    },
}
METHODS = ["linear_probe", "attentive_probe", {"name": "losa", "rank": 4, "token_rank": 2}, {"name": "lora", "rank": 2}]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two classes with different frame sizes and codec settings: 6 training and 3 test videos each."""
    root = tmp_path / "videos"
    for split, count in (("train", 6), ("test", 3)):
        for number in range(count):
            write_video(root / split / "still" / f"{number}.mp4", 8 + number, size=(64, 48))
            write_video(root / split / "wide" / f"{number}.mp4", 8 + number, size=(96, 48), b_frames=0)
    return root


@pytest.fixture
def config(videos: Path, tmp_path: Path) -> Callable[..., Config]:
    """The job on one kind of backbone."""

    def build(kind: str, **changes: Any) -> Config:
        document = {
            "run_dir": str(tmp_path / "run"),
            "data": {
                "source": "video_folder",
                "root": str(videos),
                "val_fraction": 0.34,
                "video": {"frames": FRAMES, "clips": 2, "crops": 3},
            },
            "backbone": BACKBONES[kind],
            "store": {"path": str(tmp_path / "cache.zarr"), "dtype": "float32", "shard_samples": 8},
            "train": {"epochs": 1, "batch_size": 8, "seeds": [0], "refit": False},
            "methods": METHODS,
        }
        return load_config({key: value | changes.get(key, {}) if isinstance(value, dict) else changes.get(key, value)
                            for key, value in document.items()})  # fmt: skip

    return build


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_view_is_a_row_and_every_video_one_answer(config: Callable[..., Config], kind: str) -> None:
    job = config(kind)
    rows = sc.run(job)
    store = sc.open_store(job.store.path)
    assert (store.schema.views, store.schema.shard_samples) == (6, 12), "no video is in two shards"
    assert store.num_samples("train") == 12 * 6
    assert store.sample_ids("train")[5:7] == ["train/still/0.mp4#5", "train/still/1.mp4#0"]
    assert {row.method for row in rows} == {"linear_probe", "attentive_probe", "losa", "lora"}
    assert all(round(row.top1 * 6 / 100, 6).is_integer() for row in rows if row.top1), "of 6 test videos"


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_video_is_classified_by_the_mean_of_its_views(config: Callable[..., Config], kind: str, videos: Path) -> None:
    job = config(kind)
    rows = {row.method: row for row in sc.run(job)}
    for method in ("losa", "lora"):
        adaptor = load_adaptor(_adaptor(job, rows[method]))
        split = open_source(job.data).splits["test"]
        views = torch.stack([preprocess(adaptor.forward.backbone.transform, split[row], "") for row in range(6)])
        expected = adaptor.logits(views).mean(dim=0).softmax(dim=0)
        (answer,) = adaptor.predict(videos / "test" / "still" / "0.mp4")
        assert list(answer.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.filterwarnings("default::store.errors.Note")
def test_a_folder_of_videos_is_classified_by_adaptors_that_share_the_decoding(
    config: Callable[..., Config], videos: Path, command: Command
) -> None:
    job = config("frame by frame")
    rows = {row.method: row for row in sc.run(job)}
    adaptors = [_adaptor(job, rows[method]) for method in ("losa", "lora")]
    content = (videos / "test" / "still" / "0.mp4").read_bytes()
    (videos / "test" / "still" / "bad.mp4").write_bytes(content[: len(content) // 2])
    (videos / "test" / "photo.jpg").touch()
    status, out, err = command("predict", *adaptors, videos / "test", "--on-error", "skip", "--format", "json")
    found = json.loads(out)
    assert status == 0
    assert "ignored 1 file (extensions other than those of videos): 1 with .jpg" in err
    assert "predicted 7 videos in " in err
    assert {Path(one["file"]).name for one in found if one["error"]} == {"bad.mp4"}
    for path, method in zip(adaptors, ("losa", "lora"), strict=True):
        mine = {one["file"]: one["class"] for one in found if one["adaptor"] == path.stem and not one["error"]}
        right = sum(Path(file).parent.name == label for file, label in mine.items())
        assert 100 * right / 6 == pytest.approx(rows[method].top1)
    with pytest.raises(UserError, match="image 0 is a picture, but the adaptor was trained on clips; give the paths"):
        load_adaptor(adaptors[0]).predict(np.zeros((32, 32, 3), np.uint8))


def _adaptor(job: Config, row: Row) -> Path:
    return job.run_dir / "adaptors" / f"{row.method}-seed0-{row.trial_id[:8]}.safetensors"


def test_stored_and_online_tokens_are_vivits_hidden_states(config: Callable[..., Config]) -> None:
    job = config("vivit", data={"video": {"frames": FRAMES}})
    store = sc.extract(job).store
    inputs = Inputs(job)
    backbone, clips = inputs.backbone, inputs.source.splits["test"]
    pixels = torch.stack([preprocess(backbone.transform, clips[row], "") for row in range(len(clips))])
    assert isinstance(backbone.module, VivitModel)
    with torch.no_grad():
        hidden = backbone.module(pixels, output_hidden_states=True).hidden_states
        online = backbone.tokens(pixels, store.layers)
    for layer, stored in store.read("test", range(len(clips))).items():
        assert torch.equal(online[layer], hidden[layer + 1])
        np.testing.assert_allclose(
            stored, hidden[layer + 1].numpy(), rtol=1e-5, atol=1e-6
        )  # other batch sizes round differently


@pytest.mark.parametrize("kind", BACKBONES)
def test_cached_and_online_training_of_clips_give_the_same_weights(
    config: Callable[..., Config], kind: str, tmp_path: Path
) -> None:
    losa = [{"name": "losa", "rank": 4, "token_rank": 2, "time_rank": 2}]
    extract = {"batch_size": 8}  # that of training: equal batch sizes give equal bits
    cached = config(kind, methods=losa, extract=extract)
    online = config(kind, methods=losa, extract=extract, train={"feature_source": "online"}).model_copy(
        update={"run_dir": tmp_path / "online"}
    )
    tensors = []
    for job in (cached, online):
        (row,) = sc.run(job)
        tensors.append(dict(load_adaptor(_adaptor(job, row)).model.named_parameters()))
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("drawn", [{"stride": 2}, {"frames": 2}, {"crops": 1}])
def test_training_refuses_a_store_of_other_frames(config: Callable[..., Config], drawn: dict[str, Any]) -> None:
    sampled = {"frames": FRAMES, "clips": 1, "crops": 3}
    kind, probe = "frame by frame", ["linear_probe"]
    sc.extract(config(kind, data={"video": sampled}))
    sampled["time_limit"] = 9.0  # does not change the frames
    assert len(sc.train(config(kind, data={"video": sampled}, methods=probe))) == 1
    with pytest.raises(UserError, match=r"data\.video, how frames are drawn: stored"):
        sc.train(config(kind, data={"video": sampled | drawn}, methods=probe))


def test_damaged_videos_end_no_job_and_are_named(config: Callable[..., Config], videos: Path, tmp_path: Path) -> None:
    """A corrupt, a truncated, an endless and an empty file: the other videos are stored as without them."""
    job = config(
        "frame by frame", data={"on_error": "skip", "video": {"frames": FRAMES, "clips": 2, "time_limit": 1.0}}
    )
    before = _stored(sc.extract(job).store)
    train = videos / "train" / "wide"
    content = (train / "0.mp4").read_bytes()
    (train / "x-corrupt.mp4").write_bytes(spoiled(content, 64, random.Random(0)))
    (train / "x-cut.mp4").write_bytes(content[: len(content) // 2])
    (train / "x-empty.mp4").write_bytes(b"")
    write_endless(train / "x-endless.mp4", tmp_path / "small.mp4")
    with pytest.raises(UserError, match=r"x-corrupt\.mp4"):
        sc.extract(config("frame by frame", store={"path": str(tmp_path / "strict.zarr")}))
    store = sc.extract(
        job.model_copy(update={"store": job.store.model_copy(update={"path": str(tmp_path / "b.zarr")})})
    ).store
    reasons = store.skipped("train")
    assert sorted({sample.partition("#")[0] for sample in reasons}) == [
        f"train/wide/x-{what}.mp4" for what in ("corrupt", "cut", "empty", "endless")
    ]
    assert len(reasons) == 4 * 2, "every view of them"
    text = " ".join(reasons.values())
    assert [
        word for word in ("damaged", "moov atom not found", "it is empty", "longer than 1 s") if word not in text
    ] == [], text
    after = _stored(store)
    assert before.keys() == after.keys()
    for sample, values in before.items():
        np.testing.assert_array_equal(values, after[sample])


def _stored(store: sc.Store) -> dict[str, np.ndarray]:
    """The last layer of every sample by its id."""
    layer = store.layers[-1]
    return {
        sample: values
        for split in store.splits
        for sample, values in zip(store.sample_ids(split), store.read(split, slice(None), [layer])[layer], strict=True)
    }
