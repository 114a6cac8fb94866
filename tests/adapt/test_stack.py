"""A stack of models gives the logits and gradients that each of them gives alone, for all options and layouts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import DIM, LAYERS, build, draw_tokens, make_spec
from small_pre_logits import layout_of, make_pre_logits
from torch import Tensor, nn

from adapt.methods.dropout import ByteDropout, draw_bytes, shared_draws
from adapt.methods.feature_spec import FeatureSpec, TokenBatch
from adapt.methods.from_features.losa_stack import stack_losas
from adapt.methods.registry import METHODS
from adapt.methods.stack import stack_key
from adapt.methods.trained_parameters import trainable
from store.layout import TokenLayout

VIDEO = TokenLayout(2, (2, 2, 3), 2, num_class_tokens=2)


def moved(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Give every model other trained tensors and another standardization, in double precision."""
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        for tensor in trainable(model).values():
            nn.init.normal_(tensor, std=0.3, generator=generator)
        width = len(model.readout.mean)
        model.readout.standardize(torch.randn(20, width, generator=generator) + 1, torch.zeros(width))
    return [model.double() for model in models]


def gradients(models: Sequence[nn.Module]) -> list[Tensor]:
    found = [tensor.grad for model in models for tensor in trainable(model).values()]
    for model in models:
        model.zero_grad(set_to_none=True)
    return found


def alone(models: Sequence[nn.Module], seeds: Sequence[int], tokens: dict[int, Tensor]) -> Tensor:
    logits = []
    for model, seed in zip(models, seeds, strict=True):
        torch.manual_seed(seed)
        logits.append(model(tokens))
    return torch.stack(logits)


def check(method: str, models: list[nn.Module], seeds: Sequence[int], tokens: dict[int, Tensor]) -> None:
    tokens = {layer: values.double() for layer, values in tokens.items()}
    by_seed = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    stack = METHODS[method].stack(moved(models))
    together, expected = stack(tokens, [by_seed[seed] for seed in seeds]), alone(models, seeds, tokens)
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)
    together.sin().sum().backward()
    found = gradients(models)
    expected.sin().sum().backward()
    for ours, theirs in zip(found, gradients(models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


LOSA_OPTIONS = st.fixed_dictionaries(
    {
        "rank": st.sampled_from([1, 3, 9]),  # 9 is above the rank up to which the updates stay a product
        "token_rank": st.sampled_from([0, 2]),
        "norm": st.sampled_from(["layer", "backbone", "none"]),
        "start": st.sampled_from(["zero", "last"]),
        "add": st.sampled_from(["before_norm", "after_norm"]),
        "pool": st.sampled_from(["auto", "mean", "cls", "backbone"]),
        "layers": st.sampled_from(["all", [4], [1, 4]]),
    }
)
LAYOUTS = st.sampled_from([layout_of(1, (3, 4)), layout_of(0, (3, 4)), layout_of(5, (2, 3)), layout_of(1, ()), VIDEO])
RATES = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.6]), st.integers(0, 2)), min_size=1, max_size=4)


@given(LOSA_OPTIONS, LAYOUTS, st.sampled_from(["avg", "token"]), st.booleans(), RATES)
@settings(max_examples=120, deadline=None)
def test_losas_are_what_each_is_alone(
    options: dict[str, Any], layout: TokenLayout, own: str, fc_norm: bool, rates: list[tuple[float, int]]
) -> None:
    if options["pool"] in ("auto", "cls") and not layout.num_prefix_tokens:
        options |= {"pool": "mean"}
    if not layout.num_patches:
        options |= {"pool": "cls"}
    if options["pool"] == "cls" or (options["pool"] == "backbone" and own == "token"):
        options |= {"token_rank": 0, "time_rank": 0}
    if not layout.num_prefix_tokens:
        own = "avg"
    pre_logits = make_pre_logits(DIM, layout, global_pool=own, fc_norm=fc_norm)
    spec = FeatureSpec(layers=LAYERS, depth=6, dim=DIM, layout=layout, pre_logits=pre_logits)
    models = [build("losa", {**options, "dropout": rate}, spec) for rate, _ in rates]
    assert len({stack_key(model) for model in models}) == 1
    check("losa", models, [seed for _, seed in rates], draw_tokens(spec, batch=3))


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_losas_that_do_not_fit_into_the_cache_together_are_computed_in_groups(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    n_bytes = 8 * len(LAYERS) * 2 * 4 * spec.layout.num_tokens  # float64, rank 2, 4 samples
    monkeypatch.setattr("adapt.methods.from_features.losa_functions._BYTES_IN_CACHE", at_once * n_bytes)
    models = [build("losa", {"rank": 2, "token_rank": 0, "dropout": 0.3}, spec) for _ in range(5)]
    check("losa", models, [0, 1, 0, 2, 1], draw_tokens(spec))


@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "pool": "mean"}, {"num_heads": 1, "pool": "backbone"}])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prefix", [1, 5])
def test_attentive_probes_are_what_each_is_alone(options: dict[str, Any], count: int, prefix: int) -> None:
    spec = make_spec(prefix)
    models = [build("attentive_probe", options, spec) for _ in range(count)]
    check("attentive_probe", models, range(count), draw_tokens(spec))


STACKED = [
    ("attentive_probe", {}),
    ("losa", {"rank": 2, "token_rank": 0}),
    ("losa", {"rank": 2, "token_rank": 2}),
    ("losa", {"rank": 9, "token_rank": 0}),
]


