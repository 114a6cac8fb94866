"""Adapters behind the sublayers, with plain weights and with weights of Kronecker products (Compacter)."""

import copy
from typing import Any

import pytest
import torch
from end_to_end import DEPTH, DIM, EndToEnd, load, shake, tune
from torch import Tensor, nn

from adapt.methods.in_backbone.adapters import Adapter
from adapt.methods.in_backbone.compacter import KroneckerLinear
from adapt.methods.trained_parameters import count_params, trainable
from extract.backbones.backbone import TimmBackbone, empty_backbone
from store.errors import UserError

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {"drop_path_rate": 0.2},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {"img_size": (32, 48)},
    "eva02_tiny_patch14_224": {},
    "beit_base_patch16_224": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adapter", {"bottleneck": 8}),
        ("adapter_drop", {"bottleneck": 8, "places": ["attention"]}),
        ("compacter", {"bottleneck": 8}),
    ],
)
class TestEveryFamily(EndToEnd):
    @pytest.fixture
    def backbone(self, family: str) -> TimmBackbone:
        return load(family, **FAMILIES[family])


def test_adapters_are_applied_before_both_residuals() -> None:
    backbone = load("vit_small_patch14_reg4_dinov2", init_values=0.5)
    model = tune("adapter", {"bottleneck": 8}, backbone)
    shake(model)
    frozen, block = backbone.module.blocks[1], model.module.blocks[1]
    x = torch.randn(2, 21, DIM)

    def adapted(z: Tensor, adapter: Adapter) -> Tensor:
        hidden = nn.functional.gelu(z @ adapter.down.weight.T + adapter.down.bias)
        return z + hidden @ adapter.up.weight.T + adapter.up.bias

    middle = x + adapted(frozen.ls1(frozen.attn(frozen.norm1(x))), block.drop_path1[0])
    wanted = middle + adapted(frozen.ls2(frozen.mlp(frozen.norm2(middle))), block.drop_path2[0])
    torch.testing.assert_close(block(x), wanted)


def test_a_dropped_sublayer_takes_its_adapter_along() -> None:
    model = tune("adapter", {"bottleneck": 8}, load("vit_tiny_patch16_224", drop_path_rate=0.2))
    shake(model)
    block, x = model.module.blocks[-1].train(), torch.randn(2, 17, DIM)
    block.drop_path1[1].drop_prob = block.drop_path2[1].drop_prob = 1 - 1e-9
    assert torch.equal(block(x), x)


def adapter_count(adapters: int, bottleneck: int, dim: int = DIM) -> int:
    return adapters * (2 * dim * bottleneck + bottleneck + dim)


@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        ({}, 2 * DEPTH),
        ({"places": ["attention"]}, DEPTH),
        ({"places": ["mlp"]}, DEPTH),
        ({"places": ["mlp", "mlp"]}, DEPTH),
        ({"layers": [-1]}, 2),
        ({"layers": [0, 2], "places": ["attention"]}, 2),
    ],
)
def test_adapters_are_where_they_are_asked_for(options: dict[str, Any], adapters: int) -> None:
    model = tune("adapter", {"bottleneck": 8, **options}, load("vit_tiny_patch16_224"))
    assert sum(isinstance(module, Adapter) for module in model.modules()) == adapters
    assert count_params(model)[0] == adapter_count(adapters, 8)


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("adapter", {}, adapter_count(24, 64, 768)),
        ("adapter_drop", {}, adapter_count(2, 64, 768)),
        ("compacter", {}, 4 * 12 * (768 + 64) + 4**3 + 2 * 12 * (64 + 768)),
        ("compacter", {"n": 8, "rank": 2}, 2 * 4 * 12 * (768 + 64) + 8**3 + 2 * 12 * (64 + 768)),
    ],
)
def test_counts_follow_the_formulas_without_any_memory(method: str, options: dict[str, Any], count: int) -> None:
    backbone = empty_backbone("vit_base_patch16_224", {})
    with torch.device("meta"):
        model = tune(method, options, backbone)
    assert count_params(model)[0] == count
    assert all(tensor.is_meta for tensor in trainable(model).values())


def test_adapters_in_the_last_block_ask_no_gradient_of_those_before() -> None:
    backbone = load("vit_tiny_patch16_224")
    model = tune("adapter", {"layers": [-1]}, backbone)
    seen: list[bool] = []
    for block in model.module.blocks:
        block.register_forward_hook(lambda block, args, output: seen.append(output.requires_grad))
    model(torch.randn(2, *backbone.image_size))
    assert seen == [False, False, True]


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 3), (4, 1)])
def test_a_compacter_weight_is_a_sum_of_kronecker_products(n: int, rank: int) -> None:
    slow = nn.Parameter(torch.randn(n, n, n))
    layer = KroneckerLinear(slow, 24, 8, rank)
    nn.init.normal_(layer.bias)
    weight = sum(torch.kron(slow[i], layer.s[i] @ layer.t[i].T) for i in range(n))
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


def test_a_fresh_compacter_keeps_the_scale_of_its_input() -> None:
    layer = KroneckerLinear(nn.Parameter(4**-0.5 * torch.randn(4, 4, 4)), 768, 64, 1)
    scale = layer(torch.randn(2, 50, 768)).std()
    assert 0.3 < scale < 3


def test_all_compacters_share_their_slow_factors_in_copies_and_files_too() -> None:
    backbone = load("vit_tiny_patch16_224")
    model = tune("compacter", {"bottleneck": 8}, backbone)
    shake(model)
    images = torch.randn(2, *backbone.image_size)
    fresh = tune("compacter", {"bottleneck": 8}, backbone)
    fresh.load_state_dict({name: tensor.detach() for name, tensor in trainable(model).items()}, strict=False)
    assert torch.equal(fresh(images), model(images))
    for one in (model, fresh, copy.deepcopy(model)):
        assert len({id(module.slow) for module in one.modules() if isinstance(module, KroneckerLinear)}) == 1


def test_an_n_that_does_not_divide_the_widths_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"n \(3\) must divide.*\(32\) and bottleneck \(12\); legal here: \[1, 2, 4\]"):
        tune("compacter", {"bottleneck": 12, "n": 3}, load("vit_tiny_patch16_224"))


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_blocks_without_two_residuals_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=r"ParallelThingsBlock has no drop_path1; choose another method"):
        tune(method, {}, load("vit_small_patch16_18x2_224"))


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"layers \[3\] do not exist: this backbone has 3, numbered 0 to 2"):
        tune("adapter", {"layers": [3]}, load("vit_tiny_patch16_224"))
