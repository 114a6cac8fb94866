"""LePE and relative position bias, by hooks on timm's attention, equal an attention that is written out."""

from typing import Any

import pytest
import torch
from end_to_end import DIM, HEADS, EndToEnd, load, shake, tune
from literal_positions import literal_bias, literal_convolution
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.lepe import LocalEncoding
from adapt.methods.in_backbone.relative_position_bias import RelativePositionBias
from adapt.methods.trained_parameters import count_params, trainable
from extract.backbones.backbone import TimmBackbone, empty_backbone
from store.errors import UserError

CASES: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"scale_attn_norm": True, "qk_norm": True}),
    ("deit_tiny_distilled_patch16_224", {"img_size": (32, 48)}),
    ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    ("vit_base_patch16_siglip_224", {"img_size": (48, 16)}),
    ("eva02_base_patch14_224", {}),  # separate projections
    ("eva_giant_patch14_224", {}),  # one projection, with a separate bias
    ("vit_small_patch16_rope_mixed_224", {"init_values": 0.5}),
    ("beit_base_patch16_224", {}),
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
]
METHODS = pytest.mark.parametrize("method", ["lepe", "rpb"])


def project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V, (batch, tokens, dim) each."""
    if getattr(attention, "qkv", None) is None:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    return F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)


def literal_attention(attention: Any, x: Tensor, bias: Tensor, local: Tensor) -> Tensor:
    """The attention, written out: `bias` is added to the logits, `local` to the output."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in project(attention, x))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    weights = (q @ k.transpose(-2, -1) * attention.scale + bias).softmax(dim=-1)
    output = (weights @ v).transpose(1, 2).flatten(2) + local
    output = attention.norm(output) if hasattr(attention, "norm") else output
    return F.linear(output, attention.proj.weight, attention.proj.bias)


def own_bias(attention: Any) -> Tensor:
    """BEiT's own relative position bias."""
    return torch.zeros(()) if getattr(attention, "window_size", None) is None else attention._get_rel_pos_bias()


@pytest.mark.parametrize(("name", "kwargs"), CASES)
class TestAgainstTheAttentionWrittenOut:
    def test_lepe(self, name: str, kwargs: dict[str, Any]) -> None:
        backbone = load(name, **kwargs)
        model, layout = tune("lepe", {}, backbone), backbone.layout
        shake(model)
        attention, x = model.module.blocks[1].attn, torch.randn(2, layout.num_tokens, DIM)
        plain = backbone.module.blocks[1].attn
        v = project(plain, x)[2]
        local = literal_convolution(v, attention.lepe.conv, layout.num_prefix_tokens, layout.grid)
        torch.testing.assert_close(attention(x), literal_attention(plain, x, own_bias(plain), local))

    def test_rpb(self, name: str, kwargs: dict[str, Any]) -> None:
        backbone = load(name, **kwargs)
        model, layout = tune("rpb", {}, backbone), backbone.layout
        shake(model)
        attention, x = model.module.blocks[1].attn, torch.randn(2, layout.num_tokens, DIM)
        plain = backbone.module.blocks[1].attn
        bias = literal_bias(attention.rpb.table, layout.num_prefix_tokens, layout.grid) + own_bias(plain)
        torch.testing.assert_close(attention(x), literal_attention(plain, x, bias, torch.zeros(())))


@pytest.mark.parametrize(("name", "kwargs"), CASES)
@pytest.mark.parametrize(("method", "options"), [("lepe", {}), ("rpb", {})])
class TestEveryFamily(EndToEnd):
    @pytest.fixture
    def backbone(self, name: str, kwargs: dict[str, Any]) -> TimmBackbone:
        return load(name, **kwargs)


