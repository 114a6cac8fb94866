"""Prompt tokens: new ones for every block, or one set that is inserted before the first block."""

from typing import Any

import pytest
import torch
from end_to_end import DEPTH, DIM, EndToEnd, load, tune
from torch import Tensor

from adapt.methods.trained_parameters import count_params, trainable
from extract.backbones.backbone import TimmBackbone, empty_backbone
from store.errors import UserError

PROMPTS = 4
CASES: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"depth": 1}),
    ("deit_tiny_distilled_patch16_224", {"img_size": (32, 48)}),
    ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_base_patch16_clip_224", {}),
    ("eva02_tiny_patch14_224", {}),  # rotary embeddings
    ("vit_small_patch16_rope_mixed_224", {"init_values": 0.5}),  # others in every block
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
    ("vit_small_patch16_18x2_224", {"init_values": 0.5}),  # parallel sublayers
]
DEEP = pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])


def build(backbone: TimmBackbone, deep: bool, num_prompts: int = PROMPTS) -> Any:
    return tune("prompt", {"num_prompts": num_prompts, "deep": deep}, backbone)


def embed(module: Any, images: Tensor) -> Tensor:
    """Input of the first block."""
    return module.norm_pre(module._pos_embed(module.patch_embed(images)))


@pytest.mark.parametrize(("name", "kwargs"), CASES)
@pytest.mark.parametrize(
    ("method", "options"), [("prompt", {"num_prompts": PROMPTS, "deep": deep}) for deep in (True, False)]
)
class TestEveryFamily(EndToEnd):
    @pytest.fixture
    def backbone(self, name: str, kwargs: dict[str, Any]) -> TimmBackbone:
        return load(name, **kwargs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224"])
@DEEP
def test_prompts_are_the_equations(name: str, deep: bool) -> None:
    backbone = load(name)
    model, prefix = build(backbone, deep), backbone.layout.num_prefix_tokens
    images = torch.randn(2, *backbone.image_size)
    x = embed(backbone.module, images)
    for layer, block in enumerate(backbone.module.blocks):
        if deep or layer == 0:
            prompts = model.module.blocks[layer].prompts.tokens.expand(2, -1, -1)
            x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
        x = block(x)
        if deep or layer == DEPTH - 1:
            x = torch.cat([x[:, :prefix], x[:, prefix + PROMPTS :]], dim=1)
    torch.testing.assert_close(model._backbone.tokens(images, [DEPTH - 1])[DEPTH - 1], x)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "eva02_base_patch14_224"])
def test_prompts_that_none_attends_to_change_nothing(name: str) -> None:
    """Masked prompts show that patches keep their rotary positions and blocks get their other arguments."""
    backbone = load(name)
    model, prefix = build(backbone, deep=True), backbone.layout.num_prefix_tokens
    images = torch.randn(2, *backbone.image_size)
    x = backbone.module._pos_embed(backbone.module.patch_embed(images))
    x, others = (x[0], {"rope": x[1]}) if isinstance(x, tuple) else (x, {})
    hidden = torch.zeros(1, 1, 1, backbone.layout.num_tokens + PROMPTS)
    hidden[..., prefix : prefix + PROMPTS] = -torch.inf
    mask = hidden.expand(1, 1, backbone.layout.num_tokens + PROMPTS, -1)
    wanted = backbone.module.blocks[1](x, **others)
    torch.testing.assert_close(model.module.blocks[1](x, **others, attn_mask=mask), wanted)


@pytest.mark.parametrize(("options", "count"), [({}, 12 * 10 * 768), ({"num_prompts": 50, "deep": False}, 50 * 768)])
def test_counts_follow_the_formulas_without_any_memory(options: dict[str, Any], count: int) -> None:
    backbone = empty_backbone("vit_base_patch16_224", {})
    with torch.device("meta"):
        model = tune("prompt", options, backbone)
    assert count_params(model)[0] == count
    assert all(tensor.is_meta for tensor in trainable(model).values())


def test_prompts_start_as_uniform_as_the_paper_says() -> None:
    model = build(load("vit_tiny_patch16_224"), deep=True, num_prompts=100)
    bound = (6 / (3 * 8 * 8 + DIM)) ** 0.5
    for block in model.module.blocks:
        assert 0.95 * bound < block.prompts.tokens.abs().max() <= bound
        assert abs(block.prompts.tokens.std() - bound / 3**0.5) < 0.05 * bound


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("beit_base_patch16_224", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
        ("vit_relpos_small_patch16_224", {}),
    ],
)
@DEEP
def test_a_bias_for_every_pair_of_tokens_is_refused(name: str, kwargs: dict[str, Any], deep: bool) -> None:
    with pytest.raises(
        UserError, match=r"prompt adds tokens, but this backbone has a bias.*(rel_pos|relative_position)"
    ):
        build(load(name, **kwargs), deep)
