"""Which of timm's models are plain vision transformers, found out with one image on the meta device.

There a forward pass takes neither weights nor memory. A plain one runs its blocks once each and in order, all give
tokens of one shape, prefix tokens first and then the patch grid, and only the final norm follows them. Tokens of
anything else cannot be read out as its own classifier does.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from extract.backbones.timm_vit import TimmBackbone, not_plain
from extract.backbones.weights import build_empty, first_line
from store.errors import UserError


@dataclass
class _Trace:
    """What ran in one forward pass: blocks by index with the shape of what they gave, and what came after them."""

    blocks: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...] | None] = field(default_factory=list)  # None: no tensor
    after: list[str] = field(default_factory=list)


def empty_vit(name: str, model_kwargs: dict[str, Any]) -> TimmBackbone:
    """A plain vision transformer of timm without its weights, on the meta device.

    Raises:
        UserError: timm has no such model, or cannot build it with these arguments; it is no plain vision transformer.
    """
    model = build_empty(name, model_kwargs).eval()
    try:
        backbone = TimmBackbone(name, model_kwargs, model, None)
        obstacle = _obstacle(backbone)
    except UserError:
        raise
    except Exception as error:  # the code of a thousand models may raise anything
        failed = f"one image through it ends in {type(error).__name__}: {first_line(error)}"
        raise not_plain(name, model_kwargs, failed) from error
    if obstacle:
        raise not_plain(name, model_kwargs, obstacle)
    return backbone


@torch.no_grad()
def _obstacle(backbone: TimmBackbone) -> str:
    """What keeps a model from being plain; empty where nothing does."""
    model: Any = backbone.module
    image = torch.zeros(1, *backbone.image_size, device="meta")
    trace, features = _run(model, image)
    expected = (1, backbone.layout.num_tokens, backbone.dim)
    if obstacle := _obstacle_in_blocks(trace, backbone) or _obstacle_behind(trace, features, expected):
        return obstacle
    if not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity):
        return "in training it drops patches; leave patch_drop_rate out"
    found = tuple(backbone.tokens(image, [0])[0].shape)
    return "" if found == expected else f"timm gives tokens of the shape {found} of it, not {expected}"


def _obstacle_in_blocks(trace: _Trace, backbone: TimmBackbone) -> str:
    shapes, layout = list(dict.fromkeys(trace.shapes)), backbone.layout
    expected = (1, layout.num_tokens, backbone.dim)
    if trace.blocks != list(range(backbone.depth)):
        return "its blocks do not run once each and in order"
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return f"its blocks give {shapes[0] or 'more than one tensor'}, not (batch, tokens, dim)"
    if len(shapes) > 1:
        return f"its blocks give tokens of different shapes: {', '.join(map(str, shapes))}"
    if shapes[0] != expected:
        made = f"{layout.num_prefix_tokens} prefix tokens and a grid of {' x '.join(map(str, layout.grid))}"
        return f"its blocks give (batch, tokens, dim) = {shapes[0]}, but {made} make {expected}"
    return ""


def _obstacle_behind(trace: _Trace, features: object, expected: tuple[int, ...]) -> str:
    if others := sorted(set(trace.after) - {"norm"}):
        return f"its blocks are followed by more than a norm: {', '.join(others)}"
    if not isinstance(features, Tensor) or features.flatten(1, -2).shape != expected:
        return "what follows its blocks changes the shape of its tokens"
    return ""


def _run(model: Any, image: Tensor) -> tuple[_Trace, object]:
    """One forward pass, and what it gives before the classifier."""
    trace = _Trace()

    def note_block(index: int, output: object) -> None:
        trace.blocks.append(index)
        trace.shapes.append(tuple(output.shape) if isinstance(output, Tensor) else None)

    def note_part(name: str) -> None:
        if len(trace.blocks) >= len(model.blocks):
            trace.after.append(name)

    hooks = [
        block.register_forward_hook(lambda _, args, output, index=index: note_block(index, output))
        for index, block in enumerate(model.blocks)
    ] + [
        part.register_forward_pre_hook(lambda *_, name=name: note_part(name))
        for name, part in model.named_children()
        if not isinstance(part, nn.Identity)
    ]
    try:
        return trace, model.forward_features(image)
    finally:
        for hook in hooks:
            hook.remove()
