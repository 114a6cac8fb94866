"""The command line has documented exit statuses, messages of one line, and clean output for scripts."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_job import run_picture_job
from run_command import Command
from small_store import contents

import sidecache as sc
from adapt.config.pipeline import Config
from store.address import store_url
from store.errors import JobError
from store.kvstore import KeyValueStore
from store.lock import hold

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "run",
    "plan",
    "verify",
    "extract",
    "train",
    "report",
    "results",
    "inspect",
    "layers",
    "methods",
    "predict",
    "intrinsic",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a pipeline.yaml whose job has run."""
    return run_picture_job(tmp_path_factory.mktemp("job"))


# Help and usage


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_shows_an_example(command: Command, name: str) -> None:
    status, out, _ = command(name, "--help")
    assert status == 0
    assert f"Example: sidecache {name} " in " ".join(out.split())


def test_the_help_lists_every_command(command: Command) -> None:
    status, out, _ = command("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


def test_no_arguments_print_the_help(command: Command) -> None:
    _, out, err = command()
    assert "Usage: sidecache [OPTIONS] COMMAND" in out + err
    assert "predict" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["run"], "Missing argument 'PIPELINE.YAML'"),
        (["run", "a.yaml", "--bogus"], "No such option: --bogus"),
        (["run", "a.yaml", "-o"], "Option '-o' requires an argument"),
        (["run", "a.yaml", "b.yaml"], "unexpected extra argument"),
        (["methods", "--num-classes", "0"], "Invalid value for '--num-classes'"),
        (["predict"], "Missing argument"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_the_parser(command: Command, arguments: list[str], message: str) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith(("Usage: sidecache ", "Error: "))


# Exit statuses


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (sc.UserError("it is wrong"), 2, "sidecache: it is wrong\n"),
        (JobError("it broke"), 1, "sidecache: it broke\n"),
        (OSError(28, "No space left on device"), 1, "sidecache: [Errno 28] No space left on device\n"),
        (MemoryError(), 1, "sidecache: out of memory; lower train.batch_size or extract.batch_size, or raise"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            1,
            "sidecache: the GPU is out of memory; lower train.batch_size or",
        ),
        (KeyboardInterrupt(), 130, "sidecache: interrupted; the same command goes on from here\n"),
    ],
)
def test_every_failure_has_its_exit_status(
    command: Command, job: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sc, "run", fail)
    found, out, err = command("run", job / "pipeline.yaml")
    assert (found, out) == (status, "")
    assert err.lstrip("\n").startswith(message)


