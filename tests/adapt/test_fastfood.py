"""Fastfood equals the matrix of its formula, and a module can be trained in the subspace that it spans."""

import copy
from typing import Any

import pytest
import torch
from end_to_end import tune
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapt.methods.in_backbone.fastfood import Fastfood, hadamard
from adapt.methods.in_backbone.merge import merge
from adapt.methods.in_backbone.random_subspace import Subspace
from adapt.methods.trained_parameters import adapter_state_dict, count_params, trainable
from extract.backbones.backbone import TimmBackbone, load_backbone
from extract.backbones.timm_models import build_empty
from extract.config import BackboneConfig
from store.errors import UserError

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}


def sylvester(width: int) -> Tensor:
    """The Walsh-Hadamard matrix by its definition."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix


def literal_matrix(fastfood: Fastfood) -> Tensor:
    """H G Pi H B for every block, stacked and cut, as (size, dim)."""
    h, width = sylvester(fastfood.width), fastfood.width
    blocks = [
        h @ torch.diag(scale.double()) @ torch.eye(width, dtype=torch.float64)[order] @ h @ torch.diag(signs.double())
        for signs, order, scale in zip(fastfood.signs, fastfood.order, fastfood.scale, strict=True)
    ]
    return torch.cat(blocks)[: fastfood.size, : fastfood.dim]


def dense(fastfood: Fastfood) -> Tensor:
    """The matrix of the map, column by column."""
    return torch.stack([fastfood(column) for column in torch.eye(fastfood.dim, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_hadamard_is_the_matrix(width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ sylvester(width))
    torch.testing.assert_close(hadamard(hadamard(x)), width * x)


# dim 1; a power of two and not; whole blocks and a part of one; fewer rows than one block
@pytest.mark.parametrize(("dim", "size"), [(1, 7), (8, 64), (5, 64), (5, 61), (16, 100), (9, 10)])
class TestFastfood:
    def test_it_is_the_matrix_of_the_formula(self, dim: int, size: int) -> None:
        fastfood = Fastfood(dim, size, seed=1).double()
        assert dense(fastfood).shape == (size, dim)
        torch.testing.assert_close(dense(fastfood), literal_matrix(fastfood))

    def test_the_gradient_is_the_adjoint(self, dim: int, size: int) -> None:
        fastfood = Fastfood(dim, size, seed=1).double()
        theta = torch.randn(dim, dtype=torch.float64, requires_grad=True)
        pulled = torch.randn(size, dtype=torch.float64)
        fastfood(theta).backward(pulled)
        torch.testing.assert_close(theta.grad, dense(fastfood).T @ pulled)

    def test_every_draw_is_what_it_should_be(self, dim: int, size: int) -> None:
        fastfood = Fastfood(dim, size, seed=1)
        assert set(fastfood.signs.unique().tolist()) <= {-1, 1}
        assert torch.equal(fastfood.order.sort(dim=1).values, torch.arange(fastfood.width).expand_as(fastfood.order))


def test_columns_have_length_one_and_are_nearly_orthogonal() -> None:
    whole = dense(Fastfood(16, 64 * 16, seed=2).double())
    torch.testing.assert_close(whole.norm(dim=0), torch.ones(16, dtype=torch.float64), atol=1e-6, rtol=0)
    cut = dense(Fastfood(13, 5_003, seed=2).double())
    assert (cut.T @ cut - torch.eye(13)).abs().max() < 0.1


def test_the_same_seed_gives_the_same_map_and_another_seed_another() -> None:
    theta = torch.randn(10)
    first = Fastfood(10, 100, seed=5)(theta)
    torch.manual_seed(9)
    assert torch.equal(Fastfood(10, 100, seed=5)(theta), first)
    assert not torch.equal(Fastfood(10, 100, seed=6)(theta), first)
    before = torch.get_rng_state()
    Fastfood(10, 100, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "its draws are its own"


def test_the_map_is_in_no_state_dict() -> None:
    assert Fastfood(10, 100, seed=0).state_dict() == {}


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is computed inside it."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_matrix_is_ever_formed() -> None:
    dim, size = 500, 40_000
    with Largest() as largest:
        fastfood, theta = Fastfood(dim, size, seed=0), torch.randn(dim, requires_grad=True)
        fastfood(theta).sum().backward()
    assert largest.numel < size + 2 * 512


# The method


def load(name: str, image_size: int = 32, **kwargs: Any) -> TimmBackbone:
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights="random", image_size=image_size, model_kwargs=SMALL | kwargs)
    return load_backbone(config)


def tuned(backbone: TimmBackbone, **options: Any) -> Any:
    return tune("intrinsic", {"dim": 10} | options, backbone)


def step(model: nn.Module, images: Tensor, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=lr)
    model(images).square().sum().backward()
    optimizer.step()


BACKBONES = [
    ("vit_tiny_patch16_224", {}),
    ("vit_base_patch16_224", {"img_size": (16, 48)}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_base_patch16_clip_224", {}),
    ("eva02_tiny_patch14_224", {}),
    ("eva_giant_patch14_224", {}),
    ("beit_base_patch16_224", {}),
]


@pytest.mark.parametrize("module", ["attention", "mlp"])
@pytest.mark.parametrize(("name", "kwargs"), BACKBONES, ids=[name for name, _ in BACKBONES])
def test_on_every_family_it_starts_frozen_moves_and_merges(name: str, kwargs: dict[str, Any], module: str) -> None:
    if "img_size" in kwargs:
        config = BackboneConfig(name=name, weights="random", model_kwargs=SMALL | kwargs)
        backbone, images = load_backbone(config), torch.randn(2, 3, 16, 48)
    else:
        backbone, images = load(name, **kwargs), torch.randn(2, 3, 32, 32)
    model = tuned(backbone, module=module)
    assert set(trainable(model)) - {"readout.head.weight", "readout.head.bias"} == {
        f"module.blocks.2.{'attn' if module == 'attention' else 'mlp'}.theta"
    }
    assert count_params(model)[0] == 10
    with torch.no_grad():
        torch.testing.assert_close(
            model._backbone.tokens(images, [2])[2], backbone.tokens(images, [2])[2], rtol=0, atol=0
        )
    step(model, images)
    theta = next(tensor for key, tensor in trainable(model).items() if key.endswith("theta"))
    assert (theta.grad != 0).all()

    moved = model(images)
    merge(model)
    torch.testing.assert_close(model(images), moved, rtol=1e-5, atol=1e-5)
    assert list(model.module.state_dict()) == list(backbone.module.state_dict()), "a plain timm model again"


def test_only_the_chosen_module_moves(tiny_backbone: TimmBackbone) -> None:
    model, images = tuned(tiny_backbone, block=1, module="mlp", dim=50), torch.randn(2, 3, 32, 32)
    for _ in range(2):
        step(model, images)
    merge(model)
    plain = tiny_backbone.module.state_dict()
    changed = {name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"blocks.1.mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")}


def test_the_change_is_the_projection_of_theta(tiny_backbone: TimmBackbone) -> None:
    model = tuned(tiny_backbone, seed=3)
    subspace = model.module.blocks[2].attn
    assert isinstance(subspace, Subspace)
    nn.init.normal_(subspace.theta)
    pairs = zip(subspace.merged().parameters(), tiny_backbone.module.blocks[2].attn.parameters(), strict=True)
    change = torch.cat([(new - old).flatten() for new, old in pairs])
    torch.testing.assert_close(change, subspace.project(subspace.theta), rtol=0, atol=1e-6)


def test_what_is_saved_restores_the_model(tiny_backbone: TimmBackbone) -> None:
    model, images = tuned(tiny_backbone, seed=7), torch.randn(2, 3, 32, 32)
    step(model, images)
    saved = adapter_state_dict(model)
    assert sum(tensor.numel() for name, tensor in saved.items() if not name.startswith("readout.")) == 10
    fresh = tuned(tiny_backbone, seed=7)
    fresh.load_state_dict(saved, strict=False)
    assert torch.equal(fresh(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_checkpointing_and_autocast_train_the_same_theta(tiny_backbone: TimmBackbone) -> None:
    images, gradients = torch.randn(2, 3, 32, 32), {}
    for how in ("plain", "checkpointed", "autocast"):
        torch.manual_seed(1)
        model = tuned(tiny_backbone, block=0)
        if how == "checkpointed":
            model.checkpoint_blocks()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            logits = model.train()(images)
        logits.float().square().sum().backward()
        gradients[how] = model.module.blocks[0].attn.theta.grad
    torch.testing.assert_close(gradients["checkpointed"], gradients["plain"])
    assert (gradients["autocast"] - gradients["plain"]).norm() < 0.1 * gradients["plain"].norm()


def test_it_builds_on_the_meta_device() -> None:
    name = "vit_base_patch16_224"
    backbone = TimmBackbone(name, {}, build_empty(name, {}), None)
    with torch.device("meta"):
        model = tuned(backbone, dim=100)
    assert model.module.blocks[-1].attn.project.scale.is_meta
    assert count_params(model)[0] == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, "block 3 does not exist; legal: 0 to 2, or null for the last"),
        ({"dim": 4225}, "dim 4225 is more than the 4224 parameters of the attention of block 2; lower dim"),
        ({"dim": 9000, "module": "mlp", "block": 0}, "dim 9000 is more than the 8352 parameters of the mlp of block 0"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_backbone: TimmBackbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tuned(tiny_backbone, **options)


def test_a_block_without_the_module_is_refused() -> None:
    fused = load("vit_base_patch16_xp_224")  # one projection for attention and MLP
    with pytest.raises(UserError, match="have no separate mlp"):
        tuned(fused, module="mlp")


def test_as_many_numbers_as_the_module_has_are_legal(tiny_backbone: TimmBackbone) -> None:
    assert count_params(tuned(tiny_backbone, dim=4224))[0] == 4224
