"""Methods from features give what the equations at the top of their files say, computed one token at a time."""

from typing import Any

import pytest
import torch
from end_to_end import CLASSES
from method_cases import DIM, LAYERS, build, draw_tokens, make_spec
from small_pre_logits import layout_of, make_pre_logits
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.features.specs import spec_of_backbone
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import METHODS, build_model
from adapt.methods.trained_parameters import count_params, trainable
from extract.backbones.backbone import empty_backbone
from store.errors import UserError

LAYOUTS = [(0, (3, 4)), (1, (3, 4)), (3, (2, 2))]
VIDEO = (2, 3, 4)  # frames, rows, columns


def moved(method: str, options: dict[str, Any], spec: FeatureSpec) -> tuple[Any, dict[int, Tensor]]:
    """A model without a zero in it, in double precision, and tokens."""
    model: Any = build(method, options, spec).eval()
    for tensor in trainable(model).values():
        nn.init.normal_(tensor, std=0.3)
    return model.double(), {layer: tokens.double() for layer, tokens in draw_tokens(spec).items()}


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def pooled(model: Any, tokens: Tensor) -> Tensor:
    values: Tensor = model.readout.pool(model.readout.normalize(tokens))
    return values


@pytest.mark.parametrize(("prefix", "grid"), LAYOUTS)
def test_the_efficient_probe(prefix: int, grid: tuple[int, ...]) -> None:
    model, tokens = moved("efficient_probe", {"num_queries": 4}, make_spec(prefix, grid))
    x, found = model.readout.normalize(tokens[4]), []
    for query, value in zip(model.query, model.value, strict=True):  # value: (dim / queries, dim)
        share = (x @ query / DIM**0.5).softmax(dim=1)
        found.append(torch.stack([value @ (a @ sample) for a, sample in zip(share, x, strict=True)]))
    attended = torch.cat(found, dim=1)
    z = pooled(model, tokens[4])
    z[:, -DIM:] += attended  # of class token and patch mean, the second
    torch.testing.assert_close(model(tokens), model.readout.classify(z))


@pytest.mark.parametrize(("prefix", "grid"), LAYOUTS)
def test_layer_fusion(prefix: int, grid: tuple[int, ...]) -> None:
    heads = 2
    model, tokens = moved("layer_fusion", {"num_heads": heads}, make_spec(prefix, grid))
    u = torch.cat([pooled(model, tokens[layer]).unflatten(1, (-1, DIM)) for layer in LAYERS], dim=1)
    pooler, found = model.pooler, []
    for h in range(heads):
        scores = (u @ pooler.key[h].T) @ pooler.query[h] / (DIM / heads) ** 0.5  # (batch, vectors)
        found.append(torch.einsum("bn,bnd,cd->bc", scores.softmax(dim=1), u, pooler.value[h]))
    z = pooled(model, tokens[4]) + pooler.out(torch.cat(found, dim=1))
    torch.testing.assert_close(model(tokens), model.readout.classify(z))


@pytest.mark.parametrize(("prefix", "grid"), LAYOUTS)
@pytest.mark.parametrize("layers", ["all", [1, 4]])
def test_last(prefix: int, grid: tuple[int, ...], layers: Any) -> None:
    rank, heads = 6, 3
    model, tokens = moved("last", {"rank": rank, "num_heads": heads, "layers": layers}, make_spec(prefix, grid))
    y, summed = torch.zeros_like(tokens[4]), torch.zeros_like(tokens[4])
    for layer, attention in zip(model.layers, model.attentions, strict=True):
        summed = summed + tokens[layer]
        q, k, v = attention.down(norm(summed + y)).chunk(3, dim=2)
        outputs = []
        for part in torch.arange(rank).chunk(heads):
            scores = q[:, :, part] @ k[:, :, part].transpose(1, 2) / (rank / heads) ** 0.5
            outputs.append(scores.softmax(dim=2) @ v[:, :, part])
        y = y + attention.up(torch.cat(outputs, dim=2))
    z = pooled(model, tokens[4]) + model.readout.pool(y)
    torch.testing.assert_close(model(tokens), model.readout.classify(z))


