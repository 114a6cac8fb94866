"""`sidecache predict` classifies files, folders and lists with any number of adaptors, and prints nothing else."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from picture_job import METHODS, run_picture_job
from run_command import Command
from safetensors.torch import save_file

import sidecache as sc
from adapt.adaptors.files import load_adaptor
from extract.backbones.backbone import TimmBackbone

LAST_LINE = re.compile(r"predicted (\d+) images in \d+\.\d s \(\d+\.\d images/s\)(, \d+ skipped)?\n$")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: TimmBackbone) -> Path:
    """A folder with images, weights in a file that is named relative to it, and a run of three methods."""
    folder = tmp_path_factory.mktemp("job")
    save_file(tiny_backbone.module.state_dict(), folder / "weights.safetensors")
    return run_picture_job(folder, [*METHODS, {"name": "lora", "rank": 2}], "weights.safetensors")


def adaptor_of(job: Path, method: str) -> Path:
    return next((job / "run" / "adaptors").glob(f"{method}-*.safetensors"))


def adaptors_of(job: Path) -> list[Path]:
    return [adaptor_of(job, method) for method in ("linear_probe", "losa", "lora")]


@pytest.fixture
def mixed(job: Path, tmp_path: Path) -> Path:
    """A folder with pictures at two depths, of which one is damaged, and files of other kinds."""
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    for number, place in enumerate((folder / "a.png", folder / "deeper" / "b.png", folder / "deeper" / "c.PNG")):
        shutil.copy(job / f"images/test/red/{number}.png", place)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    (folder / "deeper" / "IMG.CR3").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    return folder


# Output


def test_standard_output_holds_predictions_alone(command: Command, job: Path) -> None:
    image = job / "images/test/red/0.png"
    status, out, err = command("predict", adaptor_of(job, "losa"), image, "--format", "json")
    (document,) = json.loads(out)
    assert (status, document["file"], document["error"]) == (0, str(image), None)
    assert sum(document["probabilities"].values()) == pytest.approx(1)
    assert LAST_LINE.match(err)
    status, out, err = command("predict", adaptor_of(job, "losa"), image, image)
    assert out == 2 * f"{image}\t{document['class']}\t{document['probability']:.4f}\n"
    assert LAST_LINE.match(err).group(1) == "2"  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["linear_probe", "losa"])
def test_predictions_equal_the_cached_evaluation(command: Command, job: Path, method: str) -> None:
    path = adaptor_of(job, method)
    store, adaptor = sc.open_store(job / "cache.zarr"), load_adaptor(path, device="cpu")
    tokens = {layer: torch.from_numpy(values) for layer, values in store.read("test", slice(None)).items()}
    with torch.no_grad():
        cached = adaptor.model(tokens).softmax(dim=1).numpy()
    files = [job / "images" / sample_id for sample_id in store.sample_ids("test")]
    predictions = json.loads(command("predict", path, *files, "--device", "cpu", "--format", "json")[1])
    found = np.array([list(prediction["probabilities"].values()) for prediction in predictions])
    np.testing.assert_allclose(found, cached, atol=1e-6)
    assert [prediction["class"] for prediction in predictions] == [store.classes[k] for k in cached.argmax(axis=1)]
    row = next(r for r in json.loads((job / "run" / "results.json").read_text()) if r["method"] == method)
    assert 100 * np.mean(cached.argmax(axis=1) == store.labels("test")) == pytest.approx(row["top1"])


def test_the_top_classes_are_ranked_in_every_format(command: Command, job: Path, tmp_path: Path) -> None:
    given = ("predict", adaptor_of(job, "losa"), job / "images/test/red/0.png", "--top", 2)
    (document,) = json.loads(command(*given, "--format", "json")[1])
    ranked = list(document["probabilities"].items())
    assert len(ranked) == 2
    assert ranked[0] == (document["class"], document["probability"])
    assert ranked[0][1] >= ranked[1][1]
    lines = [line.split("\t") for line in command(*given)[1].splitlines()]
    assert [(name, float(share)) for _, name, share in lines] == [(name, round(share, 4)) for name, share in ranked]
    header, *rows = command(*given, "--format", "csv")[1].splitlines()
    assert header == "file,adaptor,rank,class,probability,error"
    assert [row.split(",")[2:4] for row in rows] == [["1", ranked[0][0]], ["2", ranked[1][0]]]
    status, out, _ = command(*given, "--format", "parquet", "--output", tmp_path / "found.parquet")
    assert (status, out) == (0, "")
    table = pq.read_table(tmp_path / "found.parquet").to_pydict()
    assert list(zip(table["class"], table["probability"], strict=True)) == ranked


def test_parquet_without_a_file_is_refused_before_anything_is_loaded(command: Command, job: Path) -> None:
    status, out, err = command("predict", job / "none.safetensors", job / "images", "--format", "parquet")
    assert (status, out) == (2, "")
    assert err == "sidecache: --format parquet needs a file: add --output FILE.parquet\n"


# What is classified


@pytest.mark.filterwarnings("default::store.errors.Note")
def test_a_folder_is_searched_and_what_is_ignored_is_said(command: Command, job: Path, mixed: Path) -> None:
    (mixed / "bad.png").unlink()
    status, out, err = command("predict", adaptor_of(job, "losa"), mixed)
    assert status == 0
    found = [line.partition("\t")[0] for line in out.splitlines()]
    assert found == [str(mixed / name) for name in ("a.png", "deeper/b.png", "deeper/c.PNG")]
    note = f"note: {mixed}: ignored 2 files (extensions other than those of images): "
    assert note in err
    assert "1 with .txt ('notes.txt')" in err
    assert "1 with .cr3 ('deeper/IMG.CR3')" in err


def test_a_list_is_relative_to_its_folder_or_to_here(
    command: Command, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("é 1.png", "2.png"):
        shutil.copy(job / "images/test/red/0.png", tmp_path / name)
    (tmp_path / "files.txt").write_text("é 1.png\r\n\n2.png\n", encoding="utf-8-sig")
    found = command("predict", adaptor_of(job, "losa"), "--list", tmp_path / "files.txt")[1]
    assert [line.partition("\t")[0] for line in found.splitlines()] == [f"{tmp_path}/é 1.png", f"{tmp_path}/2.png"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2.png\n"))
    assert command("predict", adaptor_of(job, "losa"), "--list", "-")[1].startswith("2.png\t")
    assert command("predict", adaptor_of(job, "losa"), "--list", "none.txt")[::2] == (
        2,
        "sidecache: cannot read the list none.txt: No such file or directory; give a text file, one path a line\n",
    )


def test_nothing_to_classify_is_refused(command: Command, job: Path, tmp_path: Path) -> None:
    status, _, err = command("predict", adaptor_of(job, "losa"))
    assert status == 2
    assert "there is nothing to classify; give files or folders after the adaptors, or --list FILE" in err
    (tmp_path / "notes.txt").write_text("")
    status, _, err = command("predict", adaptor_of(job, "losa"), tmp_path)
    assert status == 2
    assert err.startswith(f"sidecache: the folder {tmp_path} holds no images; give another one (extensions: ")
    assert "1 with .txt ('notes.txt')" in err


def test_an_adaptor_that_does_not_exist_is_reported(command: Command, job: Path) -> None:
    for path in (job / "none.safetensors", job, Path()):
        status, out, err = command("predict", path, job / "images/test/red/0.png")
        assert (status, out) == (2, "")
        assert (
            err
            == f"sidecache: there is no adaptor {path}; give a .safetensors file that a run wrote below its adaptors/\n"
        )


def test_a_device_that_does_not_exist_is_reported(command: Command, job: Path) -> None:
    status, _, err = command("predict", adaptor_of(job, "losa"), job / "images/test/red/0.png", "--device", "abacus")
    assert status == 2
    assert "device 'abacus' cannot be used here; legal: auto, cpu" in err


# Files that cannot be read


def test_a_file_that_cannot_be_predicted_is_named(command: Command, job: Path, tmp_path: Path) -> None:
    good = job / "images/test/red/0.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    for file, message in (
        (tmp_path / "none.png", "cannot read {}: No such file or directory"),
        (tmp_path / "pipe.png", "cannot read {}: it is no regular file"),
        (tmp_path / "cut.png", "sample '{}' cannot be decoded: "),
        (tmp_path / "text.png", "sample '{}' cannot be decoded: it is not an image in a known format"),
    ):
        status, out, err = command("predict", adaptor_of(job, "losa"), good, file)
        assert (status, out) == (2, "")
        assert err.startswith("sidecache: " + message.format(file))
        assert "go on without such files: --on-error skip" in err
        assert err.count("\n") == 1


@pytest.mark.filterwarnings("default::store.errors.Note")
def test_a_bad_file_does_not_end_the_batch(command: Command, job: Path, mixed: Path, tmp_path: Path) -> None:
    given = ("predict", adaptor_of(job, "losa"), mixed, tmp_path / "none.png", "--on-error", "skip")
    status, out, err = command(*given, "--format", "json")
    documents = {Path(found["file"]).name: found for found in json.loads(out)}
    assert status == 0
    assert list(documents) == ["a.png", "bad.png", "b.png", "c.PNG", "none.png"]
    errors = {name: found["error"] for name, found in documents.items() if found["error"]}
    assert set(errors) == {"bad.png", "none.png"}
    assert documents["bad.png"]["class"] is None
    assert documents["b.png"]["class"] in ("blue", "green", "red")
    assert LAST_LINE.search(err).groups() == ("5", ", 2 skipped")  # type: ignore[union-attr]
    assert all(f"skipped: {error}\n" in err for error in errors.values())
    assert "data.on_error" not in err, "the remedy is that of a job"
    rows = command(*given, "--format", "csv")[1].splitlines()
    assert sum("cannot be decoded" in row or "No such file" in row for row in rows) == 2
    assert len(command(*given)[1].splitlines()) == 3


def test_only_bad_files_are_a_failure(command: Command, job: Path, tmp_path: Path) -> None:
    status, out, err = command(
        "predict", adaptor_of(job, "losa"), tmp_path / "no.png", "--on-error", "skip", "--format", "json"
    )
    assert status == 1
    assert json.loads(out)[0]["error"] == f"cannot read {tmp_path / 'no.png'}: No such file or directory"
    assert err.endswith("sidecache: none of the 1 images could be read\n")


# Several adaptors


def test_several_adaptors_say_what_each_says_alone(command: Command, job: Path) -> None:
    folder = job / "images" / "test"
    together = json.loads(command("predict", *adaptors_of(job), folder, "--format", "json")[1])
    assert [found["adaptor"] for found in together[:3]] == [path.stem for path in adaptors_of(job)]
    for path in adaptors_of(job):
        alone = json.loads(command("predict", path, folder, "--format", "json")[1])
        mine = [found for found in together if found["adaptor"] == path.stem]
        assert [found["file"] for found in mine] == [found["file"] for found in alone]
        for one, other in zip(mine, alone, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    line = command("predict", *adaptors_of(job), folder / "red/0.png")[1].splitlines()[1]
    assert line.split("\t")[:2] == [str(folder / "red/0.png"), adaptor_of(job, "losa").stem]


def test_the_costs_are_lines_on_standard_error(command: Command, job: Path) -> None:
    status, out, err = command("predict", *adaptors_of(job), job / "images/test/red/0.png", "--costs")
    assert status == 0
    assert "GFLOPs" not in out
    figures = r"[\d.e-]+ GFLOPs, [\d.e-]+ ms an image"
    assert re.search(rf"^backbone vit_tiny_patch16_224: {figures}$", err, re.MULTILINE)
    for path, kind in zip(adaptors_of(job), 2 * ["besides the backbone"] + ["with its own copy"], strict=True):
        assert re.search(rf"^adaptor {path.stem}: {figures}, {kind}", err, re.MULTILINE)


# Moved weights


def test_a_moved_run_finds_its_weights_or_takes_them(
    command: Command, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = command("predict", adaptor_of(job, "losa"), job / "images/test/red")[1]
    shutil.copytree(job / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "adaptors" / adaptor_of(job, "losa").name
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept.bin"
    shutil.move(job / "weights.safetensors", kept)
    try:
        status, _, err = command("predict", moved, job / "images/test/red")
        assert status == 2
        assert f"backbone.weights '{job}/weights.safetensors': there is no such file or folder" in err
        assert "--weights FILE" in err
        shutil.copy(kept, "elsewhere.safetensors")
        assert command("predict", moved, job / "images/test/red", "--weights", "elsewhere.safetensors")[1] == expected
        for place in (moved.parent, moved.parent.parent):
            shutil.copy(kept, place / "weights.safetensors")
            assert command("predict", moved, job / "images/test/red")[1] == expected
            (place / "weights.safetensors").unlink()
    finally:
        shutil.move(kept, job / "weights.safetensors")


def test_other_weights_of_the_same_name_are_refused(
    command: Command, job: Path, tiny_backbone: TimmBackbone, tmp_path: Path
) -> None:
    shutil.copytree(job / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "adaptors" / adaptor_of(job, "losa").name
    other = {name: tensor + 1 for name, tensor in tiny_backbone.module.state_dict().items()}
    save_file(other, tmp_path / "moved" / "weights.safetensors")
    kept = shutil.move(job / "weights.safetensors", tmp_path / "kept.safetensors")
    try:
        err = command("predict", moved, job / "images/test/red")[2]
        assert f"(of another content: {tmp_path}/moved/weights.safetensors)" in err
        err = command("predict", moved, job / "images", "--weights", tmp_path / "moved" / "weights.safetensors")[2]
        assert "was trained on another backbone: weights_digest is " in err
    finally:
        shutil.move(kept, job / "weights.safetensors")


def test_adaptors_of_different_backbones_are_refused_before_one_is_loaded(
    command: Command, job: Path, tiny_backbone: TimmBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {name: tensor + 0.1 for name, tensor in tiny_backbone.module.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = adaptor_of(run_picture_job(tmp_path, ["linear_probe"], str(tmp_path / "other.safetensors")), "linear_probe")
    monkeypatch.setattr("adapt.adaptors.files.load_backbone_of", None)
    status, out, err = command("predict", adaptor_of(job, "losa"), other, job / "images")
    assert (status, out) == (2, "")
    assert f"{adaptor_of(job, 'losa')} and {other} cannot share a forward pass: weights_digest is " in err
    assert "predict with each of them alone" in err
