"""Properties of all methods, tested over two tables of cases: from features, and inside the backbone."""

import copy
from typing import Any

import pytest
import torch
from end_to_end import CLASSES, EndToEnd, draw, load, move, tune
from method_cases import (
    CASES,
    DIM,
    LAYERS,
    TINY_DIM,
    TUNED_CASES,
    WITH_PARAMETERS,
    build,
    draw_tokens,
    losa_count,
    make_spec,
)
from small_pre_logits import layout_of, make_pre_logits
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokenBatch
from adapt.methods.from_features.losa import LoSA, LoSAOptions
from adapt.methods.registry import METHODS
from adapt.methods.trained_parameters import adapter_state_dict, count_params, trainable
from extract.backbones.backbone import TimmBackbone
from extract.backbones.pre_logits import NormOnly, PreLogits
from store.errors import UserError
from store.layout import TokenLayout


def test_every_method_has_a_case() -> None:
    assert {case[0] for case in [*CASES, *TUNED_CASES]} == set(METHODS)


@pytest.mark.parametrize(("method", "options", "params", "head"), CASES)
class TestEveryMethod:
    def test_gives_one_logit_a_class(self, method: str, options: dict[str, Any], params: int, head: int) -> None:
        spec = make_spec()
        assert build(method, options, spec)(draw_tokens(spec)).shape == (4, CLASSES)

    def test_trains_as_many_parameters_as_its_formula(
        self, method: str, options: dict[str, Any], params: int, head: int
    ) -> None:
        assert count_params(build(method, options)) == (params, head)


@pytest.mark.parametrize(("method", "options", "params", "head"), WITH_PARAMETERS)
class TestEveryMethodWithParameters:
    def test_starts_as_the_linear_probe_of_the_same_seed(
        self, method: str, options: dict[str, Any], params: int, head: int
    ) -> None:
        spec = make_spec()
        torch.manual_seed(3)
        model = build(method, options, spec)
        torch.manual_seed(3)
        read = {"pool": options.get("pool", "auto"), "layers": list(model.readout.layers)}
        probe = build("linear_probe", read, spec)
        tokens = draw_tokens(spec)
        assert torch.equal(model(tokens), probe(tokens))

    def test_moves_every_trained_tensor_and_nothing_else(
        self, method: str, options: dict[str, Any], params: int, head: int
    ) -> None:
        spec = make_spec()
        model, tokens = build(method, options, spec), draw_tokens(spec)
        frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in trainable(model)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # down-projections receive gradient once the up-projections have left zero
            optimizer.zero_grad()
            model(tokens).square().sum().backward()
            optimizer.step()
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in trainable(model).values())
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())

    def test_asks_no_gradient_of_the_features(
        self, method: str, options: dict[str, Any], params: int, head: int
    ) -> None:
        spec = make_spec()
        model, tokens = build(method, options, spec), draw_tokens(spec)
        before = {layer: values.clone() for layer, values in tokens.items()}
        model(tokens).sum().backward()
        assert all(not values.requires_grad and values.grad is None for values in tokens.values())
        assert all(torch.equal(values, before[layer]) for layer, values in tokens.items())


@pytest.mark.parametrize(("method", "options"), [case[:2] for case in TUNED_CASES])
class TestEveryEndToEndMethod(EndToEnd):
    @pytest.fixture
    def backbone(self, tiny_backbone: TimmBackbone) -> TimmBackbone:
        return tiny_backbone


@pytest.mark.parametrize(("method", "options", "params"), TUNED_CASES)
def test_end_to_end_methods_train_as_many_parameters_as_their_formula(
    method: str, options: dict[str, Any], params: int, tiny_backbone: TimmBackbone
) -> None:
    assert count_params(tune(method, options, tiny_backbone)) == (params, CLASSES * (2 * TINY_DIM + 1))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_batch_norms_keep_their_statistics_which_no_adaptor_holds(method: str) -> None:
    backbone = load("vit_small_resnet26d_224", img_size=64, patch_size=1)
    model, inputs = tune(method, {}, backbone).train(), draw(backbone)
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}
    move(model, inputs)
    assert before
    assert all(torch.equal(model.get_buffer(name), tensor) for name, tensor in before.items())
    fresh = tune(method, {}, backbone)
    fresh.load_state_dict(adapter_state_dict(model), strict=False)
    torch.testing.assert_close(fresh(inputs), model.eval()(inputs))