def test_a_defect_of_ours_is_not_hidden(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(sc, "run", fail)
    monkeypatch.setattr(sys, "argv", ["sidecache", "run", str(job / "pipeline.yaml")])
    with pytest.raises(RuntimeError, match="a defect"):
        sc.main()


def test_a_package_of_another_distribution_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sidecache; sys.path.insert(0, {str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.argv = ['sidecache', '--help']; sidecache.main()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "the package 'store' is found at " in done.stderr
    assert "`pip uninstall store`" in done.stderr
    assert "Traceback" not in done.stderr


# Output


def test_a_whole_job_is_quiet_and_clean(command: Command, job: Path) -> None:
    status, out, err = command("run", job / "pipeline.yaml", "-o", "train.seeds=[1]", "-o", "run_dir=other")
    assert status == 0
    assert "linear_probe" in out
    assert "losa" in out
    lines = err.splitlines()
    assert lines[0].startswith("nothing to extract: ")
    assert lines[0].endswith("cache.zarr/ is complete")
    assert lines[1].startswith("features: resident (")
    assert lines[-1] == f"results: {job / 'other' / 'results.json'}, report: {job / 'other' / 'report.html'}"
    assert [line.partition(":")[0] for line in lines[2:-1]] == ["linear_probe seed 1", "losa seed 1"]
    assert all(re.search(r": \d+\.\d\d on test, \d+\.\d\d on validation$", line) for line in lines[2:-1])


def test_extract_train_and_report_are_the_parts_of_run(command: Command, job: Path) -> None:
    moved = ("-o", "store.path=again.zarr", "-o", "run_dir=parts")
    assert command("extract", job / "pipeline.yaml", *moved)[0] == 0
    assert not (job / "parts").exists()
    status, table, _ = command("train", job / "pipeline.yaml", *moved)
    assert status == 0
    assert command("report", job / "parts")[:2] == (0, table)
    ours, theirs = (json.loads((job / run / "results.json").read_text()) for run in ("parts", "run"))
    assert [row["top1"] for row in ours] == [row["top1"] for row in theirs]


def only_document(out: str, err: str) -> Any:
    assert err == ""
    assert out.endswith("\n")
    return json.loads(out)


def test_json_of_inspect_is_one_document(command: Command, job: Path) -> None:
    status, out, err = command("inspect", job / "cache.zarr", "--json")
    document = only_document(out, err)
    assert (status, document["complete"], document["layers"], document["dtype"]) == (0, True, [0, 1, 2], "float32")
    assert command("inspect", job / "cache.zarr")[0] == 0


def test_layers_are_scored_in_tables_in_one_document_and_in_a_figure(
    command: Command, job: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "layers.svg"
    status, out, _ = command("layers", job / "cache.zarr", "--figure", figure)
    assert status == 0
    assert "store.layers: [" in out
    assert figure.read_text().count("<svg") == 1
    status, out, err = command("layers", job / "cache.zarr", "--samples", "12", "--json")
    document = only_document(out, err)
    assert (status, document["n_samples"]) == (0, 12)
    assert [reading["reading"] for reading in document["readings"]] == ["pooled", "grid"]


def test_json_of_methods_is_one_document(command: Command) -> None:
    status, out, err = command("methods", "--backbone", "vit_base_patch16_224", "--num-classes", "10", "--json")
    listed = {method.pop("method"): method for method in only_document(out, err)}
    assert status == 0
    assert listed["linear_probe"] == {
        "needs": "features",
        "trainable_params": 0,
        "head_params": 15370,
        "unavailable": None,
    }
    assert set(listed["losa"]) == set(listed["linear_probe"])
    assert "trained parameters" in command("methods")[1]


def test_methods_that_do_not_serve_a_backbone_are_listed_as_such(command: Command) -> None:
    status, out, err = command("methods", "--backbone", "beit_base_patch16_224", "--json")
    listed = {method["method"]: method for method in only_document(out, err)}
    assert status == 0
    assert [name for name, method in listed.items() if method["unavailable"]] == ["prompt"]
    assert listed["prompt"]["trainable_params"] is listed["prompt"]["head_params"] is None
    status, table, _ = command("methods", "--backbone", "beit_base_patch16_224")
    assert status == 0
    assert "not available" in next(line for line in table.splitlines() if "prompt" in line)
    assert "prompt: " in table


def test_the_package_is_a_command_too() -> None:
    command = [sys.executable, "-m", "sidecache", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert not done.stderr


def test_help_and_import_wait_for_no_torch() -> None:
    code = (
        "import sys, sidecache.command_line as line; line.app(['--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_reader_that_stops_early_causes_no_traceback(job: Path) -> None:
    command = f"{sys.executable} -m sidecache inspect {job / 'cache.zarr'} --json | head -c 0"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_configuration_that_a_run_keeps_repeats_it(job: Path) -> None:
    assert sc.load_config(job / "run" / "config.yaml") == sc.load_config(job / "pipeline.yaml")


# Inspect and report


def test_an_incomplete_store_is_reported(command: Command, job: Path) -> None:
    status_file = next((job / "cache.zarr" / "train" / "status").glob("c/*"))
    assert command("extract", job / "pipeline.yaml", "-o", "store.path=part.zarr")[0] == 0
    (job / "part.zarr" / status_file.relative_to(job / "cache.zarr")).unlink()
    status, out, err = command("inspect", job / "part.zarr", "--json")
    document = only_document(out, err)
    assert (status, document["complete"]) == (0, False)
    assert len(document["splits"]["train"]["missing_shards"]) == 1
    assert "1 of 5 shards missing" in command("inspect", job / "part.zarr")[1]
    status, _, err = command("train", job / "pipeline.yaml", "-o", "store.path=part.zarr", "-o", "run_dir=part")
    assert status == 1
    assert "lacks 1 of 5 shards of train; finish it with `sidecache extract`" in err


def test_damaged_shards_are_listed_and_extracted_again(command: Command, job: Path) -> None:
    store = job / "cache.zarr"
    before = contents(store)
    file = store / "train" / "layer_01" / "c" / "2" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    status, out, _ = command("verify", store, "--json")
    (damage,) = json.loads(out)["damaged"]
    assert (status, damage["split"], damage["layer"], damage["shard"], damage["rows"]) == (1, "train", 1, 2, [10, 15])
    status, _, err = command("train", job / "pipeline.yaml", "-o", "train.seeds=[7]")
    assert status == 1
    assert "shard 2 of train" in err
    other = ("-o", f"store.path={job / 'other.zarr'}")
    status, _, err = command("verify", store, "--repair", job / "pipeline.yaml", *other)
    assert status == 2
    assert "give the job that made this one" in err
    damaged = contents(store)
    for other in ("store.dtype=int8", f"data.root={job / 'gone'}", f"data.root={job / 'images/train'}"):
        assert command("verify", store, "--repair", job / "pipeline.yaml", "-o", other)[0] == 2
        assert contents(store) == damaged  # a job that cannot repair the store changes nothing
    status, out, err = command("verify", store, "--repair", job / "pipeline.yaml")
    assert status == 0
    assert "sound; complete" in out
    assert "extracted 5 samples" in err
    assert contents(store) == before


def test_a_second_job_on_a_store_is_refused(command: Command, job: Path) -> None:
    path = job / "held.zarr"
    with hold(KeyValueStore(store_url(path))):
        status, _, err = command("extract", job / "pipeline.yaml", "-o", f"store.path={path}")
    assert status == 1
    assert "is in use by" in err
    assert command("extract", job / "pipeline.yaml", "-o", f"store.path={path}")[0] == 0


@pytest.mark.parametrize("name", ["inspect", "train"])
def test_a_store_that_does_not_exist_is_reported(command: Command, job: Path, name: str) -> None:
    arguments = [job / "none.zarr"] if name == "inspect" else [job / "pipeline.yaml", "-o", "store.path=none.zarr"]
    status, out, err = command(name, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("sidecache: there is no store at ")
    assert err.endswith("make one with `sidecache extract`\n")
    assert not (job / "none.zarr").exists()


def test_a_folder_that_is_no_store_is_reported(command: Command, job: Path) -> None:
    (job / "zarr").mkdir()
    (job / "zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    status, _, err = command("inspect", job / "zarr")
    assert status == 2
    assert "is not a token store" in err


def test_a_run_without_results_is_reported(command: Command, job: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", job / "pipeline.yaml"):
        assert command("report", folder) == (
            2,
            "",
            f"sidecache: no results in {folder}: run `sidecache run` first\n",
        )


# Predictions


def test_names_that_outsiders_use_are_there() -> None:
    assert all(getattr(sc, name) for name in sc.__all__)
    assert isinstance(sc.load_config({"backbone": {"weights": "random"}}), Config)
    with pytest.raises(AttributeError, match="module 'sidecache' has no attribute 'nope'"):
        sc.nope  # noqa: B018


@pytest.fixture
def own_job(job: Path, tmp_path: Path) -> Path:
    """A copy of the job's images and pipeline, without its store and results."""
    shutil.copytree(job / "images", tmp_path / "images")
    shutil.copy(job / "pipeline.yaml", tmp_path)
    return tmp_path


def test_a_store_is_not_made_among_other_files(command: Command, own_job: Path) -> None:
    before = contents(own_job)
    for path in ("images", "images/train", "."):
        status, _, err = command("extract", own_job / "pipeline.yaml", "-o", f"store.path={own_job / path}")
        assert status == 2
        assert "is not a store, but has other files" in err
    assert contents(own_job) == before
    (own_job / "empty").mkdir()
    assert command("extract", own_job / "pipeline.yaml", "-o", f"store.path={own_job / 'empty'}")[0] == 0


def test_samples_that_are_left_out_are_told(command: Command, own_job: Path) -> None:
    (own_job / "images/train/red/0.png").write_bytes(b"no image")
    status, _, err = command("extract", own_job / "pipeline.yaml", "-o", "data.on_error=skip")
    assert status == 0
    assert "1 samples could not be decoded and are left out" in err


def test_a_split_that_none_of_whose_samples_can_be_decoded_is_told(command: Command, own_job: Path) -> None:
    for path in (own_job / "images/test").rglob("*.png"):
        path.write_bytes(b"no image")
    status, _, err = command("run", own_job / "pipeline.yaml", "-o", "data.on_error=skip")
    assert status == 1
    assert "has no sample of test: none of them could be decoded" in err


def test_a_split_that_is_not_used_is_told(command: Command, own_job: Path) -> None:
    shutil.copytree(own_job / "images/test", own_job / "images/val")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = command("extract", own_job / "pipeline.yaml")
    assert status == 0
    assert "note: source folder at" in err
    assert "val is used neither for training nor for testing" in err


def test_the_version_is_printed(command: Command) -> None:
    assert command("--version") == (0, f"{sc.__version__}\n", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[linear_probe, {name: kronecker, n: 7}]", "n: 7 does not divide"),
        ("methods=[linear_probe, {name: losa, pool: cls}]", "pool 'cls' reads the class token"),
        ("train.device=gpu", "device 'gpu' cannot be used here"),
        ("methods=[lora] store.tokens=cls", "end-to-end methods need store.tokens: all"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_extracted(
    command: Command, own_job: Path, override: str, message: str
) -> None:
    keys = re.split(r" (?=store)", override)
    status, _, err = command("run", own_job / "pipeline.yaml", *(word for key in keys for word in ("-o", key)))
    assert status == 2
    assert message in err
    assert {path.name for path in own_job.iterdir()} == {"images", "pipeline.yaml"}


def test_a_report_is_called_as_the_job(command: Command, own_job: Path) -> None:
    assert command("run", own_job / "pipeline.yaml", "-o", "methods=[linear_probe]")[0] == 0
    page = own_job / "run/report.html"
    assert "<h1>run</h1>" in page.read_text(encoding="utf-8")
    assert command("run", own_job / "pipeline.yaml", "-o", "methods=[linear_probe]", "-o", "name=a & b")[0] == 0
    assert "<h1>a &amp; b</h1>" in page.read_text(encoding="utf-8")
    assert command("report", own_job / "run")[0] == 0
    assert "<h1>a &amp; b</h1>" in page.read_text(encoding="utf-8")
