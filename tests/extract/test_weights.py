"""Every format of weights gives the same model, and checkpoints of other models are refused."""

import argparse
import copy
import gc
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_vit import TINY
from torch import nn

from extract.backbones import hub_connection, model_spec
from extract.backbones.backbone import load_backbone
from extract.backbones.checkpoint_layouts import require_fit
from extract.backbones.weights import weights_digest
from extract.config import BackboneConfig
from store.errors import JobError, Note, UserError

NAME = "vit_tiny_patch16_224"
KWARGS = {**TINY, "img_size": 32}


def config(path: Path | str, **changes: Any) -> BackboneConfig:
    fields: dict[str, Any] = {"name": NAME, "image_size": 32, "model_kwargs": dict(TINY)}
    return BackboneConfig(weights=str(path), **(fields | changes))


def load(path: Path | str, **changes: Any) -> nn.Module:
    return load_backbone(config(path, **changes)).module


def refuse(path: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(path, **changes)
    message = str(refused.value)
    assert "\n" not in message
    if str(path).endswith(".npz"):  # which timm leaves open when it cannot read on: collected here, not in another test
        del refused
        gc.collect()
    return message


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model with a classifier, no tensor of which is at its initial value."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=5, **KWARGS)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn_like(tensor))
    return model.eval()


@pytest.fixture(scope="module")
def expected(trained: nn.Module) -> str:
    """Its digest without the classifier."""
    plain = timm.create_model(NAME, num_classes=0, **KWARGS)
    plain.load_state_dict({k: v for k, v in trained.state_dict().items() if not k.startswith("head")})
    return weights_digest(plain)


def to_jax(model: nn.Module) -> dict[str, np.ndarray]:
    """The layout of Google's checkpoints, one entry a tensor of a block."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    dim, heads = TINY["embed_dim"], TINY["num_heads"]
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for block in range(TINY["depth"]):
        there, here = f"Transformer/encoderblock_{block}/", f"blocks.{block}."
        for number, name in ((0, "norm1"), (2, "norm2")):
            arrays[f"{there}LayerNorm_{number}/scale"] = state[f"{here}{name}.weight"]
            arrays[f"{there}LayerNorm_{number}/bias"] = state[f"{here}{name}.bias"]
        attention = f"{there}MultiHeadDotProductAttention_1/"
        weight, bias = state[f"{here}attn.qkv.weight"], state[f"{here}attn.qkv.bias"]
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * dim, (part + 1) * dim)
            arrays[f"{attention}{name}/kernel"] = weight[rows].T.reshape(dim, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias[rows].reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{here}attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[f"{attention}out/bias"] = state[f"{here}attn.proj.bias"]
        for number, name in ((0, "fc1"), (1, "fc2")):
            arrays[f"{there}MlpBlock_3/Dense_{number}/kernel"] = state[f"{here}mlp.{name}.weight"].T
            arrays[f"{there}MlpBlock_3/Dense_{number}/bias"] = state[f"{here}mlp.{name}.bias"]
    return arrays


def save(model: nn.Module, path: Path) -> Path:
    """Save in the format that suffix and stem stand for."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **to_jax(model))
    else:
        torch.save(
            {"plain": state, "state_dict": {"state_dict": state, "epoch": 3}, "model": {"model": state}}[path.stem],
            path,
        )
    return path


def save_hub_folder(model: nn.Module, folder: Path, **card: Any) -> Path:
    folder.mkdir()
    save(model, folder / "model.safetensors")
    fields = {"architecture": NAME, "num_classes": 5, "model_args": {**KWARGS, "num_classes": 5}}
    (folder / "config.json").write_text(json.dumps(fields | card))
    return folder


# What loads


@pytest.mark.parametrize(
    "file", ["a.safetensors", "plain.pth", "plain.pt", "plain.bin", "state_dict.pth", "model.pth", "a.npz"]
)
def test_every_format_gives_the_same_weights_without_the_classifier(
    tmp_path: Path, trained: nn.Module, expected: str, file: str
) -> None:
    model = load(save(trained, tmp_path / file))
    assert weights_digest(model) == expected
    assert not [name for name in model.state_dict() if name.startswith("head")]
    assert not model.training
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_a_hub_folder_names_its_own_architecture(tmp_path: Path, trained: nn.Module, expected: str) -> None:
    folder = save_hub_folder(trained, tmp_path / "hub", pretrained_cfg={"mean": [0.1, 0.2, 0.3]})
    backbone = load_backbone(BackboneConfig(weights=str(folder)))
    assert (backbone.name, backbone.model_kwargs) == (NAME, KWARGS)
    assert weights_digest(backbone.module) == expected
    assert backbone.module.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]


