"""LoSA and the other methods that train from features, on tokens of videos."""

import itertools
from typing import Any

import pytest
import torch
from small_pre_logits import layout_of, make_pre_logits
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.from_features.losa import LoSA, LoSAOptions, LowRankMixer
from adapt.methods.registry import METHODS, build_model
from adapt.methods.trained_parameters import count_params, trainable
from store.errors import UserError
from store.layout import TokenLayout

CLASSES, DIM, LAYERS = 5, 16, (1, 3, 4)
T, H, W = GRID = (4, 2, 3)

VIVIT = layout_of(1, GRID)  # one class token for all frames
BY_FRAME = layout_of(2 * T, GRID, T)  # a class token and a register for every frame
PLAIN = layout_of(0, GRID)
VIDEOS = [VIVIT, BY_FRAME, PLAIN]
REDUCED = [
    layout_of(0, (1, 1, 1)),  # store.tokens: mean
    layout_of(T, (), T),  # cls
    layout_of(1, ()),  # cls of ViViT
    layout_of(2, (1, H, W)),  # averaged over time
    layout_of(2 * T, (T, 1, 1), T),  # and over space
]
OPTIONS: list[dict[str, Any]] = [
    {"rank": 4, "token_rank": 3, "time_rank": 2},
    {"rank": 4, "token_rank": 3, "time_rank": 0},
    {"rank": 4, "token_rank": 0, "time_rank": 2},
    {"rank": 4, "token_rank": 0, "time_rank": 0},
    {"rank": 4, "token_rank": 3, "factorised": False},
    {"rank": 2, "token_rank": 2, "time_rank": 5, "norm": "backbone", "add": "after_norm", "layers": [1, 4]},
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("attentive_probe", {}),
    ("transformer_probe", {}),
    ("ladder", {"reduction": 4}),
    ("linear_probe", {}),
]


def make_spec(layout: TokenLayout) -> FeatureSpec:
    return FeatureSpec(layers=LAYERS, depth=6, dim=DIM, layout=layout, pre_logits=make_pre_logits(DIM, layout))


def draw_tokens(spec: FeatureSpec, batch: int = 3) -> dict[int, Tensor]:
    return {layer: 3 * torch.randn(batch, spec.layout.num_tokens, spec.dim) for layer in spec.layers}


def build(method: str, options: dict[str, Any], spec: FeatureSpec) -> nn.Module:
    return build_model(method, spec, CLASSES, METHODS[method].options.model_validate(options))


def moved(model: nn.Module) -> nn.Module:
    """Set every trained tensor to random values, in double precision."""
    for tensor in trainable(model).values():
        nn.init.normal_(tensor, std=0.3)
    return model.double()


def double(tokens: dict[int, Tensor]) -> dict[int, Tensor]:
    return {layer: values.double() for layer, values in tokens.items()}


def bottleneck(width: int, rank: int) -> int:
    """Parameters of a map down and one up, with biases; none for an axis of one token or rank 0."""
    return 2 * width * rank + rank + width if rank and width > 1 else 0


@pytest.mark.parametrize("layout", VIDEOS)
@pytest.mark.parametrize(
    ("rank", "token_rank", "time_rank", "factorised", "token_params"),
    [
        (4, 3, 2, True, 2 * 6 * 3 + 3 + 6 + 2 * 4 * 2 + 2 + 4),
        (4, 3, 0, True, 2 * 6 * 3 + 3 + 6),
        (4, 0, 2, True, 2 * 4 * 2 + 2 + 4),
        (4, 0, 0, True, 0),
        (4, 3, 2, False, 2 * 24 * 3 + 3 + 24),
        (4, 0, 2, False, 0),
    ],
)
def test_as_many_parameters_as_the_formula(
    layout: TokenLayout, rank: int, token_rank: int, time_rank: int, factorised: bool, token_params: int
) -> None:
    options = LoSAOptions(rank=rank, token_rank=token_rank, time_rank=time_rank, factorised=factorised)
    model = LoSA(make_spec(layout), CLASSES, options)
    assert count_params(model)[0] == 3 * (2 * DIM * rank + rank + DIM + token_params)


