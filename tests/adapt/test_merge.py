"""A merged model is a plain model with the same outputs; unmerging restores the former one to the last bit."""

import copy

import pytest
import torch
from torch import Tensor, nn
from tuned_models import FAMILIES, backbone_of, build, build_with, disturb, draw_images, inject_nothing, methods

from adapt.methods.in_backbone.merge import merge, unmerge
from adapt.methods.in_backbone.target_modules import TARGETS
from adapt.methods.in_backbone.updated_linear import UpdatedLinear, WeightUpdate
from adapt.methods.trained_parameters import trainable
from store.errors import UserError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def run(model: nn.Module, family: str = "vit") -> Tensor:
    """Outputs for images that are the same in every call."""
    torch.manual_seed(1)
    outputs: Tensor = model(draw_images(family).to(next(model.parameters()).dtype))
    return outputs


def distance(outputs: Tensor, expected: Tensor) -> float:
    return float((outputs - expected).abs().max() / expected.abs().max())


def leftovers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, WeightUpdate | UpdatedLinear)]


@methods
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged_outputs_agree(method: str, family: str) -> None:
    untrained = build(method, family)
    model = disturb(copy.deepcopy(untrained))
    before = run(model, family)
    assert merge(model) is model
    assert distance(run(model, family), before) < 1e-5
    assert distance(run(untrained, family), before) > 1e-2


@methods
def test_what_is_left_is_a_plain_model(method: str) -> None:
    model = merge(disturb(build(method)))
    assert leftovers(model) == []
    assert all(type(block.attn.qkv) is nn.Linear for block in model.module.blocks)
    plain = build_with(inject_nothing)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(plain), run(model))
    assert [name for name in trainable(model) if not name.startswith("readout.")] == []


@methods
def test_merging_reaches_every_target(method: str) -> None:
    more = {"bias": False} if "kronecker" in method else {}
    model = disturb(build(method, targets=TARGETS, **more))
    before = run(model)
    assert leftovers(merge(model)) == []
    assert distance(run(model), before) < 1e-5


@methods
@pytest.mark.parametrize("family", ["vit", "eva", "eva, separate", "beit"])
def test_unmerging_restores_the_model_to_the_last_bit(method: str, family: str) -> None:
    model = disturb(build(method, family))
    state = copy.deepcopy(model.state_dict())
    before, names = run(model, family), list(trainable(model))
    assert unmerge(merge(model)) is model
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list(trainable(model)) == names
    assert torch.equal(run(model, family), before)
    assert leftovers(merge(unmerge(merge(model)))) == []


@methods
def test_a_merged_model_may_be_changed_and_copied_before_it_is_unmerged(method: str) -> None:
    model = disturb(build(method))
    before = run(model)
    copied = copy.deepcopy(merge(model))
    with torch.no_grad():
        for block in model.module.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    assert torch.equal(run(unmerge(copied)), before)
    assert torch.equal(run(unmerge(model)), before)


def test_training_and_evaluation_are_kept() -> None:
    model = merge(build("lora").eval())
    assert not any(module.training for module in model.modules())
    model.train()
    evaluated = [name for name, module in unmerge(model).named_modules() if not module.training]
    assert evaluated == ["readout.tail", "readout.tail.model"]  # frozen, so never in training mode


def test_the_frozen_backbone_is_not_touched() -> None:
    state = copy.deepcopy(backbone_of("vit").module.state_dict())
    merge(disturb(build("lora")))
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone_of("vit").module.state_dict().items())


def test_unmerging_follows_the_model_to_another_type() -> None:
    model = merge(disturb(build("kronecker"))).double()
    merged = run(model)
    assert merged.dtype == torch.float64
    assert distance(run(unmerge(model)), merged) < 1e-5


def test_a_bias_is_made_where_only_the_update_has_one() -> None:
    model = disturb(build("kronecker", "eva"))
    assert model.module.blocks[0].attn.qkv.base.bias is None
    merge(model)
    assert model.module.blocks[0].attn.qkv.bias.shape == (96,)
    assert not model.module.blocks[0].attn.qkv.bias[32:64].any()
    assert unmerge(model).module.blocks[0].attn.qkv.base.bias is None


def test_models_without_updates_are_refused() -> None:
    with pytest.raises(UserError, match=r"no weight updates to merge.*legal: a model of a weight-update method \(lora"):
        merge(build_with(inject_nothing))
    with pytest.raises(UserError, match="not merged, so there is nothing to undo; call merge first"):
        unmerge(build("lora"))
    merged = merge(build("lora"))
    with pytest.raises(UserError, match="or has them merged already"):
        merge(merged)
