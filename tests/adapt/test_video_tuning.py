"""Methods that train inside the backbone, on clips: with an image model frame by frame, and with ViViT."""

from typing import Any

import pytest
import torch
from end_to_end import CLASSES, EndToEnd, draw, shake, tune
from literal_positions import literal_bias, literal_convolution
from torch import Tensor
from torch.nn import functional as F

from adapt.features.specs import spec_of_backbone
from adapt.methods.in_backbone.lepe import LocalEncoding
from adapt.methods.registry import METHODS, build_model
from adapt.methods.trained_parameters import count_params, trainable
from extract.backbones.backbone import TimmBackbone, empty_backbone, load_backbone
from extract.backbones.frame_by_frame import FrameBackbone
from extract.backbones.vivit import VivitBackbone
from extract.config import BackboneConfig, ClipConfig

DIM, DEPTH, HEADS, FRAMES, GRID, TOKENS = 32, 3, 2, 4, (2, 4, 3), 25
VIVIT = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * DIM,
    "num_frames": FRAMES,
    "tubelet_size": [2, 8, 8],
    "image_size": [32, 24],
}


def adapter_count(bottleneck: int, adapters: int) -> int:
    """Parameters of maps down and up, with their biases."""
    return adapters * (2 * DIM * bottleneck + bottleneck + DIM)


BLOCK = 12 * DIM**2 + 13 * DIM
EMBEDDINGS = 3 * 2 * 8 * 8 * DIM + DIM + DIM + TOKENS * DIM  # patches of 2 frames, class token, positions

# method, options, parameters without the head on ViViT
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("full", {}, DEPTH * BLOCK + EMBEDDINGS + 2 * DIM),
    ("bitfit", {}, DEPTH * 11 * DIM + 2 * DIM),  # q, k, v, o, 4 + 1 and two norms; patches and final norm
    ("layernorm", {}, 2 * DIM * (2 * DEPTH + 1)),
    ("attention", {}, DEPTH * (4 * DIM**2 + 4 * DIM)),
    ("lora", {"rank": 2}, 4 * DEPTH * DIM * 2),
    ("lora", {"rank": 1, "targets": ["q", "k", "v", "proj", "fc1", "fc2"]}, DEPTH * (8 * DIM + 10 * DIM)),
    ("lora_fix", {"rank": 2}, 2 * DEPTH * DIM * 2),
    ("kronecker", {"n": 4}, 4 * DEPTH * DIM + 2 * 4**3),
    ("kronecker", {"n": 4, "slow_rank": 1, "bias": True}, 5 * DEPTH * DIM + 2 * 2 * 4**2),
    ("adapter", {"bottleneck": 4}, adapter_count(4, 2 * DEPTH)),
    ("adapter", {"bottleneck": 4, "places": ["attention"]}, adapter_count(4, DEPTH)),
    ("adapter_drop", {"bottleneck": 4}, adapter_count(4, 2)),
    ("compacter", {"bottleneck": 8, "n": 4}, 4 * DEPTH * (DIM + 8) + 4**3 + 2 * DEPTH * (DIM + 8)),
    ("lepe", {}, 28 * DEPTH * DIM),
    ("rpb", {}, DEPTH * HEADS * 3 * 7 * 5),
    ("prompt", {"num_prompts": 3}, 3 * DEPTH * DIM),
    ("prompt", {"num_prompts": 3, "deep": False}, 3 * DIM),
    ("intrinsic", {"dim": 10}, 10),
    ("intrinsic", {"dim": 50, "module": "mlp", "block": 1}, 50),
]
EVERY_CASE = pytest.mark.parametrize(("method", "options"), [case[:2] for case in CASES])


@pytest.fixture(scope="module")
def vivit() -> VivitBackbone:
    """A ViViT of three blocks for clips of 4 frames of 32 x 24: a class token and a grid of (2, 4, 3)."""
    config = BackboneConfig(name="vivit", weights="random", model_kwargs=VIVIT)
    backbone = load_backbone(config, ClipConfig(frames=FRAMES))
    assert isinstance(backbone, VivitBackbone)
    with torch.no_grad():
        for tensor in backbone.module.layers.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return backbone


@EVERY_CASE
class TestOnViViT(EndToEnd):
    @pytest.fixture
    def backbone(self, vivit: VivitBackbone) -> VivitBackbone:
        return vivit


@EVERY_CASE
class TestFrameByFrame(EndToEnd):
    @pytest.fixture
    def backbone(self, tiny_backbone: TimmBackbone) -> FrameBackbone:
        return FrameBackbone(tiny_backbone, 3)


def test_every_end_to_end_method_has_a_case() -> None:
    assert {case[0] for case in CASES} == {name for name, method in METHODS.items() if method.trains_backbone}


@pytest.mark.parametrize(("method", "options", "params"), CASES)
def test_methods_train_as_many_parameters_as_their_formula(
    method: str, options: dict[str, Any], params: int, vivit: VivitBackbone
) -> None:
    assert count_params(tune(method, options, vivit)) == (params, CLASSES * (2 * DIM + 1))