@pytest.mark.parametrize(("method", "options"), STACKED)
def test_in_half_precision_they_differ_by_its_rounding(method: str, options: dict[str, Any]) -> None:
    spec = make_spec()
    models = [model.float() for model in moved([build(method, options, spec) for _ in range(2)])]
    tokens, generators = draw_tokens(spec), [torch.Generator()] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together, each = (
            METHODS[method].stack(models)(tokens, generators).float(),
            alone(models, [0, 0], tokens).float(),
        )
    exact = alone(models, [0, 0], tokens)
    assert (together - exact).norm() < max(2 * (each - exact).norm(), 0.01 * exact.norm())
    together.sin().sum().backward()
    found = torch.cat([tensor.flatten() for tensor in gradients(models)])
    each.sin().sum().backward()
    rough = torch.cat([tensor.flatten() for tensor in gradients(models)])
    exact.sin().sum().backward()
    best = torch.cat([tensor.flatten() for tensor in gradients(models)])
    assert (found - best).norm() < max(2 * (rough - best).norm(), 0.01 * best.norm())


@pytest.mark.parametrize(("method", "options"), STACKED)
def test_evaluation_draws_no_random_numbers(method: str, options: dict[str, Any]) -> None:
    spec = make_spec()
    dropout = {"dropout": 0.5} if method == "losa" else {}
    models = [model.eval() for model in moved([build(method, {**options, **dropout}, spec) for _ in range(2)])]
    tokens, generator = {layer: x.double() for layer, x in draw_tokens(spec).items()}, torch.Generator()
    before = generator.get_state()
    together = METHODS[method].stack(models)(tokens, [generator, generator])
    torch.testing.assert_close(together, alone(models, [0, 0], tokens))
    assert torch.equal(generator.get_state(), before)


def test_a_key_tells_models_apart_that_cannot_be_stacked_and_no_others() -> None:
    base = {"rank": 2, "token_rank": 0}
    key = stack_key(build("losa", base))
    for same in ({"dropout": 0.5}, {"layers": [1, 3, 4]}, {"pool": "cls_mean"}):
        assert stack_key(build("losa", {**base, **same})) == key
    for other in ({"rank": 3}, {"token_rank": 1}, {"layers": [1, 4]}, {"pool": "mean"}, {"add": "after_norm"}):
        assert stack_key(build("losa", {**base, **other})) != key
    assert stack_key(build("attentive_probe", {})) != key


def test_models_with_one_generator_share_its_bytes_and_others_do_not() -> None:
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    draws = shared_draws([first, second, first])
    sizes = (13, 7, 13)
    drawn = [[draw(size, torch.device("cpu")) for size in sizes] for draw in draws]
    assert all(one is other for one, other in zip(drawn[0], drawn[2], strict=True))
    for seed, of_model in ((1, drawn[0]), (2, drawn[1])):
        torch.manual_seed(seed)
        assert all(torch.equal(x, draw_bytes(len(x), x.device)) for x in of_model)


def test_dropout_of_several_rates_drops_nested_values_of_the_same_bytes() -> None:
    low, high = (ByteDropout(rate) for rate in (0.2, 0.7))
    kept = [
        layer(torch.ones(5000), draw) > 0
        for layer, draw in zip((low, high), shared_draws([torch.default_generator] * 2), strict=True)
    ]
    assert (kept[0] | ~kept[1]).all()
    assert kept[0].float().mean() > kept[1].float().mean()


def test_a_batch_computes_once_what_models_share() -> None:
    spec = make_spec()
    tokens, models = TokenBatch(draw_tokens(spec)), [build("attentive_probe", {}, spec) for _ in range(2)]
    calls = []
    spec.pre_logits.register_forward_hook(lambda *_: None)
    norm = spec.pre_logits.model.norm
    norm.register_forward_hook(lambda *_: calls.append(1))
    for model in models:
        model(tokens)
    build("linear_probe", {}, spec)(tokens)
    assert len(calls) == 1
    assert tokens.layer_norm(1) is tokens.layer_norm(1)
    models[0](dict(tokens))
    assert len(calls) == 2


def test_without_patches_to_read_losa_reads_none() -> None:
    spec = make_spec(prefix=2)
    model = build("losa", {"pool": "cls", "token_rank": 0}, spec)
    assert model.read(draw_tokens(spec))[4].shape[1] == 2


def test_low_rank_and_direct_sums_agree() -> None:
    """At ranks on both sides of where the form changes, padding with hidden units that do nothing changes nothing."""
    spec = make_spec()
    small, large = (build("losa", {"rank": rank, "token_rank": 0}, spec) for rank in (3, 9))
    (small,) = moved([small])
    large = large.double()
    with torch.no_grad():
        large.readout.load_state_dict(small.readout.state_dict())
        for one, other in zip(small.mixers, large.mixers, strict=True):
            other.down.weight[:3], other.down.bias[:3] = one.down.weight, one.down.bias
            other.up.weight[:, :3], other.up.bias[:] = one.up.weight, one.up.bias
            other.up.weight[:, 3:] = 0
    tokens = {layer: values.double() for layer, values in draw_tokens(spec).items()}
    torch.testing.assert_close(*(stack_losas([model])(tokens, [torch.Generator()]) for model in (small, large)))