@METHODS
def test_the_fused_kernel_still_computes_the_attention(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, calls = F.scaled_dot_product_attention, []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return fused(*args, **kwargs)

    backbone = load("vit_tiny_patch16_224")
    model = tune(method, {}, backbone)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(torch.randn(2, *backbone.image_size))
    assert len(calls) == 3


@METHODS
def test_a_model_may_be_cast_to_half_precision(method: str) -> None:
    backbone = load("vit_tiny_patch16_224")
    model = tune(method, {}, backbone).bfloat16()
    shake(model)
    assert model(torch.randn(2, *backbone.image_size).bfloat16()).isfinite().all()


def test_lepe_keeps_no_tensor_between_passes() -> None:
    backbone = load("eva_giant_patch14_224")
    model = tune("lepe", {}, backbone)
    model.module.set_grad_checkpointing(True)
    encodings = [module for module in model.modules() if isinstance(module, LocalEncoding)]
    logits = model(torch.randn(2, *backbone.image_size))
    assert [encoding._kept for encoding in encodings] == [None] * 3
    logits.sum().backward()
    assert [encoding._kept for encoding in encodings] == [None] * 3


def test_lepe_neither_reads_nor_writes_prefix_tokens() -> None:
    backbone = load("vit_small_patch14_reg4_dinov2")
    encoding = LocalEncoding(backbone.layout, 0, DIM)
    nn.init.normal_(encoding.conv.weight)
    nn.init.normal_(encoding.conv.bias)
    v = torch.randn(2, backbone.layout.num_tokens, DIM)
    changed = v.clone()
    changed[:, :5] = torch.randn(2, 5, DIM)
    assert torch.equal(encoding(v), encoding(changed))
    assert not encoding(v)[:, :5].any()
    assert encoding(v)[:, 5:].all()


def test_relative_position_bias_gives_none_to_prefix_tokens() -> None:
    bias = RelativePositionBias(load("vit_small_patch14_reg4_dinov2").layout, HEADS, ("attn_mask",), "attn_mask")
    nn.init.normal_(bias.table)
    assert not bias()[..., :5, :].any()
    assert not bias()[..., :, :5].any()
    assert bias()[..., 5:, 5:].all()


def test_relative_position_bias_adds_to_a_mask_that_is_given() -> None:
    backbone = load("vit_tiny_patch16_224")
    model = tune("rpb", {}, backbone)
    shake(model)
    attention, x, mask = model.module.blocks[0].attn, torch.randn(2, 17, DIM), torch.randn(1, 1, 17, 17)
    bias = literal_bias(attention.rpb.table, 1, (4, 4)) + mask
    wanted = literal_attention(backbone.module.blocks[0].attn, x, bias, torch.zeros(()))
    torch.testing.assert_close(attention(x, attn_mask=mask), wanted)


@pytest.mark.parametrize(
    ("method", "kwargs", "count"),
    [
        ("lepe", {}, 92_160),
        ("lepe", {"embed_dim": 512, "num_heads": 8, "patch_size": 32}, 61_440),
        ("rpb", {}, 104_976),
        ("rpb", {"embed_dim": 512, "num_heads": 8, "patch_size": 32}, 16_224),
        ("lepe", {"img_size": (224, 320)}, 92_160),
        ("rpb", {"img_size": (224, 320)}, 12 * 12 * 27 * 39),
    ],
)
def test_counts_are_the_published_ones_without_any_memory(method: str, kwargs: dict[str, Any], count: int) -> None:
    backbone = empty_backbone("vit_base_patch16_224", kwargs)
    with torch.device("meta"):
        model = tune(method, {}, backbone)
    assert count_params(model)[0] == count
    assert all(tensor.is_meta for tensor in trainable(model).values())


def test_lepe_refuses_a_v_narrower_than_the_output() -> None:
    backbone = load("eva02_base_patch14_224")
    backbone.module.blocks[1].attn.v_proj = nn.Linear(DIM, DIM // 2)
    with pytest.raises(UserError, match=r"32 wide, a convolution of V, which is 16 wide here \(grouped-query"):
        tune("lepe", {}, backbone)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("lepe", "vit_small_patch16_18x2_224", "this backbone has no 'v' in its blocks .ParallelThingsBlock"),
        ("rpb", "vit_small_patch16_18x2_224", "that of ParallelThingsBlock does not take .attn_mask or shared"),
        ("rpb", "vit_relpos_small_patch16_224", "that of RelPosBlock does not take .attn_mask or shared"),
    ],
)
def test_an_attention_that_cannot_be_reached_is_refused(method: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tune(method, {}, load(name))