def literal_losa(model: LoSA, tokens: dict[int, Tensor]) -> Tensor:
    """The equations at the top of losa.py, sample by sample."""
    y = torch.zeros_like(tokens[LAYERS[0]])
    for layer, mixer in zip(model.layers, model.mixers, strict=True):
        x = nn.functional.layer_norm(tokens[layer], (DIM,)) + y
        if model.start == "last":
            x = x + nn.functional.layer_norm(tokens[model.layers[-1]], (DIM,))
        c = mixer.up(nn.functional.gelu(mixer.down(x)))
        g = c.clone()
        prefix = mixer.num_prefix
        for sample in range(len(x)):
            mixed = mixer.token_up(nn.functional.gelu(mixer.token_down((x + c)[sample, prefix:].T)))
            g[sample, prefix:] += mixed.T
        y = y + g
    last = tokens[model.layers[-1]]
    norm = model.readout.normalize
    return model.readout(norm(last + y) if model.add == "before_norm" else norm(last) + y)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("add", ["before_norm", "after_norm"])
@pytest.mark.parametrize("start", ["zero", "last"])
def test_losa_is_the_equations(prefix: int, add: Any, start: Any) -> None:
    spec = make_spec(prefix)
    model = LoSA(spec, CLASSES, LoSAOptions(rank=4, token_rank=3, add=add, start=start))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model, tokens = model.double(), {layer: values.double() for layer, values in draw_tokens(spec).items()}
    torch.testing.assert_close(model(tokens), literal_losa(model, tokens))


def test_prefix_tokens_take_no_part_in_token_mixing() -> None:
    spec = make_spec(prefix=2)
    model = LoSA(spec, CLASSES, LoSAOptions(rank=4, token_rank=3, pool="mean"))
    for mixer in model.mixers:
        nn.init.normal_(mixer.token_up.weight)
    tokens = draw_tokens(spec)
    changed = {layer: values.clone() for layer, values in tokens.items()}
    for values in changed.values():
        values[:, :2] = torch.randn_like(values[:, :2])
    assert torch.equal(model(tokens), model(changed))


def test_layers_are_absolute_for_any_order_of_the_mapping() -> None:
    spec = make_spec()
    model, tokens = build("losa", {"layers": [4, 1], "token_rank": 2}, spec), draw_tokens(spec)
    assert model.layers == (1, 4)
    shuffled = {layer: tokens[layer] for layer in (4, 3, 1)}
    assert torch.equal(model(tokens), model(shuffled))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0]}, r"layers \[0\] are not in the features, which hold \[1, 3, 4\]"),
        ({"layers": [9]}, r"layers \[9\] do not exist: this backbone has 6, numbered 0 to 5"),
        ({"layers": {"last": 4}}, r"last 4 is more than the features hold: \[1, 3, 4\]"),
    ],
)
def test_layers_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("losa", options)


@pytest.mark.parametrize("method", ["linear_probe", "losa", "ladder"])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (1, 3, 4)),
        ([-2, 1], (1, 4)),
        ({"last": 1}, (4,)),
        ({"last": 2}, (3, 4)),
        ({"every": 1}, (1, 3, 4)),
        ({"every": 2}, (1, 4)),
        ({"every": 5}, (4,)),
    ],
)
def test_a_list_names_blocks_and_the_others_count_stored_layers(
    method: str, layers: Any, expected: tuple[int, ...]
) -> None:
    assert build(method, {"layers": layers} | ({"reduction": 4} if method == "ladder" else {})).layers == expected


def test_a_probe_of_several_layers_reads_each_as_a_probe_of_one_does() -> None:
    spec = make_spec()
    tokens, model = draw_tokens(spec), build("linear_probe", {"layers": [4, 1]}, spec)
    read = model.readout.pooled(TokenBatch(tokens))
    apart = [build("linear_probe", {"layers": [layer]}, spec).readout.pooled(TokenBatch(tokens)) for layer in (1, 4)]
    assert torch.equal(read, torch.cat(apart, dim=1))
    assert torch.equal(model(tokens), model.readout.head(read))  # before standardization


def test_a_pool_without_its_tokens_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"pool 'cls' is not available: it needs tokens that are not there.*legal: mean, flatten, backbone",
    ):
        build("linear_probe", {"pool": "cls"}, make_spec(prefix=0))
    with pytest.raises(
        UserError, match=r"pool 'mean' is not available: it needs tokens that are not there.*legal: cls, flatten$"
    ):
        build("losa", {"pool": "mean"}, make_spec(prefix=1, grid=()))


def spec_of(layout: TokenLayout, tail: PreLogits) -> FeatureSpec:
    return FeatureSpec(layers=LAYERS, depth=6, dim=DIM, layout=layout, pre_logits=tail)


DISTILLED = TokenLayout(2, (2, 2), num_class_tokens=2)


