"""The commands of the first minutes: init, doctor, backbones."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner, Result

import extract.checkup
import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.planning.starter import make_starter
from extract.sources.open_source import open_source
from sidecache.command_line import app
from store.errors import UserError

Fill = Callable[..., Path]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Write pictures: so many in each of these class folders."""

    def write(root: str, folders: dict[str, int], ending: str = ".png") -> Path:
        draw = np.random.default_rng(0)
        for folder, count in folders.items():
            (tmp_path / root / folder).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (24, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / root / folder / f"{number}{ending}")
        return tmp_path / root

    return write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


class TestInit:
    def test_what_it_writes_is_a_job_of_the_folder(self, fill: Fill, tmp_path: Path) -> None:
        root = fill("my photos", {"cat": 12, "dog": 9})
        assert run("init", root, "--output", tmp_path / "job.yaml").exit_code == 0
        config = load_config(tmp_path / "job.yaml")
        assert config.data.root == root
        assert config.run_dir == tmp_path / "runs/my-photos"
        assert [method.name for method in config.parsed_methods()] == ["linear_probe", "conv_ladder", "losa"]
        source = open_source(config.data)
        assert source.classes == ("cat", "dog")
        train, test = (len(source.splits[split]) for split in ("train", "test"))
        first = (tmp_path / "job.yaml").read_text().splitlines()[0]
        assert first == f"# {train} images to train on, {test} to test, 2 classes."

    def test_a_test_fraction_is_given_where_there_are_no_splits(self, fill: Fill, tmp_path: Path) -> None:
        whole = fill("whole", {"a": 8, "b": 8})
        split = fill("split", {"train/a": 8, "train/b": 8, "test/a": 2, "test/b": 2})
        assert "test_fraction: 0.25" in make_starter(whole, tmp_path / "p.yaml").text
        assert "test_fraction" not in make_starter(split, tmp_path / "p.yaml").text

    def test_a_small_class_gets_a_share_that_works(self, fill: Fill, tmp_path: Path) -> None:
        root = fill("few", {"train/a": 3, "train/b": 40, "test/a": 1, "test/b": 1})
        text = make_starter(root, tmp_path / "p.yaml").text
        assert yaml.safe_load(text)["data"]["val_fraction"] == 0.2  # b gives samples enough
        root = fill("two", {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
        assert yaml.safe_load(make_starter(root, tmp_path / "p.yaml").text)["data"]["val_fraction"] > 0.2

    def test_names_are_kept_as_they_are(self, fill: Fill, tmp_path: Path) -> None:
        root = fill('a "quoted": #é', {"x": 8, "y": 8})
        (tmp_path / "p.yaml").write_text(make_starter(root, tmp_path / "p.yaml").text)
        config = load_config(tmp_path / "p.yaml")
        assert (config.name, config.data.root) == (root.name, root)

    def test_nothing_is_overwritten(self, fill: Fill, tmp_path: Path) -> None:
        (tmp_path / "p.yaml").write_text("mine")
        result = run("init", fill("photos", {"a": 4, "b": 4}), "--output", tmp_path / "p.yaml")
        assert isinstance(result.exception, UserError)
        assert (tmp_path / "p.yaml").read_text() == "mine"

    def test_what_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts/a.txt").write_text("x")
        for path, message in (("texts", "no images, clips or tars .*found: .txt"), ("nowhere", "there is no folder")):
            with pytest.raises(UserError, match=message):
                make_starter(tmp_path / path, tmp_path / "p.yaml")

    def test_a_list_of_images_is_a_source(self, fill: Fill, tmp_path: Path) -> None:
        root = fill("photos", {"a": 8, "b": 8})
        files = sorted(root.rglob("*.png"))
        lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
        (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
        text = make_starter(tmp_path / "list.csv", tmp_path / "p.yaml").text
        assert yaml.safe_load(text)["data"] == {
            "source": "csv",
            "root": "list.csv",
            "val_fraction": 0.2,
            "test_fraction": 0.25,
        }


class TestDoctor:
    def test_it_has_a_remedy_for_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extract.checkup, "_LEAST_DISK", 10**18)
        monkeypatch.setattr(extract.checkup, "_LEAST_FILES", 10**12)
        monkeypatch.setattr(extract.checkup, "_OPTIONAL", {"no-such-package": "pip install it"})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        found = {finding["name"]: finding for finding in json.loads(run("doctor", "--json").output)}
        for name in ("disk of this folder", "temporary files", "open files", "no-such-package", "model hub"):
            assert not found[name]["ok"], name
            assert found[name]["remedy"], name
        assert all(bool(finding["remedy"]) != finding["ok"] for finding in found.values())

    def test_a_hub_that_does_not_answer_is_asked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "https://localhost:9")  # where nothing listens
        (line,) = (line for line in run("doctor").output.splitlines() if "model hub" in line)
        assert line.startswith("! ")
        assert "localhost cannot be reached" in line


class TestBackbones:
    def test_those_that_match_are_described(self) -> None:
        (tiny,) = json.loads(run("backbones", "vit_tiny_patch16_224", "--json").output)
        assert (tiny["depth"], tiny["dim"], tiny["num_tokens"], tiny["image_size"]) == (12, 192, 197, [224, 224])
        assert tiny["parameters"] == 5_524_416
        assert "augreg_in21k_ft_in1k" in tiny["weights"]
        assert "12 layers of 197 x 192; 224 px; 907.8 kB an image" in run("backbones", "vit_tiny_patch16_224").output

    def test_a_name_that_matches_nothing_has_near_ones(self) -> None:
        result = run("backbones", "vit_tinny_patch16")
        assert isinstance(result.exception, UserError)
        assert "did you mean 'vit_tiny_patch16" in str(result.exception)


def test_the_shell_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in run("--help").output


@pytest.mark.parametrize("method", ["losa", "last", "lora"])
def test_a_rank_that_is_no_bottleneck_is_refused_before_the_work(
    tiny_config: Callable[..., Config], method: str
) -> None:
    """Such as one with too many zeros; the tokens of the backbone have 32 channels."""
    message = "rank 100,000 is more than 4 times the width 32"
    with pytest.raises(UserError, match=message):
        sc.run(tiny_config(f"methods=[{{name: {method}, rank: 100000}}]"))
    assert not Path(tiny_config().store.path).exists()


def test_samples_that_were_left_out_are_listed(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("data.on_error=skip")
    assert config.data.root
    file = next(config.data.root.rglob("*.png"))
    file.write_bytes(file.read_bytes()[:40])
    sc.extract(config)
    assert file.relative_to(config.data.root).as_posix() in run("inspect", config.store.path).output.replace("\n", "")


def test_a_second_job_on_a_run_directory_is_said_and_named_readably(
    tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["methods=[linear_probe]", "backbone.model_kwargs.depth=2"]
    sc.run(tiny_config(*base))
    assert "another backbone" not in capsys.readouterr().err
    sc.run(tiny_config(*base, "backbone.image_size=64", f"store.path={tiny_config().run_dir}/b.zarr"))
    assert "holds 1 results of another backbone or of other settings of it" in capsys.readouterr().err
    shown = run("report", tiny_config().run_dir).output
    assert "image_size=32" in shown
    assert "image_size=64" in shown
    assert "features=" not in shown