def spec_of_grid(prefix: int, grid: tuple[int, ...]) -> FeatureSpec:
    layout = layout_of(prefix, grid)
    return FeatureSpec(layers=LAYERS, depth=6, dim=DIM, layout=layout, pre_logits=make_pre_logits(DIM, layout))


def convolved(convolution: nn.Conv2d, m: Tensor) -> Tensor:
    """A 3 x 3 convolution of GELU(m), of one image (rows, columns, width), patch by patch."""
    rows, columns, _ = m.shape
    padded = F.pad(F.gelu(m), (0, 0, 1, 1, 1, 1))
    result = torch.empty_like(m)
    for row in range(rows):
        for column in range(columns):
            window = padded[row : row + 3, column : column + 3]  # (3, 3, width)
            result[row, column] = torch.einsum("ocij,ijc->o", convolution.weight, window) + convolution.bias
    return result


@pytest.mark.parametrize(("prefix", "grid"), [*LAYOUTS, (0, VIDEO), (1, VIDEO)])
@pytest.mark.parametrize("layers", ["all", {"every": 3}])
@torch.no_grad()
def test_the_convolutional_ladder(prefix: int, grid: tuple[int, ...], layers: Any) -> None:
    options = {"width": 5, "num_queries": 3, "layers": layers}
    model, tokens = moved("conv_ladder", options, spec_of_grid(prefix, grid))
    assert model.layers == (LAYERS if layers == "all" else (4,))
    h: Any = 0
    for layer, down, convolution in zip(model.layers, model.downs, model.convolutions, strict=True):
        m = h + down(norm(tokens[layer][:, prefix:]))
        images = m.view(-1, *grid[-2:], 5)
        h = m + torch.stack([convolved(convolution, image) for image in images]).view(m.shape)
    x = model.norm(h)
    found = []
    for query in model.queries.weight:
        share = (x @ query).softmax(dim=1)
        found += [torch.einsum("bn,bnr->br", share, x), share @ model.places]
    z = pooled(model, tokens[4]) + model.out(torch.cat(found, dim=1))
    torch.testing.assert_close(model(tokens), model.readout.classify(z))


def test_the_convolutional_ladder_knows_where_a_patch_is() -> None:
    """Patches in another order give other logits; a mean over them, as other read-outs take it, does not change."""
    spec = spec_of_grid(1, (3, 4))
    model, tokens = moved("conv_ladder", {"width": 4, "layers": "all"}, spec)
    for convolution in model.convolutions:  # its places alone
        nn.init.zeros_(convolution.weight)
    turned = {layer: torch.cat([x[:, :1], x[:, 1:].flip(1)], dim=1) for layer, x in tokens.items()}
    assert not torch.allclose(model(tokens), model(turned))
    nn.init.zeros_(model.places)
    torch.testing.assert_close(model(tokens), model(turned))


@pytest.mark.parametrize("grid", [(), (1, 1)])
def test_a_place_needs_patches(grid: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"conv_ladder reads a grid of patches.*set store.tokens to all or \{pool: k\}"):
        build("conv_ladder", {"width": 4}, spec_of_grid(1, grid))


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("efficient_probe", {"num_queries": 32}, 614_400),  # of the paper, at width 768
        ("last", {"rank": 16, "layers": "all"}, 12 * (4 * 768 * 16 + 3 * 16 + 768)),
        ("losa", {"rank": 16, "token_rank": 0, "layers": "all"}, 12 * (2 * 768 * 16 + 16 + 768)),
    ],
)
def test_parameters_at_the_size_of_vit_b(method: str, options: dict[str, Any], count: int) -> None:
    backbone = empty_backbone("vit_base_patch16_224", {})
    with torch.device("meta"):
        spec = spec_of_backbone(backbone, range(backbone.depth))
        model = build_model(method, spec, CLASSES, METHODS[method].options.model_validate(options), backbone=backbone)
    assert count_params(model)[0] == count
