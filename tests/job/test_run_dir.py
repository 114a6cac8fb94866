"""A damaged run directory gives the same values as before or one error that names the file, never other values."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vit import TINY

import sidecache as sc
from adapt.adaptors.files import load_adaptor
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from adapt.job.intrinsic_record import IntrinsicRecord
from adapt.job.training_job import measure_intrinsic_dimension
from adapt.run_dir.config_file import read_config
from adapt.run_dir.files import with_checksum
from adapt.run_dir.results import read_results
from adapt.training.scores import SearchScores
from extract.backbones.backbone import TimmBackbone
from sidecache.steps import write_run_report
from store.errors import JobError, UserError

FLIPS = 60  # flipped bits per file
IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
KINDS = ["results.json", "search", "intrinsic.json", "config.yaml", "card", "tensors"]
Reader = Callable[[Path], Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished job with a search and a measurement of the intrinsic dimension."""
    folder, draw = tmp_path_factory.mktemp("job"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for k, name in enumerate(("blue", "green")):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 90, (32, 32, 3))
                pixels[:, :: k + 2, k] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / name / f"{number}.png")
    config = load_config(
        {
            "name": "a tiny job",
            "run_dir": str(folder / "run"),
            "data": {"source": "folder", "root": str(folder / "images"), "val_fraction": 0.25},
            "backbone": {
                "name": "vit_tiny_patch16_224",
                "weights": "random",
                "image_size": 32,
                "model_kwargs": dict(TINY),
            },
            "store": {"path": str(folder / "cache.zarr"), "dtype": "float32"},
            "train": {"epochs": 1, "batch_size": 4, "seeds": [0]},
            "methods": [{"name": "losa", "rank": 2, "sweep": {"lr": [0.001, 0.01]}}],
        }
    )
    sc.run(config)
    measure(config)
    return config


def measure(config: Config) -> Any:
    return measure_intrinsic_dimension(config, Inputs(config), None, (4,)).document()


def file_of(kind: str, run_dir: Path) -> Path:
    patterns = {"search": "search/*.json", "card": "adaptors/*.json", "tensors": "adaptors/*.safetensors"}
    (file,) = run_dir.glob(patterns.get(kind, kind))
    return file


def reader_of(kind: str, backbone: TimmBackbone) -> Reader:
    """What the program reads from a file, by name: entries may be missing, and are then computed again."""

    def results(file: Path) -> Any:
        return {row.trial_id: row for row in read_results(file.parent)}

    def intrinsic(file: Path) -> Any:
        document = IntrinsicRecord(file.parent, [])._document
        return {"features": document.features, "measured": document.measurement, **document.scores}

    def search(file: Path) -> Any:
        return {point.key: point for point in SearchScores(file, "losa", 1).points}

    def adaptor(file: Path) -> Any:
        loaded = load_adaptor(file.with_suffix(".safetensors"), backbone, "cpu")
        return {"probabilities": loaded.probabilities(IMAGE).tolist(), "classes": loaded.card.classes}

    config = lambda file: dict([read_config(file.parent)])  # noqa: E731
    readers: dict[str, Reader] = {"results.json": results, "search": search, "intrinsic.json": intrinsic}
    return {**readers, "config.yaml": config, "card": adaptor, "tensors": adaptor}[kind]


def require_same_or_refused(file: Path, read: Reader, before: dict[Any, Any], content: bytes) -> bool:
    """Whether the file with this content is refused; fails if it gives other values than before."""
    file.write_bytes(content)
    refusal = ""
    try:
        answers = read(file)
    except (UserError, JobError) as error:
        refusal, answers = str(error), {}
    assert not refusal or (file.name in refusal and len(refusal) < 2000), refusal
    assert {name: value for name, value in answers.items() if value is not None}.items() <= before.items()
    return bool(refusal)


