"""The attentive probe, the transformer probe and Ladder Side-Tuning compute their equations, on every layout."""

import copy
from typing import Any

import pytest
import torch
from small_pre_logits import layout_of, make_pre_logits
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import METHODS, build_model
from adapt.methods.trained_parameters import adapter_state_dict, count_params, trainable
from store.errors import UserError

CLASSES, DIM, LAYERS = 5, 16, (1, 3, 4)
LAYOUTS = [(1, (3, 4)), (0, (3, 4)), (5, (2, 3))]  # prefix tokens and grid: plain, none, with registers
CASES: list[tuple[str, dict[str, Any]]] = [
    ("attentive_probe", {}),
    ("transformer_probe", {}),
    ("ladder", {"reduction": 4, "num_heads": 2}),
    ("ladder", {"reduction": 2, "num_heads": 1, "layers": [4]}),
]


def make_spec(prefix: int = 1, grid: tuple[int, ...] = (3, 4), dim: int = DIM) -> FeatureSpec:
    layout = layout_of(prefix, grid)
    return FeatureSpec(layers=LAYERS, depth=6, dim=dim, layout=layout, pre_logits=make_pre_logits(dim, layout))


def build(method: str, spec: FeatureSpec, **options: Any) -> nn.Module:
    return build_model(method, spec, CLASSES, METHODS[method].options.model_validate(options))


def draw_tokens(spec: FeatureSpec, batch: int = 4) -> dict[int, Tensor]:
    return {layer: 3 * torch.randn(batch, spec.layout.num_tokens, spec.dim) for layer in spec.layers}


def move(model: nn.Module) -> nn.Module:
    """Set every trained tensor to random values, in double precision."""
    for tensor in trainable(model).values():
        nn.init.normal_(tensor, std=0.3)
    return model.double()


ON_LAYOUTS = [(*case, *layout) for case in CASES for layout in LAYOUTS] + [
    (*case, 1, ()) for case in CASES if case[0] != "attentive_probe"
]


@pytest.mark.parametrize(("method", "options", "prefix", "grid"), ON_LAYOUTS)
class TestOnEveryLayout:
    def test_it_starts_as_the_linear_probe_of_the_same_seed(
        self, method: str, options: dict[str, Any], prefix: int, grid: tuple[int, ...]
    ) -> None:
        spec = make_spec(prefix, grid)
        torch.manual_seed(3)
        model = build(method, spec, **options)
        torch.manual_seed(3)
        probe, tokens = build("linear_probe", spec), draw_tokens(spec)
        assert torch.equal(model(tokens), probe(tokens))

    def test_every_trained_tensor_moves_and_no_gradient_reaches_the_features(
        self, method: str, options: dict[str, Any], prefix: int, grid: tuple[int, ...]
    ) -> None:
        spec = make_spec(prefix, grid)
        model, tokens = build(method, spec, **options), draw_tokens(spec)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens).square().sum().backward()
            optimizer.step()
        assert [name for name, tensor in trainable(model).items() if not tensor.grad.abs().sum() > 0] == []
        assert all(values.grad is None for values in tokens.values())
        assert all(parameter.grad is None for parameter in spec.pre_logits.parameters())


@pytest.mark.parametrize(("method", "options"), CASES)
class TestEveryMethod:
    def test_autocast_gives_nearly_the_same(self, method: str, options: dict[str, Any]) -> None:
        spec = make_spec()
        model, tokens = move(build(method, spec, **options)).float(), draw_tokens(spec)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(tokens)
        rough.float().square().sum().backward()
        exact = model(tokens)
        assert (rough - exact).norm() < 0.05 * exact.norm()
        assert all(tensor.grad.isfinite().all() for tensor in trainable(model).values())

    def test_a_copy_and_what_is_saved_give_the_same_logits(self, method: str, options: dict[str, Any]) -> None:
        spec = make_spec()
        model, fresh = move(build(method, spec, **options)).float(), build(method, spec, **options)
        fresh.load_state_dict(adapter_state_dict(model), strict=False)
        tokens = draw_tokens(spec)
        assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
        assert torch.equal(fresh(tokens), model(tokens))

    def test_a_pool_without_its_tokens_is_refused(self, method: str, options: dict[str, Any]) -> None:
        with pytest.raises(
            UserError,
            match=r"pool 'cls' is not available: it needs tokens that are not there.*legal: mean, flatten, backbone",
        ):
            build(method, make_spec(prefix=0), pool="cls", **options)
        with pytest.raises(
            UserError, match=r"pool 'mean' is not available: it needs tokens that are not there.*legal: cls, flatten$"
        ):
            build(method, make_spec(grid=()), pool="mean", **options)


def ladder_count(dim: int, reduction: int, layers: int) -> int:
    side = dim // reduction
    return layers * (12 * side**2 + 13 * side + dim * side + side) + layers - 1 + side * dim + dim


