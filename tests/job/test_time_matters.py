"""The whole job on videos whose classes differ only in the order of the frames."""

import numpy as np
import pytest
from moving_shapes import FRAMES, OPPOSITES, write_videos
from tiny_vit import TINY

import sidecache as sc
from adapt.run_dir.results import Row

pytestmark = pytest.mark.slow
TRAIN, TEST = 128, 24  # videos of every class


Job = tuple[sc.Store, dict[str, Row]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The store, and the row of every method."""
    folder = tmp_path_factory.mktemp("time")
    losa = {
        "name": "losa",
        "rank": 16,
        "lr": 0.01,
        "batch_size": 32,
        "epochs": 40,
    }  # at 20, one of three seeds has not learned it
    document = {
        "run_dir": str(folder / "run"),
        "data": {
            "source": "video_folder",
            "root": str(write_videos(folder / "videos", TRAIN, TEST)),
            "video": {"frames": FRAMES},
            "val_fraction": 0.125,
        },
        "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": TINY},
        "store": {"path": str(folder / "cache.zarr")},
        "train": {"seeds": [0]},
        "methods": ["linear_probe", losa, losa | {"time_rank": 0}],
    }
    names = {8: "LoSA", 0: "LoSA without temporal mixing", None: "linear probe"}
    rows = {names[row.options.get("time_rank")]: row for row in sc.run(sc.load_config(document))}
    return sc.open_store(folder / "cache.zarr"), rows


def test_a_video_and_its_opposite_are_stored_as_the_same_frames_in_reverse(job: Job) -> None:
    store, _ = job
    ids = store.sample_ids("test")
    for motion, backwards in OPPOSITES.items():
        for number in range(TEST):
            rows = [ids.index(f"test/{name}/{number:03}.mp4") for name in (motion, backwards)]
            for tokens in store.read("test", rows).values():
                for clip, opposite in (frames_of(tokens, slice(FRAMES)), frames_of(tokens, slice(FRAMES, None))):
                    np.testing.assert_allclose(clip, opposite[::-1], rtol=1e-2, atol=1e-2)


def frames_of(tokens: np.ndarray, which: slice) -> np.ndarray:
    """Some of the tokens, as (videos, frames, values)."""
    return tokens[:, which].astype(np.float32).reshape(len(tokens), FRAMES, -1)


def test_mixing_over_time_tells_a_direction_from_its_opposite(job: Job) -> None:
    assert job[1]["LoSA"].top1 >= 90


@pytest.mark.parametrize("method", ["linear probe", "LoSA without temporal mixing"])
def test_without_it_no_method_can(job: Job, method: str) -> None:
    """A movement and its reverse have the same logits up to rounding, so at most one of the two is classified right."""
    assert job[1][method].top1 <= 60
