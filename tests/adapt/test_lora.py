"""LoRA has the published counts and computes the same as peft's."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tuned_models import build, build_method, build_with, count_on_meta, disturb, draw_images

from adapt.methods.dropout import ByteDropout
from adapt.methods.in_backbone.lora import LoRAOptions
from adapt.methods.in_backbone.target_modules import TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedBackbone, TunedOptions
from adapt.methods.in_backbone.updated_linear import update_tensors
from adapt.methods.trained_parameters import trainable
from benchmarks.record import machine


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("width", "rank", "count"), [(768, 4, 147_456), (512, 4, 98_304), (768, 16, 589_824)])
def test_lora_trains_4_l_d_r_and_lora_fix_half_of_it(width: int, rank: int, count: int) -> None:
    assert count_on_meta("lora", width, rank=rank) == count
    assert count_on_meta("lora_fix", width, rank=rank) == count // 2


def test_lora_of_the_mlp_counts_both_widths() -> None:
    assert count_on_meta("lora", 512, targets=("fc1", "fc2")) == 2 * 12 * 4 * (512 + 2048)


def test_the_first_factor_is_drawn_as_a_linear_map_and_the_second_is_zero() -> None:
    update = build_method("lora", rank=8).module.blocks[0].attn.qkv.updates[0]
    drawn = update.down.detach()
    assert 0.9 * 32**-0.5 < float(drawn.max()) <= 32**-0.5
    assert float(drawn.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert not update.up.any()


def test_alpha_over_rank_scales_the_update() -> None:
    plain, scaled = (disturb(build_method("lora", alpha=alpha)) for alpha in (None, 12.0))
    scaled.load_state_dict(plain.state_dict())
    pairs = zip(plain.module.blocks, scaled.module.blocks, strict=True)
    for one, three in ((a.attn.qkv.updates[1], b.attn.qkv.updates[1]) for a, b in pairs):
        torch.testing.assert_close(three.delta(), 3 * one.delta())
    assert LoRAOptions().alpha is None


@pytest.mark.parametrize(("method", "values"), [("lora", 32 + 2 * 4), ("lora_fix", 2 * 4)])
def test_the_backward_pass_keeps_the_input_once_and_for_lora_fix_not_at_all(method: str, values: int) -> None:
    linear = build_method(method, rank=4).module.blocks[1].attn.qkv
    weights = {tensor.data_ptr() for tensor in linear.parameters()}
    kept: dict[int, Tensor] = {}
    x = torch.randn(3, 7, 32, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        linear(x)
    assert sum(tensor.numel() for at, tensor in kept.items() if at not in weights) == 3 * 7 * values


def test_dropout_acts_on_the_update_alone_and_in_training_alone() -> None:
    linear = disturb(build("lora", dropout=0.5)).module.blocks[0].attn.qkv
    x = torch.randn(2, 5, 32)
    linear.train()
    one, other = linear(x), linear(x)
    assert torch.equal(one[..., 32:64], other[..., 32:64])  # k
    assert not torch.equal(one[..., :32], other[..., :32])
    assert not torch.equal(one[..., 64:], other[..., 64:])
    linear.eval()
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_dropout_next_to_one_leaves_a_little() -> None:
    kept = ByteDropout(0.999)(torch.ones(1 << 16)).count_nonzero()
    assert 0 < kept < (1 << 16) / 100


def inject_peft(vit: TargetViT, options: TunedOptions) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    peft.inject_adapter_in_model(config, vit.module)


def peft_name(name: str) -> str:
    """The name of one of our tensors in peft's model."""
    factor = "lora_A" if name.endswith("down") else "lora_B"
    return name.partition("updates.")[0] + factor + ".default.weight"


@pytest.fixture
def pair() -> tuple[TunedBackbone, TunedBackbone]:
    """Our model and peft's, with the same values."""
    theirs = build_with(inject_peft, "eva, separate")
    ours = disturb(build_method("lora", "eva, separate", rank=3, alpha=6.0))
    theirs.readout.load_state_dict(ours.readout.state_dict(), strict=False)
    with torch.no_grad():
        for name, tensor in update_tensors(ours).items():
            theirs.get_parameter(peft_name(name)).copy_(tensor)
    return ours, theirs


def test_outputs_and_gradients_are_those_of_peft(pair: tuple[TunedBackbone, TunedBackbone]) -> None:
    ours, theirs = pair
    images = draw_images("eva, separate")
    losses = [model(images).square().mean() for model in pair]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    names = update_tensors(ours)
    assert len(names) == 3 * 2 * 2
    assert len(trainable(theirs)) == len(trainable(ours))
    for name, tensor in names.items():
        torch.testing.assert_close(tensor.grad, theirs.get_parameter(peft_name(name)).grad, rtol=1e-4, atol=1e-6)


def test_training_gives_the_losses_of_peft(pair: tuple[TunedBackbone, TunedBackbone]) -> None:
    images, losses = draw_images("eva, separate"), []
    for model in pair:
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
        losses.append([train_step(model, optimizer, images) for _ in range(5)])
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)


def train_step(model: TunedBackbone, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(model(images), torch.arange(len(images)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    path = Path(__file__).parents[2] / "benchmarks" / "methods.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_methods", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), "--small", "--rounds", "1", "--out", str(tmp_path / "out.json")])
    module.main()
    document = json.loads((tmp_path / "out.json").read_text())
    assert {"torch", "timm", "peft", "python"} <= set(document["versions"])
    assert document == {**document, **machine()}
    ratio = document["ratios"]["LoRA / peft's, separate q and v"]
    assert ratio["saved_bytes"] == pytest.approx(1.0, abs=0.01)
    assert json.loads(capsys.readouterr().out) == document
    parameters = [row["parameters"] for row in document["figures"].values()]
    assert parameters[0] == parameters[1]
