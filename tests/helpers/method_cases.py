"""Tables of cases over all methods at small sizes, with the formulas of their parameter counts."""

from typing import Any

import torch
from end_to_end import CLASSES
from small_pre_logits import layout_of, make_pre_logits
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import METHODS, build_model

DIM, LAYERS = 16, (1, 3, 4)


def make_spec(prefix: int = 1, grid: tuple[int, ...] = (3, 4)) -> FeatureSpec:
    """Three layers of a backbone of six, with a final norm that is not the identity."""
    layout = layout_of(prefix, grid)
    return FeatureSpec(layers=LAYERS, depth=6, dim=DIM, layout=layout, pre_logits=make_pre_logits(DIM, layout))


def draw_tokens(spec: FeatureSpec, batch: int = 4) -> dict[int, Tensor]:
    return {layer: 3 * torch.randn(batch, spec.layout.num_tokens, spec.dim) for layer in spec.layers}


def losa_count(rank: int, token_rank: int, layers: int = 3, patches: int = 12) -> int:
    """L(2dr + 2Ns) and the biases: r + d a channel mixer, s + N a token mixer."""
    channels = 2 * DIM * rank + rank + DIM
    tokens = 2 * patches * token_rank + token_rank + patches if token_rank else 0
    return layers * (channels + tokens)


def ladder_count(reduction: int, layers: int = 3) -> int:
    """Per layer a block of 12 s^2 + 13 s and a map d -> s; a gate for all layers but the first; a map s -> d."""
    side = DIM // reduction
    return layers * (12 * side**2 + 13 * side + DIM * side + side) + layers - 1 + side * DIM + DIM


def conv_ladder_count(width: int, queries: int, layers: int = 3, read: int = 2 * DIM, patches: int = 12) -> int:
    """Per layer a map d -> r and a 3 x 3 convolution; a norm, queries, places; a map 2Kr -> w."""
    of_layer = DIM * width + width + 9 * width**2 + width
    return layers * of_layer + 2 * width + queries * width + patches * width + 2 * queries * width * read


def last_count(rank: int, layers: int = 3) -> int:
    """Per layer maps d -> 3r and r -> d."""
    return layers * (4 * DIM * rank + 3 * rank + DIM)


# From features: method, options, parameters without the head, parameters of the head.
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("linear_probe", {"pool": "mean"}, 0, CLASSES * (DIM + 1)),
    ("linear_probe", {"pool": "cls_mean"}, 0, CLASSES * (2 * DIM + 1)),
    ("linear_probe", {"pool": "backbone"}, 0, CLASSES * (DIM + 1)),
    ("linear_probe", {"pool": "flatten", "layers": [3]}, 0, CLASSES * (13 * DIM + 1)),  # 12 patches and a class token
    ("linear_probe", {"layers": "all"}, 0, CLASSES * (3 * 2 * DIM + 1)),
    ("linear_probe", {"layers": [3, 4], "pool": "cls"}, 0, CLASSES * (2 * DIM + 1)),
    ("head2toe", {}, 0, CLASSES * (3 * 2 * DIM + 1)),
    ("head2toe", {"layers": [3, 4], "pool": "cls", "fraction": 0.1}, 0, CLASSES * (2 * DIM + 1)),
    ("knn", {}, 0, 0),
    ("knn", {"k": 3, "layers": "all", "pool": "mean"}, 0, 0),
    ("attentive_probe", {}, DIM + 4 * DIM**2, CLASSES * (2 * DIM + 1)),
    ("attentive_probe", {"num_heads": 2, "pool": "mean"}, DIM + 3 * DIM**2, CLASSES * (DIM + 1)),
    ("attentive_probe", {"layer": 3}, DIM + 4 * DIM**2, CLASSES * (2 * DIM + 1)),
    ("efficient_probe", {"num_queries": 4}, DIM**2 + 4 * DIM, CLASSES * (2 * DIM + 1)),
    ("efficient_probe", {"num_queries": 8, "pool": "cls"}, DIM**2 + 8 * DIM, CLASSES * (DIM + 1)),
    ("layer_fusion", {}, DIM + 4 * DIM**2, CLASSES * (2 * DIM + 1)),
    ("layer_fusion", {"layers": [1, 4], "num_heads": 2, "pool": "mean"}, DIM + 3 * DIM**2, CLASSES * (DIM + 1)),
    ("transformer_probe", {}, 12 * DIM**2 + 13 * DIM, CLASSES * (2 * DIM + 1)),
    ("transformer_probe", {"num_heads": 4, "pool": "cls"}, 12 * DIM**2 + 13 * DIM, CLASSES * (DIM + 1)),
    ("ladder", {"reduction": 4}, ladder_count(4), CLASSES * (2 * DIM + 1)),
    ("ladder", {"reduction": 2, "num_heads": 2, "layers": [3, 4]}, ladder_count(2, layers=2), CLASSES * (2 * DIM + 1)),
    ("conv_ladder", {"width": 4, "layers": "all"}, conv_ladder_count(4, 16), CLASSES * (2 * DIM + 1)),
    (
        "conv_ladder",
        {"width": 6, "num_queries": 3, "layers": [1, 4], "pool": "cls"},
        conv_ladder_count(6, 3, layers=2, read=DIM),
        CLASSES * (DIM + 1),
    ),
    ("last", {"rank": 4}, last_count(4), CLASSES * (2 * DIM + 1)),
    (
        "last",
        {"rank": 6, "num_heads": 3, "layers": [1, 4], "pool": "cls"},
        last_count(6, layers=2),
        CLASSES * (DIM + 1),
    ),
    ("losa", {"rank": 4, "token_rank": 2}, losa_count(4, 2), CLASSES * (2 * DIM + 1)),
    ("losa", {"rank": 4, "token_rank": 0}, losa_count(4, 0), CLASSES * (2 * DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 0, "norm": "backbone", "pool": "cls"}, losa_count(2, 0), CLASSES * (DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 3, "pool": "cls_mean"}, losa_count(2, 3), CLASSES * (2 * DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 3, "pool": "flatten"}, losa_count(2, 3), CLASSES * (13 * DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 3, "start": "last"}, losa_count(2, 3), CLASSES * (2 * DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 0, "start": "last"}, losa_count(2, 0), CLASSES * (2 * DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 3, "norm": "none"}, losa_count(2, 3), CLASSES * (2 * DIM + 1)),
    ("losa", {"rank": 2, "token_rank": 3, "layers": [1, 4]}, losa_count(2, 3, layers=2), CLASSES * (2 * DIM + 1)),
]