@pytest.mark.parametrize("layout", REDUCED)
@pytest.mark.parametrize("factorised", [True, False])
def test_an_axis_of_one_token_has_no_mixing(layout: TokenLayout, factorised: bool) -> None:
    frames, positions = (layout.grid[0], layout.num_patches // layout.grid[0]) if layout.grid else (1, 0)
    tokens = bottleneck(positions, 3) + bottleneck(frames, 2) if factorised else bottleneck(layout.num_patches, 3)
    options = LoSAOptions(rank=4, token_rank=3, time_rank=2, factorised=factorised)
    model = LoSA(make_spec(layout), CLASSES, options)
    assert count_params(model)[0] == 3 * (bottleneck(DIM, 4) + tokens)


def literal_mixing(tokens: Tensor, down: nn.Linear | None, up: nn.Linear | None) -> Tensor:
    """The update of (tokens, dim), channel by channel."""
    if down is None or up is None:
        return torch.zeros_like(tokens)
    return torch.stack([up(F.gelu(down(channel))) for channel in tokens.T], dim=1)


def literal_update(mixer: LowRankMixer, x: Tensor, layout: TokenLayout, factorised: bool) -> Tensor:
    """The map g of one sample's (tokens, dim): frame by frame, then position by position."""
    p = layout.num_prefix_tokens
    c = mixer.up(F.gelu(mixer.down(x)))
    if not factorised:
        return torch.cat([c[:p], c[p:] + literal_mixing((x + c)[p:], mixer.token_down, mixer.token_up)])
    shape = (*layout.grid, DIM)
    patches, g = x[p:].view(shape), c[p:].reshape(shape)
    spatial, temporal = torch.zeros_like(g), torch.zeros_like(g)
    for t in range(T):
        added = literal_mixing((patches + g)[t].flatten(0, 1), mixer.token_down, mixer.token_up)
        spatial[t] = added.view(H, W, DIM)
    g = g + spatial
    for i, j in itertools.product(range(H), range(W)):
        temporal[:, i, j] = literal_mixing((patches + g)[:, i, j], mixer.time_down, mixer.time_up)
    return torch.cat([c[:p], (g + temporal).view(-1, DIM)])


@pytest.mark.parametrize("layout", VIDEOS)
@pytest.mark.parametrize("options", OPTIONS)
def test_losa_is_its_equations(layout: TokenLayout, options: dict[str, Any]) -> None:
    spec = make_spec(layout)
    model, tokens = moved(build("losa", options, spec)), double(draw_tokens(spec))
    normalize = model.readout.normalize
    y = torch.zeros_like(tokens[4])
    for layer, mixer in zip(model.layers, model.mixers, strict=True):
        b = normalize(tokens[layer]) if model.norm == "backbone" else F.layer_norm(tokens[layer], (DIM,))
        updates = [literal_update(mixer, x, layout, options.get("factorised", True)) for x in b + y]
        y = y + torch.stack(updates)
    last = normalize(tokens[4] + y) if model.add == "before_norm" else normalize(tokens[4]) + y
    torch.testing.assert_close(model(tokens), model.readout(last))


# token_rank, time_rank, factorised, and the (frame, position) of all tokens that are mixed with (1, 4)
REACH = [
    (3, 2, True, {(t, n) for t in range(T) for n in range(H * W)}),
    (3, 0, True, {(1, n) for n in range(H * W)}),
    (0, 2, True, {(t, 4) for t in range(T)}),
    (0, 0, True, {(1, 4)}),
    (3, 2, False, {(t, n) for t in range(T) for n in range(H * W)}),
    (0, 2, False, {(1, 4)}),
]


@pytest.mark.parametrize("layout", VIDEOS)
@pytest.mark.parametrize(("token_rank", "time_rank", "factorised", "reached"), REACH)
def test_space_and_time_are_mixed_where_they_have_a_rank(
    layout: TokenLayout, token_rank: int, time_rank: int, factorised: bool, reached: set[tuple[int, int]]
) -> None:
    """If the token of frame 1, position 4 changes, the update of just those tokens changes that are mixed with it."""
    options = LoSAOptions(rank=4, token_rank=token_rank, time_rank=time_rank, factorised=factorised)
    mixer = moved(LowRankMixer(DIM, layout, options))
    x, p = torch.randn(1, layout.num_tokens, DIM).double(), layout.num_prefix_tokens
    changed = x.clone()
    changed[:, p + 1 * H * W + 4] += 1
    moves = (mixer(x) != mixer(changed)).any(dim=2)[0]
    assert {divmod(int(n), H * W) for n in moves[p:].nonzero()} == reached
    assert not moves[:p].any()


@pytest.mark.parametrize("layout", [VIVIT, BY_FRAME])
def test_prefix_tokens_are_mixed_over_channels_only(layout: TokenLayout) -> None:
    mixer = moved(LowRankMixer(DIM, layout, LoSAOptions(rank=4, token_rank=3, time_rank=2)))
    x = torch.randn(1, layout.num_tokens, DIM).double()
    changed = x.clone()
    changed[:, 0] += 1
    assert (mixer(x) != mixer(changed)).any(dim=2)[0].nonzero().tolist() == [[0]]


def test_all_patches_at_once_are_those_of_a_long_image() -> None:
    options = {"rank": 4, "token_rank": 3, "factorised": False}
    video, image = make_spec(VIVIT), make_spec(layout_of(1, (T * H, W)))
    torch.manual_seed(3)
    tokens, model = draw_tokens(video), moved(build("losa", options, video)).float()
    other = build("losa", {"rank": 4, "token_rank": 3}, image)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", [(3, 4), (1, 3, 4)])
@pytest.mark.parametrize("options", [{"time_rank": 0}, {"time_rank": 3}, {"factorised": False}])
def test_images_and_single_frames_have_no_mixing_over_time(
    prefix: int, grid: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Names, logits and gradients are equal to the last bit."""
    image, spec = make_spec(layout_of(prefix, (3, 4))), make_spec(layout_of(prefix, grid))
    spec.pre_logits.load_state_dict(image.pre_logits.state_dict())
    tokens = draw_tokens(image)
    expected = outcome(LoSA(image, CLASSES, LoSAOptions(rank=4, dropout=0.2)), tokens)
    found = outcome(LoSA(spec, CLASSES, LoSAOptions(rank=4, dropout=0.2, **options)), tokens)
    assert list(found) == list(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def outcome(model: nn.Module, tokens: dict[int, Tensor]) -> dict[str, Tensor]:
    """Logits and gradients (by name) of a model that is initialized from one seed."""
    torch.manual_seed(4)
    logits = moved(model).float()(tokens)
    logits.square().sum().backward()
    return {"logits": logits} | {name: tensor.grad for name, tensor in trainable(model).items()}


BY_METHOD = [("losa", options) for options in OPTIONS] + OTHERS
ON_LAYOUTS = [
    (method, options, layout)
    for method, options in BY_METHOD
    for layout in VIDEOS + REDUCED
    if method != "attentive_probe" or layout.num_tokens > 1
]


@pytest.mark.parametrize(("method", "options", "layout"), ON_LAYOUTS)
class TestOnEveryLayout:
    def test_it_starts_as_the_linear_probe_of_the_same_seed(
        self, method: str, options: dict[str, Any], layout: TokenLayout
    ) -> None:
        spec = make_spec(layout)
        torch.manual_seed(3)
        model = build(method, options, spec)
        torch.manual_seed(3)
        probe, tokens = build("linear_probe", {}, spec), draw_tokens(spec)
        assert torch.equal(model(tokens), probe(tokens))

    def test_every_trained_tensor_moves_and_no_gradient_reaches_the_features(
        self, method: str, options: dict[str, Any], layout: TokenLayout
    ) -> None:
        spec = make_spec(layout)
        model, tokens = build(method, options, spec), draw_tokens(spec)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        for _ in range(2):  # down-projections receive gradient once the up-projections have left zero
            optimizer.zero_grad()
            model(tokens).square().sum().backward()
            optimizer.step()
        assert [name for name, tensor in trainable(model).items() if not tensor.grad.abs().sum() > 0] == []
        assert all(values.grad is None for values in tokens.values())
        assert all(parameter.grad is None for parameter in spec.pre_logits.parameters())


@pytest.mark.parametrize("layout", VIDEOS)
@pytest.mark.parametrize("options", OPTIONS)
def test_autocast_gives_nearly_the_same(layout: TokenLayout, options: dict[str, Any]) -> None:
    spec = make_spec(layout)
    model, tokens = moved(build("losa", options, spec)).float(), draw_tokens(spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(tokens)
    rough.float().square().sum().backward()
    exact = model(tokens)
    assert (rough - exact).norm() < 0.05 * exact.norm()
    assert all(tensor.grad.isfinite().all() for tensor in trainable(model).values())


def backwards(tokens: dict[int, Tensor], layout: TokenLayout) -> dict[int, Tensor]:
    """Reverse the order of the frames, with their prefix tokens."""
    p = layout.num_prefix_tokens
    parts = [(values[:, :p], values[:, p:]) for values in tokens.values()]
    reverse = [torch.cat([part.unflatten(1, (T, -1)).flip(1).flatten(1, 2) for part in both], dim=1) for both in parts]
    return dict(zip(tokens, reverse, strict=True))


@pytest.mark.parametrize(
    ("method", "options", "sees_it"),
    [
        ("losa", options, sees_it)
        for options, sees_it in zip(OPTIONS, [True, False, True, False, True, True], strict=True)
    ]
    + [(method, options, False) for method, options in OTHERS],
)
def test_only_temporal_mixing_sees_the_order_of_frames(method: str, options: dict[str, Any], sees_it: bool) -> None:
    """For features made frame by frame; a video backbone encodes time in its tokens."""
    spec = make_spec(BY_FRAME)
    model, tokens = moved(build(method, options, spec)), double(draw_tokens(spec))
    difference = (model(tokens) - model(backwards(tokens, BY_FRAME))).abs().max()
    assert difference > 1e-3 if sees_it else difference < 1e-9


@pytest.mark.parametrize(
    ("layout", "options", "remedy"),
    [
        (VIVIT, {}, "set token_rank: 0 and time_rank: 0, or pool: mean or cls_mean"),
        (BY_FRAME, {"token_rank": 0}, "set time_rank: 0, or pool: mean or cls_mean"),
        (BY_FRAME, {"time_rank": 0}, "set token_rank: 0, or pool: mean or cls_mean"),
        (BY_FRAME, {"factorised": False}, "set token_rank: 0, or pool: mean or cls_mean"),
        (layout_of(T, (T, 1, 1), T), {}, "set time_rank: 0, or pool: mean or cls_mean"),
    ],
)
def test_mixing_that_nothing_would_read_is_refused(layout: TokenLayout, options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=rf"pool 'cls' reads the class token, which no token mixing.*: {remedy}"):
        build("losa", {"pool": "cls", **options}, make_spec(layout))


@pytest.mark.parametrize("layout", [VIVIT, BY_FRAME])
def test_without_token_mixing_the_class_tokens_can_be_read(layout: TokenLayout) -> None:
    spec = make_spec(layout)
    model = build("losa", {"pool": "cls", "token_rank": 0, "time_rank": 0}, spec)
    assert model(draw_tokens(spec)).shape == (3, CLASSES)
