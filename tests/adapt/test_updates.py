"""Properties of all weight-update methods over families of backbones, and of `UpdatedLinear` itself."""

import copy
from typing import Any

import pytest
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor, nn
from tuned_models import FAMILIES, backbone_of, build, build_with, disturb, draw_images, inject_nothing, methods, step

from adapt.config.messages import explain
from adapt.methods.in_backbone.kronecker import KroneckerOptions
from adapt.methods.in_backbone.lora import LoRAOptions
from adapt.methods.in_backbone.target_modules import TARGETS, TargetModule, find_target_module
from adapt.methods.in_backbone.updated_linear import UpdatedLinear, WeightUpdate, add_update, update_tensors
from adapt.methods.trained_parameters import trainable
from store.errors import UserError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@methods
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_frozen_model_and_then_moves_every_trained_tensor(method: str, family: str) -> None:
    model, images = build(method, family), draw_images(family)
    plain = build_with(inject_nothing, family)
    plain.readout.head.load_state_dict(model.readout.head.state_dict())
    torch.testing.assert_close(
        model(images), plain(images), rtol=1e-5, atol=1e-5
    )  # EVA and BEiT add the bias separately
    still = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    for _ in range(2):
        step(model, images, optimizer)
    assert [name for name, tensor in trainable(model).items() if tensor.grad is None or not tensor.grad.any()] == []
    assert [name for name, tensor in still.items() if not torch.equal(model.get_parameter(name), tensor)] == []


@methods
def test_every_target_can_be_adapted(method: str) -> None:
    more = {"targets": TARGETS} | ({"bias": False} if "kronecker" in method else {})
    block = disturb(build(method, **more)).module.blocks[0]
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    assert [len(linear.updates) for linear in linears] == [3, 1, 1, 1]
    for linear in linears:
        assert (linear.weight != linear.base.weight).all()
        x = torch.randn(2, 7, linear.in_features)
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias), rtol=1e-4, atol=1e-4)


@methods
def test_forward_and_gradients_are_those_of_the_weight_change(method: str) -> None:
    model = disturb(build(method)).double()
    linear = model.module.blocks[1].attn.qkv
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(tensor for tensor in update_tensors(linear).values() if tensor.requires_grad)]
    ways = [linear(x), nn.functional.linear(x, linear.weight, linear.bias)]
    torch.testing.assert_close(*ways)
    one, other = (torch.autograd.grad(y.sin().sum(), wanted) for y in ways)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@methods
def test_only_the_rows_of_the_targets_change(method: str) -> None:
    linear = disturb(build(method)).module.blocks[2].attn.qkv
    changed = (linear.weight != linear.base.weight).any(dim=1)
    assert changed[:32].all()
    assert not changed[32:64].any()
    assert changed[64:].all()


@methods
def test_checkpointing_and_autocast_keep_the_gradients(method: str) -> None:
    model, images = disturb(build(method)), draw_images()
    parameters = list(trainable(model).values())

    def gradients(precision: torch.dtype | None = None) -> list[Tensor]:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = model(images).float().square().mean()
        return list(torch.autograd.grad(loss, parameters))

    exact = gradients()
    model.module.set_grad_checkpointing(True)
    for mine, theirs in zip(gradients(), exact, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(gradients(torch.bfloat16), exact, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < 0.2


@methods
def test_copies_are_independent_and_states_make_the_round_trip(method: str) -> None:
    model, images = disturb(build(method)), draw_images()
    copied, fresh = copy.deepcopy(model), build(method)
    before = model(images)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), before)
    assert len(list(copied.parameters())) == len(list(model.parameters()))
    disturb(copied)
    assert torch.equal(model(images), before)
    assert not torch.equal(copied(images), before)


@methods
def test_what_an_adaptor_must_keep_restores_it(method: str) -> None:
    model, other, images = disturb(build(method)), build(method), draw_images()
    kept = update_tensors(model) | trainable(model)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(kept, strict=False)
    assert torch.equal(other(images), model(images))


class Shift(WeightUpdate):
    """Adds one number to all its outputs."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return self.by.expand(*x.shape[:-1], 2)


def test_updates_of_one_map_share_a_wrapper_and_add_up() -> None:
    parent = nn.Sequential(nn.Linear(3, 6)).requires_grad_(False)
    base, x = parent[0], torch.randn(2, 3, requires_grad=True)
    for start, by in ((0, 1.0), (4, 2.0), (1, 10.0)):
        add_update(TargetModule(parent=parent, name="0", start=start, stop=start + 2), Shift(by))
    wrapper = parent[0]
    assert isinstance(wrapper, UpdatedLinear)
    assert wrapper.base is base
    assert (wrapper.in_features, wrapper.out_features) == (3, 6)
    added = torch.tensor([1.0, 11.0, 10.0, 0.0, 2.0, 2.0])
    torch.testing.assert_close(wrapper(x), base(x) + added)
    wrapper(x).sum().backward()
    assert [float(update.by.grad) for update in wrapper.updates] == [4.0, 4.0, 4.0]  # 2 samples x 2 outputs
    torch.testing.assert_close(x.grad, base.weight.sum(dim=0).expand(2, 3))


def test_the_backward_pass_of_the_sum_copies_nothing() -> None:
    parent = nn.Sequential(nn.Linear(3, 6)).requires_grad_(False)
    add_update(TargetModule(parent=parent, name="0", start=0, stop=2), Shift(1.0))
    out = parent[0](torch.randn(2, 3, requires_grad=True))
    assert "AddToSlices" in type(out.grad_fn).__name__  # a CopySlices would copy the gradient of the whole output
    grad = torch.randn(2, 6)
    whole, none, part = type(out.grad_fn)._forward_cls.backward(out.grad_fn, grad)
    assert none is None
    assert whole.data_ptr() == part.data_ptr() == grad.data_ptr()


def test_callers_that_read_the_weight_past_the_module_see_the_update() -> None:
    model = disturb(build("lora", "beit"))
    images = draw_images("beit")
    expected = model(images)
    for block in model.module.blocks:
        block.attn.qkv_bias_separate = False  # timm then multiplies by `qkv.weight` itself
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [LoRAOptions, KroneckerOptions])
def test_targets_come_as_a_list_and_are_checked(options: Any) -> None:
    assert options.model_validate({"targets": ["fc1", "v"]}).targets == ("fc1", "v")
    for given in ([], ["q", "q"], ["query"], "q"):
        with pytest.raises(ValidationError) as caught:
            options.model_validate({"targets": given})
        assert "legal: a list of q, k, v, proj, fc1, fc2, each of them once" in explain(caught.value, options)


def test_a_target_that_the_backbone_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="this backbone has no 'fc1' in its blocks"):
        build("lora", "eva, gates apart", targets=("fc1",))


def test_a_fused_map_of_unequal_thirds_is_refused() -> None:
    block = copy.deepcopy(backbone_of("vit").module.blocks[0])
    block.attn.qkv = nn.Linear(32, 32 + 2 * 16)
    with pytest.raises(UserError, match=r"64 wide, not three times the 32 of the attention's output \(grouped-query"):
        find_target_module(block, "v")


def test_narrower_k_and_v_of_their_own_are_updated_at_their_width() -> None:
    block = copy.deepcopy(backbone_of("eva, separate").module.blocks[0])
    block.attn.v_proj = nn.Linear(32, 16)
    target = find_target_module(block, "v")
    assert (target.module, target.start, target.stop) == (block.attn.v_proj, 0, 16)
