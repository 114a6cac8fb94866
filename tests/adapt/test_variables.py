"""The value of a `${VARIABLE}` is used by the job and never written; written files hold the variable and load again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from tiny_vit import TINY

import sidecache as sc
from adapt.adaptors.backbone import _expanded
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.config.variables import ExpandedText, expand
from adapt.job.extraction import at_store
from adapt.run_dir.config_file import read_config, write_config
from extract.backbones.backbone import TimmBackbone
from extract.config import BackboneConfig
from store.errors import UserError

SECRET = "hunter2"


def document(**changes: Any) -> dict[str, Any]:
    return {"backbone": {"name": "vit_tiny_patch16_224", "weights": "random"}} | changes


def write_and_read(config: Config, tmp_path: Path) -> tuple[str, Config]:
    """The text that a job writes, and the configuration that it is read as."""
    config = config.model_copy(update={"run_dir": tmp_path / "kept"})
    (tmp_path / "kept").mkdir(exist_ok=True)
    write_config(config)
    file = tmp_path / "kept" / "config.yaml"
    return file.read_text(), load_config(file)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("s3://${TOKEN}@host/cache.zarr", f"s3://{SECRET}@host/cache.zarr"),
        ("https://host/cache.zarr?token=${TOKEN}", f"https://host/cache.zarr?token={SECRET}"),
        ("${TOKEN}/cache.zarr", f"FOLDER/{SECRET}/cache.zarr"),
        ("../a/${TOKEN}/../cache.zarr", "PARENT/a/cache.zarr"),
        ("${ROOT}/${TOKEN}", f"/data/{SECRET}"),
        ("/x/${TOKEN}", f"/x/{SECRET}"),
        ("~/${TOKEN}", f"HOME/{SECRET}"),
    ],
)
@pytest.mark.parametrize("key", ["store.path", "data.root", "backbone.weights"])
def test_a_path_is_kept_as_written_and_resolves_to_the_same_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, value: str, key: str
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("ROOT", "/data")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document()))
    config = load_config(folder / "pipeline.yaml", [f"{key}={written}"])
    section, name = key.split(".")
    if key == "store.path":  # the others take no URL
        places = {"FOLDER": folder, "PARENT": tmp_path, "HOME": tmp_path / "home"}
        for place, path in places.items():
            value = value.replace(place, str(path))
        assert config.store.path == value
    text, again = write_and_read(config, tmp_path)
    assert SECRET not in text
    assert "${TOKEN}" in text
    assert getattr(getattr(again, section), name) == getattr(getattr(config, section), name)
    assert again.as_written() == config.as_written() | {"run_dir": str(tmp_path / "kept")}


def test_every_text_of_a_configuration_is_kept_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("POOL", "mean")
    methods = ["linear_probe", {"name": "losa", "pool": "${POOL}"}]
    source = document(name="of ${TOKEN}", methods=methods, sweep={"pool": ["cls", "${POOL}"]}, run_dir="${TOKEN}")
    text, again = write_and_read(load_config(source), tmp_path)
    assert SECRET not in text
    written = yaml.safe_load(text)
    assert written["methods"][1]["pool"] == "${POOL}"
    assert written["sweep"]["pool"] == ["cls", "${POOL}"]
    assert again.methods[1] == {"name": "losa", "pool": "mean"}
    assert again.name == f"of {SECRET}"


@pytest.mark.parametrize(
    ("written", "value", "now", "rewritten"),
    [
        ("s3://${T}/c.zarr", "s3://t/c.zarr", "s3://t/c-2.zarr", "s3://${T}/c-2.zarr"),
        ("${T}", "/a/c.zarr", "/a/c-2.zarr", "${T}"),
        ("${A}/${B}/c", "/a/b/c", "/a/b/c-2", "${A}/${B}/c-2"),
        ("${A}/c", "/a/c", "/elsewhere", "${A}/c"),
    ],
)
def test_a_store_beside_the_first_is_written_without_the_value(
    written: str, value: str, now: str, rewritten: str
) -> None:
    assert ExpandedText(("store", "path"), written, value).restore(now) == rewritten


def test_the_kept_configuration_has_the_path_of_a_store_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    config = load_config(document(store={"path": "/x/${TOKEN}/c.zarr"}))
    text, again = write_and_read(at_store(config, f"/x/{SECRET}/c-2.zarr"), tmp_path)
    assert SECRET not in text
    assert again.store.path == f"/x/{SECRET}/c-2.zarr"


def test_a_run_leaves_no_value_in_any_file_and_its_adaptors_load(
    tiny_config: Callable[..., Config],
    tiny_backbone: TimmBackbone,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    (tmp_path / SECRET).mkdir()
    save_file(tiny_backbone.module.state_dict(), tmp_path / SECRET / "w.safetensors")
    image_folder.rename(tmp_path / SECRET / "images")
    places = [f"store.path={tmp_path}/${{TOKEN}}/c.zarr", f"data.root={tmp_path}/${{TOKEN}}/images"]
    weights = f"{tmp_path}/${{TOKEN}}/w.safetensors"
    config = tiny_config("methods=[linear_probe]", "name=of ${TOKEN}", *places, f"backbone.weights={weights}")
    assert config.backbone.model_kwargs == TINY
    sc.run(config)
    files = [path for path in config.run_dir.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "results.json"} < {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    stored = [path for path in (tmp_path / SECRET / "c.zarr").rglob("*") if path.is_file()]
    assert [path for path in stored if SECRET.encode() in path.read_bytes()] == []
    assert read_config(config.run_dir)[1] == "of ${TOKEN}"
    (adaptor,) = (config.run_dir / "adaptors").glob("*.safetensors")
    assert sc.load_adaptor(adaptor, device="cpu").card.backbone.weights == weights
    monkeypatch.delenv("TOKEN")
    with pytest.raises(UserError, match="the environment variable TOKEN is not set; set it, or write the path out"):
        sc.load_adaptor(adaptor, device="cpu")


def test_no_variable_of_a_card_is_sent_to_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    hub, local = (BackboneConfig(weights=weights) for weights in ("hf-hub:evil/${TOKEN}", "/x/${TOKEN}"))
    assert _expanded(hub) == hub
    assert _expanded(local).weights == f"/x/{SECRET}"


def test_the_value_of_a_variable_is_not_expanded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "${OTHER}")
    assert expand({"a": ["${TOKEN}", 3]}) == {"a": ["${OTHER}", 3]}
    text, again = write_and_read(load_config(document(name="${TOKEN}")), tmp_path)
    assert "name: ${TOKEN}" in text
    assert again.name == "${OTHER}"
