"""Lists the vision transformers of timm that can be backbones."""

from collections.abc import Iterator
from dataclasses import dataclass

import timm

from extract.backbones.plain_vit_check import empty_vit
from store.console.progress import progress
from store.errors import UserError, did_you_mean

_MODULE = "vision_transformer"  # of timm: the others have stages, convolutions or class attention


@dataclass(frozen=True, kw_only=True)
class ListedBackbone:
    """A model of timm without its weights.

    Args:
        name: of the model.
        weights: names of its pretrained weights in the model hub, such as `augreg_in21k_ft_in1k`.
        parameters: number of them, without the classifier.
        depth: number of blocks.
        dim: width of a token.
        image_size: height and width in pixels.
        num_tokens: tokens of a layer, prefix tokens included.
    """

    name: str
    weights: tuple[str, ...]
    parameters: int
    depth: int
    dim: int
    image_size: tuple[int, int]
    num_tokens: int


def list_backbones(pattern: str) -> list[ListedBackbone]:
    """Plain vision transformers of timm whose names match, built one by one without weights.

    Args:
        pattern: with the wildcards `*` and `?`; text without them is looked for anywhere in a name.

    Raises:
        UserError: no name matches.
    """
    wildcard = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = timm.list_models(wildcard, module=_MODULE)
    if not names:
        hint = did_you_mean(pattern, timm.list_models(module=_MODULE))
        raise UserError(f"no vision transformer of timm matches {pattern!r}; legal: a part of a name{hint}")
    with progress("building", len(names), "models") as advance:
        found = []
        for name in names:
            found += list(_describe(name))
            advance(1)
    return found


def _describe(name: str) -> Iterator[ListedBackbone]:
    """Its description; nothing if it is no plain vision transformer."""
    try:
        backbone = empty_vit(name, {})
    except UserError:
        return
    height, width = backbone.image_size[-2:]
    yield ListedBackbone(
        name=name,
        weights=tuple(known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")),
        parameters=sum(parameter.numel() for parameter in backbone.module.parameters()),
        depth=backbone.depth,
        dim=backbone.dim,
        image_size=(height, width),
        num_tokens=backbone.layout.num_tokens,
    )
