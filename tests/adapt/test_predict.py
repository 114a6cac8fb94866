"""An adaptor classifies paths, pictures and arrays in any mix as it classifies preprocessed tensors; several share."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from saved_adaptors import BACKBONE, card_for, forge_card, trained
from torch import nn

import sidecache as sc
from adapt.adaptors import adaptor as adaptor_module
from adapt.adaptors.adaptor import Adaptor
from adapt.adaptors.files import load_adaptor, load_adaptors, save_adaptor
from adapt.job.adaptor_costs import measure_costs
from extract.backbones.backbone import TimmBackbone
from extract.backbones.hub_cache import cached_weights
from extract.forward.frozen_forward import FrozenForward
from store.errors import JobError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def save(folder: Path, made_for: TimmBackbone, method: str, name: str = "", **changes: Any) -> Path:
    path = folder / f"{name or method}.safetensors"
    save_adaptor(path, trained(method, made_for), card_for(method, made_for, **changes))
    return path


@pytest.fixture
def adaptor(tiny_backbone: TimmBackbone, folder: Path) -> Adaptor:
    return load_adaptor(save(folder, tiny_backbone, "losa"), tiny_backbone, "cpu")


@pytest.fixture
def pictures(folder: Path) -> list[Path]:
    draw, files = np.random.default_rng(0), []
    for number in range(5):
        files.append(folder / f"{number}.png")
        Image.fromarray(draw.integers(0, 256, (32 + number, 40, 3), np.uint8)).save(files[-1])
    return files


# Items


def test_paths_pictures_and_arrays_are_the_same(adaptor: Adaptor, pictures: list[Path]) -> None:
    opened = [Image.open(file) for file in pictures]
    kinds: list[Sequence[Any]] = [pictures, [str(file) for file in pictures], opened, [np.asarray(i) for i in opened]]
    tensors = torch.stack([adaptor.transform(image) for image in opened])
    expected = adaptor.probabilities(tensors)
    for items in (*kinds, [kinds[k % 4][k] for k in range(5)]):
        torch.testing.assert_close(adaptor.probabilities(items), expected, rtol=1e-5, atol=1e-6)
        found = adaptor.predict(items)
        assert [list(one.probabilities.values()) for one in found] == [
            pytest.approx(row, abs=1e-6) for row in expected.tolist()
        ]
    assert [one.name for one in adaptor.predict([pictures[0], opened[1]])] == [str(pictures[0]), "image 1"]


def test_a_single_item_is_a_list_of_one(adaptor: Adaptor, pictures: list[Path]) -> None:
    for item in (pictures[0], str(pictures[0]), Image.open(pictures[0]), np.asarray(Image.open(pictures[0]))):
        (one,) = adaptor.predict(item)
        assert one.label == max(one.probabilities, key=lambda name: one.probabilities[name])
        assert one.probability == one.probabilities[one.label]
        assert (one.error, one.adaptor) == (None, "losa")
        assert adaptor.probabilities(item).shape == (1, 3)
    assert adaptor.predict([]) == []


def test_a_picture_of_any_mode_is_upright_rgb(adaptor: Adaptor, pictures: list[Path]) -> None:
    image = Image.open(pictures[0])
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    expected = adaptor.transform(image)
    assert torch.equal(adaptor.transform(turned), expected)
    assert torch.equal(adaptor.transform(image.convert("RGBA")), expected)
    assert adaptor.predict([turned, image.convert("RGBA")])[0].probabilities == pytest.approx(
        adaptor.predict(image)[0].probabilities, abs=1e-6
    )


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (torch.zeros(2, 3, 32, 32), "a tensor is no picture; give preprocessed tensors to `probabilities`"),
        ([torch.zeros(3, 32, 32)], "image 0 is of type Tensor; legal: paths, PIL images, and arrays"),
        ([3], "image 0 is of type int"),
        (np.zeros((3, 32, 32), np.uint8), r"image 0 is an array of shape \(3, 32, 32\) and type uint8; legal: "),
        (np.zeros((32, 32, 3), np.float32), "type float32"),
        ("none.png", "cannot read none.png: No such file or directory"),
    ],
)
def test_what_is_no_picture_is_refused(adaptor: Adaptor, items: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adaptor.predict(items)


def test_the_top_classes_come_first(adaptor: Adaptor, pictures: list[Path]) -> None:
    every, ranked = adaptor.predict(pictures), adaptor.predict(pictures, top=2)
    for one, other in zip(every, ranked, strict=True):
        assert list(one.probabilities) == ["a", "b", "c"]
        best = sorted(one.probabilities.values(), reverse=True)[:2]
        assert list(other.probabilities.values()) == pytest.approx(best, abs=1e-6)
        assert next(iter(other.probabilities)) == other.label == one.label
    with pytest.raises(UserError, match="top is 0; give a number of classes, 1 or more"):
        adaptor.predict(pictures, top=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_file_that_cannot_be_read_leaves_the_others(adaptor: Adaptor, pictures: list[Path], batch: int) -> None:
    object.__setattr__(adaptor.forward, "batch_size", lambda samples: batch)
    expected = {one.name: one.probabilities for one in adaptor.predict(pictures)}
    pictures[1].write_bytes(pictures[1].read_bytes()[:100])
    items = [*pictures, pictures[0].with_name("none.png")]
    found = adaptor.predict(items, on_error="skip")
    assert [one.name for one in found] == [str(item) for item in items]
    assert [k for k, one in enumerate(found) if one.error] == [1, 5]
    assert (found[1].label, found[1].probability, found[1].probabilities) == (None, None, {})
    assert str(found[1].error).startswith(f"sample '{pictures[1]}' cannot be decoded: ")
    assert "data.on_error" not in str(found[1].error)
    for one in found:
        assert one.error or one.probabilities == pytest.approx(expected[one.name], abs=1e-6)
    with pytest.raises(UserError, match='from Python on_error="skip"'):
        adaptor.predict(pictures)


def test_an_output_that_is_not_finite_is_no_prediction(
    adaptor: Adaptor, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.full((*x.shape[:-1], self.out_features), torch.nan))
    with pytest.raises(JobError, match="the output of losa is not finite"):
        adaptor.predict(pictures)


# Several adaptors


def test_adaptors_share_one_pass_of_the_layers_that_any_of_them_reads(
    tiny_backbone: TimmBackbone, folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        save(folder, tiny_backbone, "linear_probe", layers=(1,)),
        save(folder, tiny_backbone, "losa"),
        save(folder, tiny_backbone, "knn"),
    ]
    save_file(tiny_backbone.module.state_dict(), folder / "w.safetensors")
    adaptors = load_adaptors(paths, "cpu", weights=folder / "w.safetensors")
    alone = [one.predict(pictures) for one in adaptors]
    passes, run = list[Any](), FrozenForward.__call__

    def watched(self: FrozenForward, images: torch.Tensor, layers: Any = None) -> Any:
        passes.append(layers)
        return run(self, images, layers)

    monkeypatch.setattr(FrozenForward, "__call__", watched)
    together = sc.predict(adaptors, pictures)
    assert passes == [[0, 1, 2]], "one batch"
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.name, one.adaptor) == (other.name, other.adaptor)
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"weights_digest": "x"}, {"preprocessing_digest": "x"}, {"precision": "bfloat16"}, {"tokens": {"pool": 2}}],
)
def test_adaptors_that_cannot_share_are_refused(
    tiny_backbone: TimmBackbone, folder: Path, changes: dict[str, Any]
) -> None:
    one, other = (save(folder, tiny_backbone, "linear_probe", name) for name in ("one", "other"))
    forge_card(other, **changes)
    with pytest.raises(
        UserError, match=f"one.safetensors and .*other.safetensors cannot share .*{next(iter(changes))}"
    ):
        load_adaptors([one, other], "cpu")


def test_the_cost_of_an_adaptor_is_counted_besides_the_backbone(adaptor: Adaptor) -> None:
    costs = measure_costs([adaptor])
    assert costs.backbone is not None
    assert costs.backbone.gflops is not None
    (own,) = costs.adaptors
    assert own.gflops is not None
    assert 0 < own.gflops < costs.backbone.gflops
    assert min(own.milliseconds, costs.backbone.milliseconds) > 0


# Raw pixels


def warned_by(adaptor: Adaptor, images: torch.Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adaptor.probabilities(images)
    assert all(issubclass(warning.category, UserWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("scale", ["uint8", 255.0, 1.0])
def test_pixels_that_were_never_normalized_are_warned_of_once(
    adaptor: Adaptor, pictures: list[Path], scale: Any
) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file).resize((32, 32))) for file in pictures]))
    images = pixels.permute(0, 3, 1, 2)
    images = images if scale == "uint8" else images / 255 * scale
    (message,) = warned_by(adaptor, images)
    assert "use adaptor.transform" in message
    assert warned_by(adaptor, images) == []


def test_normalized_pixels_are_not_warned_of(adaptor: Adaptor, pictures: list[Path]) -> None:
    white = Image.new("RGB", (32, 32), "white")
    for image in (*map(Image.open, pictures), white, Image.new("RGB", (32, 32))):
        images = adaptor.transform(image)[None]
        if image is not white:  # its values are all 1
            assert warned_by(adaptor, images) == []
    assert warned_by(adaptor, torch.zeros(2, 3, 32, 32)) == []
    with mock.patch.object(adaptor_module, "shared_logits", return_value=[torch.zeros(0, 3)]):
        assert warned_by(adaptor, torch.zeros(0, 3, 32, 32)) == []


# Weights


def test_weights_are_found_in_the_cache_of_the_hub_if_they_are_the_same(
    tiny_backbone: TimmBackbone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = BACKBONE.model_copy(update={"weights": str(folder / "gone.safetensors")})
    path = save(folder, tiny_backbone, "losa", backbone=gone)
    cache = {"timm/vit_tiny_patch16_224.augreg_in21k": 1.0, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k": 0.0}
    for number, shift in enumerate(cache.values()):
        state = {name: tensor + shift for name, tensor in tiny_backbone.module.state_dict().items()}
        save_file(state, folder / f"{number}.safetensors")
    files = {name: str(folder / f"{number}.safetensors") for number, name in enumerate(cache)}
    monkeypatch.setattr(
        "extract.backbones.hub_cache.try_to_load_from_cache",
        lambda name, file: files.get(name) if file == "model.safetensors" else None,
    )
    assert load_adaptor(path, device="cpu").card == card_for("losa", tiny_backbone, backbone=gone)
    Path(files["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"]).unlink()
    del files["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"]
    with pytest.raises(UserError, match=r"nor in the cache of the model hub \(of another content: .*0.safetensors\)"):
        load_adaptor(path, device="cpu")


def test_the_hubs_cache_is_searched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "vit_tiny_patch16_224.augreg_in21k"
    snapshot = tmp_path / f"models--timm--{name}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    assert cached_weights(name) == cached_weights(name.partition(".")[0]) == [snapshot / "model.safetensors"]
    assert cached_weights("vit_tiny_patch16_224.augreg_in21k_ft_in1k") == []
    assert cached_weights("no_such_model") == []


def test_weights_and_backbone_together_are_refused(tiny_backbone: TimmBackbone, folder: Path) -> None:
    with pytest.raises(UserError, match="backbone and weights were both given"):
        load_adaptor(save(folder, tiny_backbone, "losa"), tiny_backbone, "cpu", weights="w.safetensors")