@pytest.mark.parametrize(
    ("dim", "method", "options", "count"),
    [
        (768, "transformer_probe", {}, 7_087_872),
        (768, "transformer_probe", {"num_heads": 12, "pool": "cls"}, 12 * 768**2 + 13 * 768),
        (768, "attentive_probe", {}, 768 + 2 * 768**2 + 768 * 1536),
        (768, "attentive_probe", {"pool": "mean"}, 768 + 3 * 768**2),
        (768, "ladder", {}, ladder_count(768, 8, 3)),
        (192, "ladder", {"reduction": 2, "layers": [3, 4]}, ladder_count(192, 2, 2)),
        (192, "ladder", {"reduction": 16, "layers": [4]}, ladder_count(192, 16, 1)),
    ],
)
def test_as_many_parameters_as_the_formula_on_the_meta_device(
    dim: int, method: str, options: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        model = build(method, make_spec(dim=dim), **options)
    assert all(tensor.is_meta for tensor in trainable(model).values())
    assert count_params(model)[0] == count


@pytest.mark.parametrize("num_heads", [1, 4, 8])
@pytest.mark.parametrize("layer", ["last", 3])
@pytest.mark.parametrize(("prefix", "grid"), LAYOUTS)
def test_the_attentive_probe_is_cross_attention_of_one_query(
    prefix: int, grid: tuple[int, ...], num_heads: int, layer: str | int
) -> None:
    """The reference computes keys and values of all tokens."""
    spec = make_spec(prefix, grid)
    model = move(build("attentive_probe", spec, num_heads=num_heads, layer=layer))
    tokens = {layer: values.double() for layer, values in draw_tokens(spec).items()}
    x, pooler = model.readout.normalize(tokens[4 if layer == "last" else 3]), model.pooler

    def project(weight: Tensor) -> Tensor:
        return (x @ weight.flatten(0, 1).T).unflatten(2, (num_heads, -1)).transpose(1, 2)

    query = pooler.query[None, :, None].expand(len(x), -1, -1, -1)
    found = F.scaled_dot_product_attention(query, project(pooler.key), project(pooler.value))
    pooled = model.readout.pool(x) + pooler.out(found.flatten(1))
    torch.testing.assert_close(model(tokens), model.readout.classify(pooled))


def test_the_pooled_features_that_the_attention_adds_to_are_standardized() -> None:
    spec = make_spec()
    model, tokens = build("attentive_probe", spec), draw_tokens(spec)
    model.readout.standardize(torch.randn(50, 2 * DIM) * 4 + 1, torch.zeros(2 * DIM))
    probe = build("linear_probe", spec)
    probe.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens), probe(tokens))


def literal_block(block: nn.Module, x: Tensor, num_heads: int) -> Tensor:
    """A pre-norm transformer block, written out."""
    attn, mlp = block.attn, block.mlp
    q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=3)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + mlp.fc2(F.gelu(mlp.fc1(block.norm2(x))))


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_transformer_probe_is_one_block_before_the_final_norm(prefix: int) -> None:
    spec = make_spec(prefix)
    model = move(build("transformer_probe", spec, num_heads=2))
    tokens = {layer: values.double() for layer, values in draw_tokens(spec).items()}
    expected = model.readout(model.readout.normalize(literal_block(model.block, tokens[4], num_heads=2)))
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize(("layers", "used"), [("all", LAYERS), ([1, 4], (1, 4)), ([4], (4,))])
def test_the_ladder_is_its_equations(layers: Any, used: tuple[int, ...]) -> None:
    spec = make_spec()
    model = move(build("ladder", spec, reduction=2, num_heads=2, layers=layers))
    tokens = {layer: values.double() for layer, values in draw_tokens(spec).items()}
    assert model.layers == used
    rungs = [down(F.layer_norm(tokens[layer], (DIM,))) for layer, down in zip(used, model.downs, strict=True)]
    h = literal_block(model.blocks[0], rungs[0], num_heads=2)
    for i in range(1, len(used)):
        mu = torch.sigmoid(model.gates[i - 1] / 0.1)
        h = literal_block(model.blocks[i], mu * rungs[i] + (1 - mu) * h, num_heads=2)
    torch.testing.assert_close(model(tokens), model.readout(model.readout.normalize(tokens[used[-1]] + model.up(h))))


def test_the_gates_of_the_ladder_start_half_open() -> None:
    assert [gate.item() for gate in build("ladder", make_spec(), reduction=4).gates] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "attentive_probe",
            {"num_heads": 3},
            r"num_heads 3 does not divide the width 16 of the tokens; legal: 1, 2, 4, 8",
        ),
        (
            "transformer_probe",
            {"num_heads": 5},
            "num_heads 5 does not divide the width 16 of the tokens; legal: 1, 2, 4",
        ),
        ("ladder", {"reduction": 3}, "reduction 3 does not divide the width 16 of the tokens; legal: 1, 2, 4, 8, 16"),
        (
            "ladder",
            {"num_heads": 4},
            r"num_heads 4 does not divide the width 2 of the side network \(16 / reduction 8\)",
        ),
        ("ladder", {"reduction": 4, "layers": [0]}, r"layers \[0\] are not in the features, which hold \[1, 3, 4\]"),
    ],
)
def test_widths_and_layers_that_do_not_fit_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(method, make_spec(), **options)


@pytest.mark.parametrize(("prefix", "grid"), [(1, ()), (0, (1, 1))])
def test_attention_over_a_single_token_is_refused(prefix: int, grid: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"the features hold only one: set store\.tokens: all, or take linear_probe"):
        build("attentive_probe", make_spec(prefix, grid))
