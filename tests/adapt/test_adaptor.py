"""A saved adaptor gives the same logits again, and only on the backbone that it was trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from saved_adaptors import BACKBONE, OPTIONS, card_for, forge_card, trained
from torch import nn

import sidecache as sc
from adapt.adaptors.files import load_adaptor, save_adaptor
from adapt.config.pipeline import Config
from extract.backbones.backbone import TappedBackbone, TimmBackbone, digests, load_backbone
from extract.config import ExtractConfig
from extract.forward.frozen_forward import FrozenForward
from store.errors import JobError, UserError


@pytest.fixture(params=list(OPTIONS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def saved(method: str, tiny_backbone: TimmBackbone, tmp_path: Path) -> Path:
    path = tmp_path / "adaptors" / f"{method}-seed0.safetensors"
    save_adaptor(path, trained(method, tiny_backbone), card_for(method, tiny_backbone))
    return path


def refuse(path: Path, backbone: TimmBackbone | None = None) -> str:
    with pytest.raises(UserError) as refused:
        load_adaptor(path, backbone, "cpu")
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Saving and loading


def test_the_file_holds_trained_tensors_and_the_standardization_only(
    method: str, saved: Path, tiny_backbone: TimmBackbone
) -> None:
    model, tensors = trained(method, tiny_backbone), load_file(saved)
    moved = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    samples = {"samples", "labels", "multi_label"} if method == "knn" else set()
    assert set(tensors) == moved | {"readout.mean", "readout.std"} | {f"readout.head.{name}" for name in samples}
    state = model.state_dict()
    assert set(state) - set(tensors) == {"readout.tail.model.norm.weight", "readout.tail.model.norm.bias"}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)
    assert {file.name for file in saved.parent.iterdir()} == {saved.name, saved.with_suffix(".json").name}


@torch.no_grad()
@pytest.mark.parametrize("pass_backbone", [True, False])
def test_a_loaded_adaptor_gives_identical_logits(
    method: str, saved: Path, tiny_backbone: TimmBackbone, pass_backbone: bool
) -> None:
    adaptor = load_adaptor(saved, tiny_backbone if pass_backbone else None, "cpu")
    images = torch.randn(4, 3, 32, 32)
    tokens = tiny_backbone.tokens(images, [0, 1, 2])
    expected = trained(method, tiny_backbone)(tokens)
    assert torch.equal(adaptor.model(adaptor.forward(images)), expected)
    assert torch.equal(adaptor.probabilities(images), expected.softmax(dim=1))
    assert not adaptor.model.training


def test_the_card_survives_the_file(method: str, saved: Path, tiny_backbone: TimmBackbone) -> None:
    assert load_adaptor(saved, tiny_backbone, "cpu").card == card_for(method, tiny_backbone)


@torch.no_grad()
def test_multi_label_probabilities_are_sigmoids(saved: Path, tiny_backbone: TimmBackbone) -> None:
    adaptor = load_adaptor(forge_card(saved, multi_label=True), tiny_backbone, "cpu")
    images = torch.randn(4, 3, 32, 32)
    logits = adaptor.model(adaptor.forward(images))
    torch.testing.assert_close(adaptor.probabilities(images), 1 / (1 + (-logits).exp()))
    assert not torch.allclose(adaptor.probabilities(images).sum(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("call", "refused"),
    [
        ("adapt.adaptors.files.save_file", SafetensorError("I/O error: No space left on device")),
        ("store.local.durable_files.os.fsync", OSError(28, "full")),
    ],
)
def test_a_disk_that_refuses_is_one_line_and_the_old_adaptor_stays(
    tiny_backbone: TimmBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, refused: Exception
) -> None:
    path, card = tmp_path / "a.safetensors", card_for("linear_probe", tiny_backbone)
    save_adaptor(path, trained("linear_probe", tiny_backbone), card)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(call, mock.Mock(side_effect=refused))
    with pytest.raises(JobError, match=r"a\.safetensors cannot be written \(.*(No space left|full).*\)"):
        save_adaptor(path, trained("linear_probe", tiny_backbone), card)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@torch.no_grad()
def test_the_tokens_of_the_card_are_what_the_model_gets(tiny_backbone: TimmBackbone, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = sc.create_model("linear_probe", tiny_backbone, 3, pool="mean")
    card = card_for("linear_probe", tiny_backbone, tokens={"pool": 2}, options={"pool": "mean"}, layers=(1,))
    save_adaptor(path, model, card)
    adaptor = load_adaptor(path, tiny_backbone, "cpu")
    assert {k: v.shape for k, v in adaptor.forward(torch.randn(1, 3, 32, 32)).items()} == {1: (1, 5, 32)}
    assert adaptor.model.layers == (1,)


def test_predictions_come_in_the_order_of_the_files(saved: Path, tiny_backbone: TimmBackbone, tmp_path: Path) -> None:
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        Image.effect_noise((40, 32), 20 + 10 * number).save(files[-1])
    adaptor = load_adaptor(saved, tiny_backbone, "cpu")
    one_by_one = [adaptor.predict(file)[0] for file in files]
    object.__setattr__(adaptor.forward, "batch_size", lambda samples: 2)
    together = adaptor.predict(files)
    assert [prediction.name for prediction in together] == [str(file) for file in files]
    for single, batched in zip(one_by_one, together, strict=True):
        assert single.label == batched.label
        assert single.probabilities == pytest.approx(batched.probabilities, abs=1e-6)
        assert single.probability == max(single.probabilities.values())


def test_a_job_writes_an_adaptor_for_every_row(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.epochs=1", "store.tokens={pool: 2}", "store.dtype=int8")
    rows = sc.run(config)
    for row in rows:
        path = config.run_dir / "adaptors" / f"{row.method}-seed0-{row.trial_id[:8]}.safetensors"
        card = load_adaptor(path, device="cpu").card
        assert (card.method, card.options, card.metrics["top1"]) == (row.method, row.options, row.top1)
        tensors = load_file(path)
        width = len(tensors.pop("readout.mean")) + len(tensors.pop("readout.std"))
        assert width == 2 * (2 * 32)  # mean and deviation, of class token and patch mean
        assert sum(tensor.numel() for tensor in tensors.values()) == row.trainable_params + row.head_params


# Refusals


def test_another_backbone_is_refused_by_its_digest(saved: Path) -> None:
    other = load_backbone(BACKBONE)
    other.module.blocks[0].mlp.fc1.bias.data[0] += 1
    message = refuse(saved, other)
    assert f"{saved} was trained on another backbone: weights_digest is " in message
    assert f"here it is {digests(other)['weights_digest']}; give the backbone it was trained on (vit_tiny" in message


def test_another_preprocessing_is_refused_by_its_digest(saved: Path) -> None:
    other = load_backbone(BACKBONE)
    other.transform = lambda image: torch.zeros(3, 32, 32)
    assert "was trained on another backbone: preprocessing_digest is " in refuse(saved, other)


def test_a_users_module_can_be_given_as_the_backbone(tiny_backbone: TimmBackbone, tmp_path: Path) -> None:
    def tap(module: nn.Module, images: torch.Tensor) -> dict[int, torch.Tensor]:
        return {0: module(images.flatten(2))}

    tapped = TappedBackbone(nn.Linear(16, 8), tap, torch.zeros(3, 4, 4))
    path = tmp_path / "a.safetensors"
    card = card_for("linear_probe", tiny_backbone, layers=(0,), options={"pool": "mean"}, **digests(tapped))
    save_adaptor(path, sc.create_model("linear_probe", tapped, 3, pool="mean"), card)
    assert load_adaptor(path, tapped, "cpu").probabilities(torch.zeros(2, 3, 4, 4)).shape == (2, 3)


def test_a_missing_file_or_card_is_reported(saved: Path, tiny_backbone: TimmBackbone) -> None:
    assert refuse(saved.with_name("none.safetensors")).startswith("there is no adaptor ")
    assert refuse(saved.parent).startswith("there is no adaptor ")
    card = saved.with_suffix(".json")
    card.unlink()
    assert refuse(saved, tiny_backbone) == f"cannot read {card}, the card of an adaptor: No such file or directory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: "),
        ("[]", "is no adaptor's card: "),
        ("null", "is no adaptor's card: it is not a JSON object"),
        ("[[", "is no JSON: "),
        ("{}", "is no adaptor's card: its content does not match its checksum: it was damaged, or edited by hand; "),
        ("\xff", "is no JSON: "),
    ],
)
def test_a_damaged_card_is_reported(saved: Path, tiny_backbone: TimmBackbone, text: str, message: str) -> None:
    saved.with_suffix(".json").write_bytes(text.encode("latin-1"))
    assert message in refuse(saved, tiny_backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lossa"}, "there is no method 'lossa'; legal: linear_probe, "),
        ({"options": {"rnk": 3}}, "is damaged: rnk: unknown key; legal keys here: "),
        ({"options": {"pool": 3}}, "is damaged: pool: given 3; "),
        ({"layers": [0, 7]}, "is damaged: layers [7] do not exist: this backbone has 3, numbered 0 to 2"),
        ({"layers": []}, "is damaged: layers [] do not exist"),
        ({"layers": "all"}, "is no adaptor's card: layers: "),
        ({"tokens": {"pool": 3}}, "3, which does not divide the grid (4, 4)"),
        ({"precision": "float8"}, "is no adaptor's card: precision: "),
        ({"classes": 3}, "is no adaptor's card: classes: "),
        ({"extra": 3}, "is no adaptor's card: extra: "),
        ({"backbone": {"name": "x"}}, "is no adaptor's card: backbone.weights: "),
        ({"classes": ["a", "b"]}, "does not hold the tensors that its card describes: [('readout.head."),
    ],
)
def test_a_card_with_a_wrong_field_is_reported(
    saved: Path, tiny_backbone: TimmBackbone, changes: dict[str, Any], message: str
) -> None:
    assert message in refuse(forge_card(saved, **changes), tiny_backbone)


def edited(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[-1]
    if how == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != name}
    if how == "extra":
        return tensors | {"extra": torch.zeros(1)}
    return tensors | {name: tensors[name][..., :-1].contiguous()}


@pytest.mark.parametrize("how", ["missing", "extra", "shape"])
def test_other_tensors_than_the_card_describes_are_refused(saved: Path, tiny_backbone: TimmBackbone, how: str) -> None:
    save_file(edited(load_file(saved), how), saved)
    forge_card(saved)
    assert f"{saved} does not hold the tensors that its card describes: [(" in refuse(saved, tiny_backbone)


@pytest.mark.parametrize("keep", [0, 20, 200])
def test_a_damaged_file_is_refused(saved: Path, tiny_backbone: TimmBackbone, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    assert f"{saved} is not the file of tensors that {saved.with_suffix('.json')} was" in refuse(saved, tiny_backbone)
    forge_card(saved)
    assert f"cannot read the adaptor {saved}: " in refuse(saved, tiny_backbone)


def test_the_card_of_another_adaptor_is_refused(tiny_backbone: TimmBackbone, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    for bias, path in enumerate((one, other)):
        save_adaptor(path, trained("linear_probe", tiny_backbone), card_for("linear_probe", tiny_backbone))
        save_file(load_file(path) | {"readout.head.bias": torch.full((3,), float(bias))}, path)
        forge_card(path)
    one.with_suffix(".json").rename(other.with_suffix(".json"))
    message = refuse(other, tiny_backbone)
    assert message.startswith(f"{other} is not the file of tensors that {other.with_suffix('.json')} was written with;")
    assert "put back card and tensors as they were written together, or delete both and train again" in message


def test_an_adaptor_may_be_renamed_and_its_weights_moved(tiny_backbone: TimmBackbone, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adaptor(path, trained("linear_probe", tiny_backbone), card_for("linear_probe", tiny_backbone))
    for ending in (".json", ".safetensors"):
        path.with_suffix(ending).rename(tmp_path / f"best{ending}")
    path = tmp_path / "best.safetensors"
    save_file(tiny_backbone.module.state_dict(), tmp_path / "moved.safetensors")
    card = json.loads(path.with_suffix(".json").read_text())
    card["backbone"]["weights"] = str(tmp_path / "moved.safetensors")
    path.with_suffix(".json").write_text(json.dumps(card))
    images = torch.randn(4, 3, 32, 32)
    expected = load_adaptor(path, tiny_backbone, "cpu").probabilities(images)
    assert torch.equal(load_adaptor(path, device="cpu").probabilities(images), expected)
    card["classes"] = card["classes"][::-1]
    path.with_suffix(".json").write_text(json.dumps(card))
    assert "does not match its checksum: it was damaged, or edited by hand" in refuse(path)


def test_nothing_reaches_the_backbone(saved: Path, tiny_backbone: TimmBackbone) -> None:
    adaptor = load_adaptor(saved, tiny_backbone, "cpu")
    assert not any(tensor.requires_grad for tensor in tiny_backbone.module.parameters())
    forward = FrozenForward(tiny_backbone, [0], "all", ExtractConfig(device="cpu"))
    assert not forward(torch.randn(1, 3, 32, 32))[0].requires_grad
    assert adaptor.forward.precision == "float32"
