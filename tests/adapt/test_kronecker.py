"""Kronecker adaptation equals `torch.kron`, has the counts of the paper's code, and trains every factor."""

import copy

import pytest
import torch
from tuned_models import build, build_method, count_on_meta, disturb, draw_images, step

from adapt.methods.in_backbone.kronecker import KroneckerUpdate
from adapt.methods.in_backbone.updated_linear import update_tensors
from adapt.methods.trained_parameters import trainable
from store.errors import UserError

SLOW_RANKS = pytest.mark.parametrize("slow_rank", [None, 1, 3])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def updates_of(model: torch.nn.Module) -> list[KroneckerUpdate]:
    return [module for module in model.modules() if isinstance(module, KroneckerUpdate)]


def test_the_count_is_that_of_the_papers_code() -> None:
    assert count_on_meta("kronecker", n=32, slow_rank=1, bias=True) == 50_176 == 36_864 + 2 * 2_048 + 9_216


def test_the_count_follows_its_formula() -> None:
    assert count_on_meta("kronecker") == 12 * 4 * 768 + 2 * 4**3
    assert count_on_meta("kronecker", n=16, rank=3) == 3 * 12 * 4 * 768 + 2 * 16**3
    assert count_on_meta("kronecker", 512, n=32, slow_rank=4, targets=("v",)) == 12 * 2 * 512 + 2 * 4 * 32**2
    assert count_on_meta("kronecker", 512, targets=("fc1", "fc2")) == 12 * 2 * (512 + 2048) + 2 * 4**3
    assert count_on_meta("kronecker", bias=True, targets=("q", "k", "v")) == 12 * (6 + 1) * 768 + 3 * 4**3


@SLOW_RANKS
@pytest.mark.parametrize("target", ["q", "fc1", "fc2"])
def test_the_weight_change_is_a_sum_of_kronecker_products(slow_rank: int | None, target: str) -> None:
    model = build_method("kronecker", n=4, rank=2, slow_rank=slow_rank, scale=0.7, targets=(target,))
    update = updates_of(disturb(model))[1]
    slow = update.slow.full if slow_rank is None else update.slow.left @ update.slow.right.mT
    products = [torch.kron(a, u @ v.T) for a, u, v in zip(slow, update.u, update.v, strict=True)]
    torch.testing.assert_close(update.delta(), 0.7 * sum(products))
    x = torch.randn(2, 5, update.delta().shape[1])
    torch.testing.assert_close(update(x), x @ update.delta().T, rtol=1e-4, atol=1e-4)


@SLOW_RANKS
def test_every_factor_moves_within_two_steps(slow_rank: int | None) -> None:
    """In the paper's code both fast factors start at zero, so no factor ever receives a gradient."""
    model, images = build_method("kronecker", n=8, slow_rank=slow_rank, bias=True), draw_images()
    start = {name: tensor.clone() for name, tensor in trainable(model).items()}
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    step(model, images, optimizer)
    moved = {name.rpartition(".")[2] for name, tensor in trainable(model).items() if not tensor.equal(start[name])}
    assert moved == {"u", "bias", "weight"}  # the last is the head's
    step(model, images, optimizer)
    assert [name for name, tensor in trainable(model).items() if not tensor.grad.any()] == []
    cubes = {name: tensor.grad for name, tensor in trainable(model).items() if tensor.ndim == 3}  # one slice for each i
    assert [name for name, grad in cubes.items() if not grad.flatten(1).any(dim=1).all()] == []


@SLOW_RANKS
def test_slow_factors_are_shared_by_all_blocks_and_differ_between_targets(slow_rank: int | None) -> None:
    model = build_method("kronecker", n=4, slow_rank=slow_rank, bias=True)
    for some in (model, copy.deepcopy(model)):
        q, v = updates_of(some)[::2], updates_of(some)[1::2]
        assert {id(update.slow) for update in q} == {id(q[0].slow)}
        assert {id(update.slow) for update in v} == {id(v[0].slow)}
        assert q[0].slow is not v[0].slow
        assert [a.shared is b.shared for a, b in zip(q, v, strict=True)] == [True] * 3
        assert len({id(update.shared) for update in q}) == 3
    assert updates_of(model)[0].slow is not updates_of(copy.deepcopy(model))[0].slow


def test_sharing_survives_leaving_the_meta_device() -> None:
    with torch.device("meta"):
        model = copy.deepcopy(build_method("kronecker", n=4, bias=True)).to("meta")
    model.to_empty(device="cpu")
    assert {id(update.slow.full) for update in updates_of(model)[::2]} == {id(updates_of(model)[0].slow.full)}
    assert len(update_tensors(model)) == 3 * (2 * 2 + 1) + 2


@pytest.mark.parametrize(("slow_rank", "rank"), [(None, 1), (1, 1), (5, 1), (None, 3)])
def test_the_factors_start_with_the_spread_of_linear_maps(slow_rank: int | None, rank: int) -> None:
    """The spread of the slow factors does not depend on their rank."""
    torch.manual_seed(0)
    update = updates_of(build_method("kronecker", n=16, rank=rank, slow_rank=slow_rank))[0]
    assert not update.u.any()
    assert float(update.slow().detach().std()) == pytest.approx((3 * 16) ** -0.5, rel=0.1)
    assert float(update.v.detach().std()) == pytest.approx((3 * 2) ** -0.5, rel=0.2)


@SLOW_RANKS
def test_the_bias_of_a_block_is_added_to_all_its_targets(slow_rank: int | None) -> None:
    linear = build_method("kronecker", n=4, slow_rank=slow_rank, bias=True).module.blocks[1].attn.qkv
    with torch.no_grad():
        linear.updates[1].shared.bias.copy_(torch.arange(32.0))
    added = torch.cat([torch.arange(32.0), torch.zeros(32), torch.arange(32.0)])
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(linear(x), linear.base(x) + added)
    torch.testing.assert_close(linear.bias, linear.base.bias + added)


def test_the_backward_pass_keeps_the_input_alone() -> None:
    update = updates_of(build_method("kronecker", n=16, rank=2))[0]
    weights = sum(tensor.numel() for tensor in update.parameters())
    x = torch.randn(4, 500, 32, requires_grad=True) * 1.0
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        y = update(x)
    assert kept.pop(x.data_ptr()) == x.numel()
    assert sum(kept.values()) <= 2 * weights
    assert y.shape == x.shape


def test_n_must_divide_the_widths() -> None:
    with pytest.raises(
        UserError, match=r"n: 12 does not divide the widths.*legal on this backbone: 1, 2, 4, 8, 16, 32$"
    ):
        build("kronecker", n=12)
    with pytest.raises(UserError, match="n: 64 does not divide"):
        build("kronecker", n=64)


def test_a_bias_needs_targets_of_one_width() -> None:
    with pytest.raises(UserError, match=r"the targets share one bias, but are \[32, 128\] wide; set bias: false"):
        build("kronecker", targets=("q", "fc1"))
