"""Updates of frozen linear maps, and what all weight-update methods have in common, over families of models."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor, nn

from adapt.explain import explain
from adapt.features import spec_of_backbone
from adapt.methods import count_params, trainable
from adapt.tuning.kronecker import KroneckerOptions, install_kronecker
from adapt.tuning.lora import LoRAOptions, install_lora, install_lora_fix
from adapt.tuning.tuned import Install, Tuned
from adapt.tuning.updates import Update, UpdatedLinear, add_update, update_tensors
from adapt.tuning.vit import TARGETS, Place, Vit, find_place
from extract.backbone import TimmBackbone, empty_backbone, load_backbone
from extract.config import BackboneConfig
from store.errors import UserError

CLASSES = 5
SIZE = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
# name -> timm model, keyword arguments beside SIZE
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "not square": ("vit_tiny_patch16_224", {"img_size": (32, 48)}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "eva, separate": ("eva02_tiny_patch14_224", {"qkv_fused": False}),
    "eva, gates apart": ("eva02_base_patch14_224", {"swiglu_mlp": True, "scale_mlp": True}),
    "beit": ("beit_base_patch16_224", {}),
}
# install, options
METHODS: dict[str, tuple[Install, dict[str, Any]]] = {
    "lora": (install_lora, {"rank": 2, "alpha": 3.0}),
    "lora_fix": (install_lora_fix, {"rank": 2}),
    "kronecker": (install_kronecker, {"n": 4, "rank": 2, "scale": 0.5, "bias": True}),
    "kronecker of slow rank 2": (install_kronecker, {"n": 4, "slow_rank": 2, "scale": 0.5, "bias": True}),
}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@lru_cache
def backbone_of(family: str) -> TimmBackbone:
    name, kwargs = FAMILIES[family]
    size = None if "img_size" in kwargs else 32
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights="random", image_size=size, model_kwargs=SIZE | kwargs)
    backbone = load_backbone(config)
    for name, tensor in backbone.module.named_parameters():
        if "gamma" in name:
            nn.init.ones_(tensor)  # layer scales start so small that the blocks would not matter
    return backbone


def build(method: str, family: str = "vit", **more: Any) -> Tuned:
    """An untrained model; `more` takes precedence over the options of METHODS."""
    install, options = METHODS[method]
    return build_with(install, family, **(options | more))


def build_with(install: Install, family: str = "vit", **options: Any) -> Tuned:
    backbone = backbone_of(family)
    return Tuned(backbone, spec_of_backbone(backbone, range(backbone.depth)), CLASSES, install, **options)


def install_nothing(vit: Vit) -> None:
    """The frozen model under the read-out."""


def draw_images(family: str = "vit", batch: int = 3) -> Tensor:
    return torch.randn(batch, *backbone_of(family).image_size)


def disturb(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    for tensor in update_tensors(model).values():
        nn.init.normal_(tensor, std=0.3)
    return model


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()


def count_on_meta(install: Install, width: int = 768, **options: Any) -> int:
    """What a method trains in a ViT of 12 blocks and of this width."""
    backbone = empty_backbone("vit_base_patch16_224", {} if width == 768 else {"embed_dim": width, "num_heads": 8})
    with torch.device("meta"):
        spec = spec_of_backbone(backbone, range(backbone.depth))
        return count_params(Tuned(backbone, spec, CLASSES, install, **options))[0]


@methods
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_frozen_model_and_then_moves_every_trained_tensor(method: str, family: str) -> None:
    model, images = build(method, family), draw_images(family)
    plain = build_with(install_nothing, family)
    plain.readout.head.load_state_dict(model.readout.head.state_dict())
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)  # EVA and BEiT add the bias apart
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


class Shift(Update):
    """Adds a number to some outputs."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return self.by.expand(*x.shape[:-1], 2)


def test_updates_of_one_map_share_a_wrapper_and_add_up() -> None:
    parent = nn.Sequential(nn.Linear(3, 6)).requires_grad_(False)
    base, x = parent[0], torch.randn(2, 3, requires_grad=True)
    for start, by in ((0, 1.0), (4, 2.0), (1, 10.0)):
        add_update(Place(parent, "0", start, start + 2), Shift(by))
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
    add_update(Place(parent, "0", 0, 2), Shift(1.0))
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
        find_place(block, "v")


def test_narrower_k_and_v_of_their_own_are_updated_at_their_width() -> None:
    block = copy.deepcopy(backbone_of("eva, separate").module.blocks[0])
    block.attn.v_proj = nn.Linear(32, 16)
    place = find_place(block, "v")
    assert (place.linear, place.start, place.stop) == (block.attn.v_proj, 0, 16)