@pytest.fixture
def own_copy(job: Config, tmp_path: Path) -> Path:
    return Path(shutil.copytree(job.run_dir, tmp_path / "run"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_gives_another_answer(own_copy: Path, tiny_backbone: TimmBackbone, kind: str) -> None:
    file, read = file_of(kind, own_copy), reader_of(kind, tiny_backbone)
    before, content, draw = read(file), file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in draw.integers(0, 8 * len(content), FLIPS):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << (place % 8)
        refused += require_same_or_refused(file, read, before, bytes(flipped))
    assert refused > FLIPS / 2, "the others hit white space, or the path of the weights"


def wrong_files(content: bytes) -> Iterator[bytes]:
    """Contents that may replace what was written."""
    yield from (b"", content[: len(content) // 2], content[:-2], bytes(len(content)), b"\xff\xfe" + content)
    yield from (b"[" * 100_000, b'{"a":' * 50_000, b"null", b"{}", b"3", b'"text"', b"NaN", b"1e999", b"[null]")
    for name in ("points", "scores", "measurement", "search", "backbone", "classes", "checksum", "trial_id"):
        for value in (None, 3, "3", [], {"x": {}}, {"0": {}}, {"0": {"score": "3"}}, {"0": {"score": float("nan")}}):
            yield from (json.dumps(each).encode() for each in ({name: value}, [{name: value}]))
            yield from (json.dumps(each).encode() for each in (with_checksum({name: value}),))
            yield json.dumps([with_checksum({name: value})]).encode()


def edited(content: bytes) -> Iterator[bytes]:
    """A document with one value changed, or with a key twice; the checksum is unchanged."""
    try:
        document = json.loads(content)
    except ValueError:  # the file is not JSON
        return
    fields = document[0] if isinstance(document, list) else document
    for name, old in fields.items():
        for value in (None, -1, "1e3", ["a"], {"a": 1}, float("inf")):
            if value != old:
                changed = {**fields, name: value}
                yield json.dumps([changed] if isinstance(document, list) else changed).encode()
        twice = f'{json.dumps(fields)[:-1]}, {json.dumps(name)}: "another"}}'
        yield (f"[{twice}]" if isinstance(document, list) else twice).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_origin_is_an_error(own_copy: Path, tiny_backbone: TimmBackbone, kind: str) -> None:
    file, read = file_of(kind, own_copy), reader_of(kind, tiny_backbone)
    before, content = read(file), file.read_bytes()
    for wrong in wrong_files(content):
        require_same_or_refused(file, read, before, wrong)
    for changed in edited(content):
        assert require_same_or_refused(file, read, before, changed), changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_or_a_huge_file_is_refused_at_once(own_copy: Path, tiny_backbone: TimmBackbone, kind: str) -> None:
    file, read = file_of(kind, own_copy), reader_of(kind, tiny_backbone)
    if kind != "tensors":
        os.truncate(file, 1 << 40)  # a sparse file
        with pytest.raises((UserError, JobError), match=rf"{file.name}.* larger than "):
            read(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(
        (UserError, JobError), match=rf"{file.name}.* not a regular file|there is no adaptor .*{file.name}"
    ):
        read(file)


def flip_last(file: Path) -> bytes:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    file.write_bytes(content)
    return bytes(content)


def train_again(config: Config) -> Any:
    shutil.rmtree(config.run_dir / "adaptors")  # so that everything is trained again
    return sc.train(config)


COMMANDS: dict[str, Callable[[Config], Any]] = {
    "results.json": sc.train,
    "search": train_again,
    "intrinsic.json": measure,
    "config.yaml": lambda config: write_run_report(config.run_dir),
    "card": lambda config: sc.load_adaptor(file_of("tensors", config.run_dir)),
    "tensors": lambda config: sc.load_adaptor(file_of("tensors", config.run_dir)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_command_goes_on_from_a_damaged_file_or_replaces_it(job: Config, own_copy: Path, kind: str) -> None:
    config, file = job.model_copy(update={"run_dir": own_copy}), file_of(kind, own_copy)
    damaged = flip_last(file)
    with pytest.raises((UserError, JobError), match=rf"{file.name}.*(damaged|is no JSON|is not the file of tensors)"):
        COMMANDS[kind](config)
    assert file.read_bytes() == damaged


def test_a_row_that_is_taken_out_by_hand_is_trained_again(job: Config, own_copy: Path) -> None:
    config = job.model_copy(update={"run_dir": own_copy})
    (before,) = read_results(own_copy)
    (own_copy / "results.json").write_text("[]")
    (after,) = sc.train(config)
    assert (after.trial_id, after.top1) == (before.trial_id, before.top1)


def test_the_scores_of_another_search_are_refused(own_copy: Path) -> None:
    file = file_of("search", own_copy)
    other = file.rename(file.with_name("losa-another.json"))
    with pytest.raises(
        JobError, match=rf"losa-another\.json is damaged \(it holds the scores of the search {file.stem}"
    ):
        SearchScores(other, "losa", 1)
