"""The most confident mistakes with their pictures: the right samples, or none, and none where they are private."""

import base64
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_predictions import make_multi_label, make_predictions
from PIL import Image
from result_rows import make_row

from adapt.config.pipeline import Config
from adapt.report.mistakes import most_confident
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.run_dir.config_file import write_config
from adapt.run_dir.predictions import Predictions, predictions_path, write_predictions

WRONG = ("test/blue/1.png", "test/red/2.png")  # of the image folder


def trial_of(folder: Path, wrong: tuple[str, ...] = WRONG) -> Predictions:
    """Predictions for the test split of a folder, of which these samples are taken for the next class."""
    classes = ("blue", "green", "red")
    ids = sorted(str(path.relative_to(folder)) for path in (folder / "test").rglob("*.png"))
    labels = np.array([classes.index(sample.split("/")[1]) for sample in ids])
    predicted = np.array([(k + (sample in wrong)) % 3 for sample, k in zip(ids, labels, strict=True)])
    return Predictions(
        trial_id="t0123456789",
        classes=classes,
        sample_ids=tuple(ids),
        labels=labels,
        logits=4 * np.eye(3, dtype=np.float32)[predicted],
    )


@pytest.fixture
def report(tiny_config: Callable[..., Config], image_folder: Path) -> Callable[..., str]:
    """The page of a run on the image folder, with these overrides of its configuration."""

    def write(*overrides: str, trial: Predictions | None = None, before: Callable[[], object] = lambda: None) -> str:
        config, row = tiny_config(*overrides), make_row("losa", trial_id="t0123456789")
        write_config(config)
        write_predictions(predictions_path(config.run_dir, row), trial or trial_of(image_folder))
        before()
        return write_report(config.run_dir, ReportedRows.of_run(config.run_dir, [row])).read_text(encoding="utf-8")

    return write


def test_the_pictures_are_those_of_the_wrong_samples(report: Callable[..., str], image_folder: Path) -> None:
    text = report()
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)
    assert len(found) == len(WRONG)
    for encoded, sample in zip(found, WRONG, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), float)
        true = np.asarray(Image.open(image_folder / sample).convert("RGB"), float)
        np.testing.assert_allclose(shown.mean(axis=(0, 1)), true.mean(axis=(0, 1)), atol=5)  # a JPEG of few bytes
    assert "taken for <b>green</b> (96\u00a0%)" in text
    assert "is <b>blue</b> (2\u00a0%)" in text


def test_a_large_image_becomes_small(report: Callable[..., str], image_folder: Path) -> None:
    def enlarge() -> None:
        for path in (image_folder / "test").rglob("*.png"):
            Image.open(path).resize((400, 300)).save(path)

    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', report(before=enlarge))
    assert {Image.open(io.BytesIO(base64.b64decode(encoded))).size for encoded in found} == {(96, 72)}


def test_private_data_have_no_pictures(report: Callable[..., str]) -> None:
    text = report("report.pictures=false")
    assert "data:image" not in text
    assert "Most confident mistakes" not in text


@pytest.mark.parametrize("change", ["gone", "another", "relabeled"])
def test_samples_that_are_not_there_any_more_are_left_out_in_one_line(
    report: Callable[..., str], image_folder: Path, change: str
) -> None:
    def apply() -> None:
        if change == "gone":
            shutil.rmtree(image_folder)
        elif change == "another":
            (image_folder / "test/red/0.png").unlink()
        else:
            (image_folder / "test/red/0.png").rename(image_folder / "test/red/9.png")

    text = report(before=apply)
    assert text.count("Pictures are left out: ") == 1
    assert "data:image" not in text


def test_samples_with_other_labels_are_not_shown(report: Callable[..., str], image_folder: Path) -> None:
    trial = trial_of(image_folder)
    changed = Predictions(**{**vars(trial), "labels": np.roll(trial.labels, 1)})
    assert "the samples have other labels now" in report(trial=changed)


def test_a_test_split_that_is_drawn_another_way_now_is_found_by_its_ids(
    report: Callable[..., str], image_folder: Path
) -> None:
    trial = trial_of(image_folder)
    ids = tuple(sample.removeprefix("test/") for sample in trial.sample_ids)
    for sample in (image_folder / "train").rglob("*.png"):
        sample.rename(sample.with_stem(f"train{sample.stem}"))
    for kind in ("blue", "green", "red"):
        shutil.copytree(image_folder / "test" / kind, image_folder / kind)
        shutil.copytree(image_folder / "train" / kind, image_folder / kind, dirs_exist_ok=True)
    shutil.rmtree(image_folder / "train")
    shutil.rmtree(image_folder / "test")
    drawn = Predictions(**{**vars(trial), "sample_ids": ids})
    assert report(trial=drawn).count("data:image/jpeg") == len(WRONG)


def test_the_most_confident_mistakes_come_first_and_are_wrong() -> None:
    draw = np.random.default_rng(0)
    made = make_predictions(np.ones(80, bool), classes=5)
    trial = Predictions(**{**vars(made), "logits": draw.normal(size=(80, 5)).astype(np.float32)})
    found = most_confident(trial)
    assert len(found) == 12
    probabilities = np.exp(trial.logits) / np.exp(trial.logits).sum(axis=1, keepdims=True)
    wrong = probabilities.argmax(axis=1) != trial.labels
    expected = sorted(probabilities.max(axis=1)[wrong], reverse=True)[:12]
    np.testing.assert_allclose([mistake.percent for mistake in found], 100 * np.array(expected), rtol=1e-5)
    for mistake in found:
        assert mistake.true == trial.classes[trial.labels[mistake.number]] != mistake.predicted


def test_with_several_labels_a_mistake_is_a_class_that_the_sample_lacks() -> None:
    scores = np.array([[2.0, -1.0, 3.0], [-1.0, 1.0, -2.0], [-1.0, 1.0, -1.0]])
    labels = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]])
    first, second = most_confident(make_multi_label(scores, labels))
    assert (first.number, first.true, first.predicted) == (0, "class 0, class 1", "class 2")
    assert (second.number, second.true, second.predicted) == (1, "none", "class 1")


def test_no_mistakes_have_no_section(report: Callable[..., str], image_folder: Path) -> None:
    assert "Most confident mistakes" not in report(trial=trial_of(image_folder, wrong=()))