WITH_PARAMETERS = [case for case in CASES if case[0] != "knn"]
TINY_DIM, TINY_DEPTH, TINY_HEADS, TINY_GRID = 32, 3, 2, (4, 4)  # of the fixture tiny_backbone


def adapter_count(bottleneck: int, adapters: int) -> int:
    """Parameters of maps down and up, with their biases."""
    return adapters * (2 * TINY_DIM * bottleneck + bottleneck + TINY_DIM)


BLOCK = 12 * TINY_DIM**2 + 13 * TINY_DIM


EMBEDDINGS = 3 * 8 * 8 * TINY_DIM + TINY_DIM + TINY_DIM + 17 * TINY_DIM  # patches, class token, positions


# Inside the backbone: method, options, parameters without the head.
TUNED_CASES: list[tuple[str, dict[str, Any], int]] = [
    ("full", {}, TINY_DEPTH * BLOCK + EMBEDDINGS + 2 * TINY_DIM),
    ("bitfit", {}, TINY_DEPTH * 11 * TINY_DIM + 2 * TINY_DIM),  # 3 + 1 + 4 + 1 and two norms; patches and final norm
    ("layernorm", {}, 2 * TINY_DIM * (2 * TINY_DEPTH + 1)),
    ("attention", {}, TINY_DEPTH * (4 * TINY_DIM**2 + 4 * TINY_DIM)),
    ("lora", {"rank": 2}, 4 * TINY_DEPTH * TINY_DIM * 2),
    ("lora", {"rank": 2, "targets": ["q", "k", "v", "proj"]}, 8 * TINY_DEPTH * TINY_DIM * 2),
    ("lora", {"rank": 1, "targets": ["fc1", "fc2"]}, 2 * TINY_DEPTH * 5 * TINY_DIM),
    ("lora_fix", {"rank": 2}, 2 * TINY_DEPTH * TINY_DIM * 2),
    ("kronecker", {"n": 4, "rank": 1}, 4 * TINY_DEPTH * TINY_DIM + 2 * 4**3),
    ("kronecker", {"n": 4, "slow_rank": 1, "bias": True}, 5 * TINY_DEPTH * TINY_DIM + 2 * 2 * 4**2),
    ("kronecker", {"n": 4, "targets": ["fc1", "fc2"]}, 2 * TINY_DEPTH * 5 * TINY_DIM + 2 * 4**3),
    ("adapter", {"bottleneck": 4}, adapter_count(4, 2 * TINY_DEPTH)),
    ("adapter", {"bottleneck": 4, "places": ["attention"]}, adapter_count(4, TINY_DEPTH)),
    ("adapter_drop", {"bottleneck": 4}, adapter_count(4, 2)),
    ("compacter", {"bottleneck": 8, "n": 4}, 4 * TINY_DEPTH * (TINY_DIM + 8) + 4**3 + 2 * TINY_DEPTH * (TINY_DIM + 8)),
    ("lepe", {}, 10 * TINY_DEPTH * TINY_DIM),
    ("rpb", {}, TINY_DEPTH * TINY_HEADS * 7 * 7),
    ("prompt", {"num_prompts": 3}, 3 * TINY_DEPTH * TINY_DIM),
    ("prompt", {"num_prompts": 3, "deep": False}, 3 * TINY_DIM),
    ("intrinsic", {"dim": 10}, 10),
    ("intrinsic", {"dim": 50, "module": "mlp", "block": 1}, 50),
]


def build(method: str, options: dict[str, Any], spec: FeatureSpec | None = None) -> nn.Module:
    return build_model(method, spec or make_spec(), CLASSES, METHODS[method].options.model_validate(options))