@pytest.mark.parametrize(
    ("backbone", "kwargs", "layout", "legal"),
    [
        (layout_of(1, (2, 2)), {"global_pool": "token"}, layout_of(1, (2, 2)), True),
        (layout_of(1, (2, 2)), {"global_pool": "token"}, layout_of(1, ()), True),
        (layout_of(5, (2, 2)), {"global_pool": "token"}, layout_of(1, ()), True),
        (layout_of(1, (2, 2)), {"global_pool": "token"}, layout_of(0, (1, 1)), False),
        (layout_of(1, (2, 2)), {"global_pool": "avg"}, layout_of(1, ()), False),
        (layout_of(1, (2, 2)), {"global_pool": "avg"}, layout_of(0, (1, 1)), False),
        (layout_of(0, (2, 2)), {"global_pool": "avg"}, layout_of(0, (1, 1)), True),
        (layout_of(0, (2, 2)), {"global_pool": "map"}, layout_of(0, (2, 2)), True),
        (layout_of(1, (2, 2)), {"global_pool": "map"}, layout_of(1, ()), False),
        (layout_of(1, (2, 2)), {"global_pool": "prr"}, layout_of(1, ()), False),
        (DISTILLED, {}, layout_of(1, ()), False),
        (DISTILLED, {}, TokenLayout(2, (), num_class_tokens=2), True),
        (DISTILLED, {}, DISTILLED, True),
        (layout_of(3, (3, 2, 2), 3), {"global_pool": "token"}, layout_of(3, (), 3), True),
        (layout_of(3, (3, 2, 2), 3), {"global_pool": "avg"}, layout_of(3, (3, 2, 2), 3), True),
    ],
)
def test_the_backbones_pooling_is_refused_where_its_tokens_are_missing(
    backbone: TokenLayout, kwargs: dict[str, Any], layout: TokenLayout, legal: bool
) -> None:
    spec = spec_of(layout, make_pre_logits(DIM, backbone, **kwargs))
    if not legal:
        with pytest.raises(
            UserError, match=r"'backbone' is not available: .* not there .*; legal: [clsmean_, ]+flatten$"
        ):
            build("linear_probe", {"pool": "backbone"}, spec)
        return
    logits = build("linear_probe", {"pool": "backbone"}, spec)(draw_tokens(spec))
    assert logits.isfinite().all()
    assert logits.shape == (4, CLASSES)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (make_pre_logits(DIM, layout_of(1, (2, 2)), global_pool=""), r"does not pool its tokens \(global_pool ''\)"),
        (PreLogits(NormOnly(nn.Identity(), DIM)), "has no pooling of its own"),
    ],
)
def test_a_backbone_that_does_not_pool_says_so(tail: PreLogits, reason: str) -> None:
    spec = spec_of(layout_of(1, (2, 2)), tail)
    with pytest.raises(
        UserError, match=rf"pool 'backbone' is not available: .*{reason}; legal: cls, mean, cls_mean, flatten$"
    ):
        build("linear_probe", {"pool": "backbone"}, spec)


def test_registers_are_no_class_tokens() -> None:
    layout = TokenLayout(4, (3, 4), num_class_tokens=0)
    spec = spec_of(layout, make_pre_logits(DIM, layout))
    assert build("linear_probe", {}, spec).readout.mode == "mean"
    for pool in ("cls", "cls_mean"):
        with pytest.raises(
            UserError, match=rf"pool '{pool}' is not available.*num_class_tokens=0.*: mean, flatten, backbone$"
        ):
            build("linear_probe", {"pool": pool}, spec)


@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize(("classes", "registers"), [(1, 0), (1, 4), (2, 0), (2, 3)])
def test_cls_is_the_mean_of_the_class_tokens_of_all_sets(sets: int, classes: int, registers: int) -> None:
    per_set = classes + registers
    layout = TokenLayout(sets * per_set, (sets, 2, 2), sets, num_class_tokens=sets * classes)
    readout = build("linear_probe", {"pool": "cls"}, spec_of(layout, PreLogits(NormOnly(nn.Identity(), DIM))))
    tokens = torch.randn(3, layout.num_tokens, DIM).double()
    places = [number * per_set + k for number in range(sets) for k in range(classes)]
    expected = sum(tokens[:, place] for place in places) / len(places)
    torch.testing.assert_close(readout.readout.pool(tokens), expected)


def test_token_mixing_that_nothing_would_read_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"pool 'cls' reads the class token, which no token mixing reaches.*token_rank: 0"
    ):
        build("losa", {"pool": "cls", "token_rank": 2})


def test_without_patches_there_is_no_token_mixing() -> None:
    spec = make_spec(prefix=1, grid=())
    model = build("losa", {"rank": 4, "token_rank": 8}, spec)
    assert model.readout.mode == "cls"
    assert count_params(model)[0] == losa_count(4, 0)


def test_dropout_only_acts_in_training() -> None:
    spec = make_spec()
    model = build("losa", {"dropout": 0.5, "token_rank": 2}, spec)
    for mixer in model.mixers:
        nn.init.normal_(mixer.up.weight)
    tokens = draw_tokens(spec)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