def test_what_timm_saves_for_the_hub_loads(tmp_path: Path, trained: nn.Module, expected: str) -> None:
    timm.models.save_for_hf(trained, tmp_path / "hub", model_args=KWARGS, safe_serialization=True)
    assert weights_digest(load_backbone(BackboneConfig(weights=str(tmp_path / "hub"))).module) == expected


def test_one_changed_value_changes_the_digest(tmp_path: Path, trained: nn.Module, expected: str) -> None:
    model = load(save(trained, tmp_path / "a.safetensors"))
    model.blocks[1].mlp.fc1.bias.data[3] += 1e-6
    assert weights_digest(model) != expected


def test_the_classifier_does_not_enter_the_digest(tmp_path: Path, trained: nn.Module, expected: str) -> None:
    state = dict(trained.state_dict())
    torch.save({**state, "head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}, tmp_path / "seven.pth")
    assert weights_digest(load(tmp_path / "seven.pth")) == expected


def test_random_weights_are_always_the_same() -> None:
    torch.manual_seed(5)
    first = load("random")
    torch.manual_seed(6)
    before = torch.get_rng_state()
    assert weights_digest(load("random")) == weights_digest(first)
    assert torch.equal(torch.get_rng_state(), before)


# What is refused


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("save_pickle", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, save_pickle: Any) -> None:
    save_pickle({"state_dict": {}, "extra": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    assert "does not load into 'vit_tiny_patch16_224'" in refuse(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_object_array_in_npz_is_refused_and_not_run(tmp_path: Path, trained: nn.Module) -> None:
    arrays = to_jax(trained)
    np.savez(tmp_path / "evil.npz", **{**arrays, "cls": np.array([Evil(tmp_path / "ran")], dtype=object)})
    assert "does not load" in refuse(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["a.safetensors", "plain.pth", "a.npz"])
def test_a_file_of_another_model_is_refused(tmp_path: Path, trained: nn.Module, file: str) -> None:
    path = save(trained, tmp_path / file)
    assert str(path) in refuse(path, model_kwargs={**TINY, "depth": 4})
    assert str(path) in refuse(path, model_kwargs={**TINY, "depth": 2})
    assert str(path) in refuse(path, model_kwargs={**TINY, "embed_dim": 48})
    assert str(path) in refuse(path, model_kwargs={**TINY, "reg_tokens": 2})


def test_a_file_of_another_model_says_which_tensors(tmp_path: Path, trained: nn.Module) -> None:
    message = refuse(save(trained, tmp_path / "a.safetensors"), model_kwargs={**TINY, "depth": 2})
    assert "is not a checkpoint of 'vit_tiny_patch16_224': missing [], unexpected ['blocks.2." in message
    assert "check backbone.name, image_size and model_kwargs" in message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["a.safetensors", "plain.pth", "a.npz"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_damaged_file_is_refused(tmp_path: Path, trained: nn.Module, file: str, keep: float) -> None:
    path = save(trained, tmp_path / file)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    assert f"backbone.weights {path} does not load into" in refuse(path)


def test_other_paths_are_refused(tmp_path: Path, trained: nn.Module) -> None:
    (tmp_path / "a.onnx").touch()
    (tmp_path / "empty").mkdir()
    assert "there is no such file or folder; give backbone.weights a local" in refuse(tmp_path / "none.pth")
    assert "legal endings are .safetensors, .pth, .pt, .bin, .npz" in refuse(tmp_path / "a.onnx")
    assert "no readable config.json with an architecture" in refuse(tmp_path / "empty")
    assert "so backbone.name must name a timm model" in refuse(save(trained, tmp_path / "plain.pth"), name=None)


def test_a_hub_folder_of_another_form_is_refused(tmp_path: Path, trained: nn.Module) -> None:
    folder = save_hub_folder(trained, tmp_path / "hub")
    assert "holds a 'vit_tiny_patch16_224'; leave the name out" in refuse(folder, name="vit_small_patch16_224")
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin is there" in refuse(folder)
    (folder / "config.json").write_text("[1]")
    assert "no readable config.json" in refuse(folder)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    message = refuse("random", name="vit_base_patch16_244")
    assert "'vit_base_patch16_244' is no timm model; near ones: vit_base_patch16_224" in message
    assert "near ones: " in refuse("pretrained", name="?")


def test_a_name_that_would_be_fetched_is_refused() -> None:
    for name in ("hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp"):
        assert f"write it as backbone.weights: {name}" in refuse("random", name=name)


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "num_classes", "in_chans", "features_only"])
def test_arguments_that_would_go_round_the_weights_are_refused(key: str) -> None:
    assert f"backbone.model_kwargs may not hold '{key}': " in refuse("random", model_kwargs={key: 1})


@pytest.mark.parametrize("kwargs", [{"nope": 1}, {"embed_dim": 30, "num_heads": 4}, {"patch_size": 0}, {"depth": "x"}])
def test_arguments_that_timm_refuses_are_named(kwargs: dict[str, Any]) -> None:
    assert f"timm cannot build 'vit_tiny_patch16_224' with model_kwargs {kwargs}"[:-1] in refuse(
        "random", model_kwargs=kwargs, image_size=None
    )


# The hub


def test_a_model_without_pretrained_weights_names_those_that_have() -> None:
    assert "Invalid pretrained tag (nope)" in refuse("pretrained", name="vit_tiny_patch16_224.nope")
    message = refuse("pretrained", name="vit_base_patch16_plus_240", model_kwargs={}, image_size=None)
    assert "timm has no pretrained weights for 'vit_base_patch16_plus_240'; " in message


@pytest.mark.parametrize("given", ["pretrained", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"])
def test_a_hub_out_of_reach_is_a_job_error_with_the_alternatives(given: str, tmp_path: Path) -> None:
    name = NAME if given == "pretrained" else None
    with pytest.raises(JobError, match=r"could not be fetched from the model hub \(.*give backbone.weights a local"):
        load_backbone(BackboneConfig(name=name, weights=given, model_kwargs={"cache_dir": str(tmp_path)}))


def test_wrong_arguments_are_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_spec, "load_model_config_from_hf", lambda _: ({}, NAME, {"num_classes": 3}))
    assert "timm cannot build" in refuse("hf-hub:a/b", model_kwargs={"nope": 1}, image_size=None)
    assert "leave the name out" in refuse("hf-hub:a/b", name="vit_small_patch16_224")


# Checkpoints of training scripts


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other_values(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor + 1 for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "DeepSpeed": lambda s: {"module": s, "optimizer": {"state": {0: torch.ones(2)}}, "global_steps": 3},
    "DINO": lambda s: {
        "student": prefixed(other_values(s), "module.backbone."),
        "teacher": prefixed(s, "backbone.") | {"head.mlp.0.weight": torch.randn(4, 4)},
        "args": argparse.Namespace(arch="vit_tiny"),
    },
    "DINOv2": lambda s: {
        "model": prefixed(other_values(s), "student.backbone.")
        | prefixed(s, "teacher.backbone.")
        | {"teacher.dino_head.mlp.0.weight": torch.randn(4, 4)}
    },
    "a student alone": lambda s: {"student": prefixed(s, "module.backbone.")},
    "MAE": lambda s: {"model": s | {"mask_token": torch.randn(1, 1, 8), "decoder_blocks.0.norm1.bias": torch.ones(8)}},
    "I-JEPA": lambda s: {
        "encoder": prefixed(other_values(s), "module."),
        "predictor": {"module.predictor_blocks.0.norm1.bias": torch.ones(4)},
        "target_encoder": prefixed(s, "module."),
    },
    "timm with averages": lambda s: {
        "state_dict": other_values(s),
        "state_dict_ema": prefixed(s, "module."),
        "epoch": 9,
    },
    "averages of MAE": lambda s: {"model": other_values(s), "model_ema": s, "scaler": {"scale": 1.0}},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model.backbone."), "hyper_parameters": {"lr": 0.1}},
    "compiled, then distributed": lambda s: prefixed(s, "module._orig_mod."),
    "distributed, then compiled": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "wrapped three times": lambda s: {"state_dict": {"model": {"module": s}}},
}


@pytest.mark.filterwarnings("ignore::store.errors.Note")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_training_scripts_load(tmp_path: Path, trained: nn.Module, expected: str, layout: str) -> None:
    torch.save(LAYOUTS[layout](trained.state_dict()), tmp_path / "a.pth")
    assert weights_digest(load(tmp_path / "a.pth")) == expected


@pytest.mark.parametrize(
    ("layout", "left_out"),
    [("DINO", "student"), ("DINOv2", "model.student.backbone"), ("I-JEPA", "encoder"), ("averages of MAE", "model")],
)
def test_what_else_a_checkpoint_holds_is_noted(tmp_path: Path, trained: nn.Module, layout: str, left_out: str) -> None:
    torch.save(LAYOUTS[layout](trained.state_dict()), tmp_path / "a.pth")
    with pytest.warns(Note, match=rf"a\.pth also holds weights under {left_out}, which are left out"):
        load(tmp_path / "a.pth")


def test_weights_under_an_unknown_key_are_refused_with_the_keys(tmp_path: Path, trained: nn.Module) -> None:
    state = dict(trained.state_dict())
    torch.save({"generator": state, "discriminator": state, "epoch": 1}, tmp_path / "a.pth")
    message = refuse(tmp_path / "a.pth")
    assert "keys that hold tensors: 'discriminator', 'generator'; save the right ones by themselves" in message
    torch.save(list(state.values()), tmp_path / "list.pth")
    assert "it holds a list, no state dict" in refuse(tmp_path / "list.pth")
    torch.save({"log": "x" * 200_000}, tmp_path / "log.pth")
    assert "keys that hold tensors: none" in refuse(tmp_path / "log.pth")


# Types, values and shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_load_as_float32(tmp_path: Path, trained: nn.Module, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in trained.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors")
    assert torch.equal(model.cls_token, state["cls_token"].float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_quantized_weights_are_refused(tmp_path: Path, trained: nn.Module, dtype: torch.dtype, ending: str) -> None:
    state = dict(trained.state_dict())
    state["blocks.1.mlp.fc1.weight"] = (100 * state["blocks.1.mlp.fc1.weight"]).to(dtype)
    path = tmp_path / f"a{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    message = refuse(path)
    assert f"blocks.1.mlp.fc1.weight holds {dtype}; legal: float16, bfloat16, float32, float64" in message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "holds a value of nan"),
        (-torch.inf, "holds a value of inf"),
        (1e30, "legal: finite, at most 65,504"),
    ],
)
@pytest.mark.parametrize("file", ["a.safetensors", "plain.pth", "a.npz"])
def test_values_that_no_weight_has_are_refused(
    tmp_path: Path, trained: nn.Module, file: str, value: float, message: str
) -> None:
    damaged = copy.deepcopy(trained)
    with torch.no_grad():
        damaged.blocks[1].mlp.fc1.bias[3] = value
    refusal = refuse(save(damaged, tmp_path / file))
    assert message in refusal or (value is torch.nan and "does not set ['blocks.1.mlp.fc1.bias']" in refusal)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda tensor: (100 * tensor).round()])
@pytest.mark.parametrize("file", ["a.safetensors", "plain.pth", "a.npz"])
def test_matrices_of_integers_are_refused(
    tmp_path: Path, trained: nn.Module, file: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    damaged = copy.deepcopy(trained)
    damaged.blocks[1].mlp.fc1.weight.data = change(damaged.blocks[1].mlp.fc1.weight.data)
    message = "blocks.1.mlp.fc1.weight holds integers only: it is quantized, damaged, or was never trained"
    assert message in refuse(save(damaged, tmp_path / file))


def test_floats_in_place_of_integers_are_refused() -> None:
    model = nn.Module()
    model.register_buffer("index", torch.arange(4))
    require_fit({"index": torch.arange(4)}, model)
    with pytest.raises(ValueError, match=r"^index holds torch\.float32, in the model it holds integers$"):
        require_fit({"index": torch.arange(4.0)}, model)


def test_shapes_that_differ_are_named(tmp_path: Path, trained: nn.Module) -> None:
    message = refuse(save(trained, tmp_path / "a.safetensors"), model_kwargs={**TINY, "mlp_ratio": 2.0})
    assert "9 tensors have another shape: blocks.0.mlp.fc1." in message


# The preprocessing of a file


def test_the_preprocessing_for_a_name_without_tag_is_noted(tmp_path: Path) -> None:
    name, kwargs = "vit_small_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    save_file(timm.create_model(name, num_classes=0, **kwargs).state_dict(), path)
    untagged = BackboneConfig(name=name, weights=str(path), model_kwargs=kwargs)
    with pytest.warns(
        Note, match=rf"as for timm's {name}\.augreg_in21k_ft_in1k: mean \(0\.5, .* Tags .*: augreg.*dino"
    ):
        load_backbone(untagged)
    tagged = BackboneConfig(name=f"{name}.dino", weights=str(path), model_kwargs=kwargs)
    assert load_backbone(tagged).module.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_without_a_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try for a minute."""
    asked = []

    def refuse_connection(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_connection, "getproxies", dict)
    monkeypatch.setattr(hub_connection.socket, "create_connection", refuse_connection)
    with pytest.raises(JobError, match=r"model hub \(huggingface.co cannot be reached \(Name or service not known"):
        load_backbone(BackboneConfig(name="vit_tiny_patch16_224", weights="pretrained"))
    assert asked == [("huggingface.co", 443)]
    assert constants.HF_HUB_OFFLINE is False


def test_where_a_proxy_is_set_the_hub_is_not_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_connection, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(hub_connection.socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    with hub_connection.offline_without_hub() as obstacle:
        assert obstacle == ""
        assert constants.HF_HUB_OFFLINE is False
