"""Properties of every method that trains inside the backbone, on any backbone.

A test class inherits `EndToEnd`, is parametrized by `method` and `options`, and has a fixture `backbone`.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt.features.specs import spec_of_backbone
from adapt.methods.in_backbone.merge import merge, unmerge
from adapt.methods.registry import METHODS, build_model
from adapt.methods.trained_parameters import adapter_state_dict, trainable
from extract.backbones.backbone import TimmBackbone, load_backbone
from extract.config import BackboneConfig
from store.errors import UserError

CLASSES, DIM, DEPTH, HEADS = 5, 32, 3, 2
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "patch_size": 8}
MERGEABLE = {"lora", "lora_fix", "kronecker", "intrinsic"}


def load(name: str, **kwargs: Any) -> TimmBackbone:
    """A small timm backbone in which every tensor has an effect, biases too."""
    size = None if "img_size" in kwargs else 32
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights="random", image_size=size, model_kwargs=TINY | kwargs)
    backbone = load_backbone(config)
    with torch.no_grad():
        for tensor in backbone.module.blocks.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return backbone


def tune(method: str, options: dict[str, Any], backbone: Any) -> Any:
    """A model in evaluation mode, initialized from the same seed in every call."""
    torch.manual_seed(3)
    spec = spec_of_backbone(backbone, range(backbone.depth))
    return build_model(method, spec, CLASSES, METHODS[method].options.model_validate(options), backbone=backbone).eval()


def draw(backbone: Any) -> Tensor:
    """A batch of images or clips."""
    return torch.randn(2, *backbone.image_size)


def move(model: nn.Module, inputs: Tensor, steps: int = 2) -> None:
    """Make gradient steps; maps in front of a map that starts at zero receive a gradient from the second step on."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Add noise to all trained tensors."""
    for tensor in trainable(model).values():
        tensor.add_(0.1 * torch.randn_like(tensor))


class EndToEnd:
    """Tests that a class of cases inherits."""

    def test_starts_as_the_linear_probe(self, method: str, options: dict[str, Any], backbone: Any) -> None:
        """All but `prompt`, to whose prompts the other tokens attend from the start."""
        inputs, probe = draw(backbone), tune("linear_probe", {}, backbone)
        with torch.no_grad():
            expected = probe(backbone.tokens(inputs, probe.layers))
            logits = tune(method, options, backbone)(inputs)
        if method == "prompt":
            assert not torch.allclose(logits, expected, atol=1e-4)
        else:
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    def test_moves_every_trained_tensor_and_nothing_else(
        self, method: str, options: dict[str, Any], backbone: Any
    ) -> None:
        model, inputs = tune(method, options, backbone), draw(backbone)
        frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
        before = backbone.tokens(inputs, [backbone.depth - 1])[backbone.depth - 1]
        move(model, inputs)
        still = [name for name, tensor in trainable(model).items() if tensor.grad is None or not tensor.grad.any()]
        assert [name for name in still if not name.endswith("k_proj.bias")] == []  # it shifts all logits of a row alike
        assert [name for name, tensor in frozen.items() if not torch.equal(model.get_parameter(name), tensor)] == []
        after = backbone.tokens(inputs, [backbone.depth - 1])[backbone.depth - 1]
        assert torch.equal(after, before), "the backbone itself was changed"

    def test_what_is_saved_makes_the_same_model_again(
        self, method: str, options: dict[str, Any], backbone: Any
    ) -> None:
        inputs, model = draw(backbone), tune(method, options, backbone)
        move(model, inputs)
        saved = {name: tensor.detach().clone() for name, tensor in adapter_state_dict(copy.deepcopy(model)).items()}
        for state in (saved, model.state_dict()):
            fresh = tune(method, options, backbone)
            shake(fresh)
            fresh.load_state_dict(state, strict=state is not saved)
            torch.testing.assert_close(fresh(inputs), model(inputs))

    def test_a_copy_is_independent(self, method: str, options: dict[str, Any], backbone: Any) -> None:
        inputs, model = draw(backbone), tune(method, options, backbone)
        shake(model)
        logits, copied = model(inputs), copy.deepcopy(model)
        assert torch.equal(copied(inputs), logits)
        assert len(list(copied.parameters())) == len(list(model.parameters())), "what is shared was copied twice"
        shake(copied)
        assert torch.equal(model(inputs), logits)
        assert not torch.allclose(copied(inputs), logits)

    def test_checkpointing_keeps_the_gradients(self, method: str, options: dict[str, Any], backbone: Any) -> None:
        inputs, model = draw(backbone), tune(method, options, backbone)
        shake(model)
        parameters = list(trainable(model).values())
        wanted = torch.autograd.grad(model(inputs).square().sum(), parameters)
        copied = copy.deepcopy(model)
        for each in (model, copied):
            each.checkpoint_blocks()
            found = torch.autograd.grad(each(inputs).square().sum(), list(trainable(each).values()))
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(copy.deepcopy(model)(inputs), model(inputs))

    def test_attention_without_the_fused_kernel_is_the_same(
        self, method: str, options: dict[str, Any], backbone: Any
    ) -> None:
        inputs, model = draw(backbone), tune(method, options, backbone)
        shake(model)
        wanted = torch.autograd.grad(model(inputs).square().sum(), list(trainable(model).values()))
        model.unfuse_attention()
        found = torch.autograd.grad(model(inputs).square().sum(), list(trainable(model).values()))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)

    def test_mixed_precision_stays_close(self, method: str, options: dict[str, Any], backbone: Any) -> None:
        inputs, model = draw(backbone), tune(method, options, backbone)
        shake(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        logits.float().sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in trainable(model).values())
        exact = model(inputs)
        assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()

    def test_merges_where_it_can_and_comes_apart_again(
        self, method: str, options: dict[str, Any], backbone: Any
    ) -> None:
        inputs, model = draw(backbone), tune(method, options, backbone)
        shake(model)
        if method not in MERGEABLE:
            with pytest.raises(UserError, match="merge"):
                merge(model.module)
            return
        before, weights = model(inputs), {k: v.clone() for k, v in model.state_dict().items()}
        plain = merge(model.module)
        torch.testing.assert_close(model(inputs), before, rtol=1e-4, atol=1e-5)
        assert {type(m) for m in plain.modules()} == {type(m) for m in backbone.module.modules()}
        assert set(plain.state_dict()) == set(backbone.module.state_dict())
        unmerge(model.module)
        assert torch.equal(model(inputs), before)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