@EVERY_CASE
def test_frame_by_frame_a_method_adds_what_it_adds_to_an_image(
    method: str, options: dict[str, Any], tiny_backbone: TimmBackbone
) -> None:
    """All frames share the parameters, and a clip of equal frames has the logits of the image."""
    of_image, of_clip = (
        tune(method, options, backbone) for backbone in (tiny_backbone, FrameBackbone(tiny_backbone, 3))
    )
    shake(of_image)
    of_clip.load_state_dict(of_image.state_dict())
    assert count_params(of_clip) == count_params(of_image)
    images = draw(tiny_backbone)
    torch.testing.assert_close(of_clip(images[:, None].expand(-1, 3, -1, -1, -1)), of_image(images))


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("lora", 4 * 12 * 768 * 4),
        ("lepe", 12 * 28 * 768),
        ("rpb", 12 * 12 * 31 * 27 * 27),
        ("prompt", 12 * 10 * 768),
        ("adapter", 24 * (2 * 768 * 64 + 64 + 768)),
    ],
)
def test_counts_on_vivit_b_need_no_memory(method: str, params: int) -> None:
    backbone = empty_backbone("vivit", {})
    spec = spec_of_backbone(backbone, range(backbone.depth))
    with torch.device("meta"):
        model = build_model(method, spec, CLASSES, METHODS[method].options(), backbone=backbone)
    assert count_params(model)[0] == params
    assert all(tensor.is_meta for tensor in trainable(model).values())


def literal_attention(attention: Any, x: Tensor, bias: Tensor, local: Tensor) -> Tensor:
    """ViViT's attention, written out: `bias` is added to the logits, `local` to the output."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for projection in projections)
    weights = (q @ k.mT / (DIM // HEADS) ** 0.5 + bias).softmax(dim=-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2) + local, attention.o_proj.weight, attention.o_proj.bias)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
class TestAgainstTheAttentionWrittenOut:
    def test_lepe(self, kernel: str, vivit: VivitBackbone) -> None:
        model, x = tune("lepe", {}, vivit), torch.randn(2, TOKENS, DIM)
        shake(model)
        model.module.set_attn_implementation(kernel)
        attention, plain = model.module.layers[1].attention, vivit.module.layers[1].attention
        local = literal_convolution(plain.v_proj(x), attention.lepe.conv, 1, GRID)
        torch.testing.assert_close(attention(x)[0], literal_attention(plain, x, torch.zeros(()), local))

    def test_rpb(self, kernel: str, vivit: VivitBackbone) -> None:
        model, x = tune("rpb", {}, vivit), torch.randn(2, TOKENS, DIM)
        shake(model)
        model.module.set_attn_implementation(kernel)
        attention, plain = model.module.layers[1].attention, vivit.module.layers[1].attention
        bias, mask = literal_bias(attention.rpb.table, 1, GRID), torch.randn(1, 1, TOKENS, TOKENS)
        wanted = literal_attention(plain, x, bias + mask, torch.zeros(()))
        for output, _ in (
            attention(x, mask),
            attention(x, attention_mask=mask),
            attention(attention_mask=mask, hidden_states=x),
        ):
            torch.testing.assert_close(output, wanted)
        wanted = literal_attention(plain, x, bias, torch.zeros(()))
        torch.testing.assert_close(attention(x, None)[0], wanted)


def test_adapters_are_applied_before_both_residuals_and_are_dropped_with_the_sublayer(vivit: VivitBackbone) -> None:
    model, x = tune("adapter", {"bottleneck": 4}, vivit), torch.randn(2, TOKENS, DIM)
    shake(model)
    frozen, block = vivit.module.layers[1], model.module.layers[1]
    behind_attention, behind_mlp = block.attention.o_proj[1], block.mlp.fc2[1]
    middle = x + behind_attention(frozen.attention(frozen.layernorm_before(x))[0])
    wanted = middle + behind_mlp(frozen.mlp(frozen.layernorm_after(middle)))
    torch.testing.assert_close(block(x), wanted)
    block.dropout.p = 1.0
    assert torch.equal(block.train()(x), x)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_are_the_equations(deep: bool, vivit: VivitBackbone) -> None:
    model, clips = tune("prompt", {"num_prompts": 3, "deep": deep}, vivit), draw(vivit)
    x = vivit.module.embeddings(clips)
    for layer, block in enumerate(vivit.module.layers):
        if deep or layer == 0:
            prompts = model.module.layers[layer].prompts.tokens.expand(2, -1, -1)
            x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)
        x = block(x)
        if deep or layer == DEPTH - 1:
            x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
    torch.testing.assert_close(model._backbone.tokens(clips, [DEPTH - 1])[DEPTH - 1], x)


def test_prompts_start_as_wide_as_the_fan_of_a_tubelet_says(vivit: VivitBackbone) -> None:
    bound = (6 / (3 * 2 * 8 * 8 + DIM)) ** 0.5
    for block in tune("prompt", {"num_prompts": 100}, vivit).module.layers:
        assert 0.95 * bound < block.prompts.tokens.abs().max() <= bound


def test_lepe_keeps_no_tensor_between_passes(vivit: VivitBackbone) -> None:
    model = tune("lepe", {}, vivit)
    model.checkpoint_blocks()
    encodings = [module for module in model.modules() if isinstance(module, LocalEncoding)]
    logits = model(draw(vivit))
    assert [encoding._kept for encoding in encodings] == [None] * DEPTH
    logits.sum().backward()
    assert [encoding._kept for encoding in encodings] == [None] * DEPTH


@pytest.mark.parametrize("method", ["lora", "rpb", "adapter"])
def test_checkpointing_keeps_only_the_inputs_of_blocks(method: str, vivit: VivitBackbone) -> None:
    def kept(model: Any) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(clips)
        return sum(seen.values())

    model, clips = tune(method, {}, vivit), draw(vivit)
    before = kept(model)
    model.checkpoint_blocks()
    assert kept(model) < before / 4
