"""Checks that a timm model is a plain vision transformer, by one forward pass on the meta device.

Such a pass needs neither weights nor memory. A plain vision transformer runs each block once and in order; all blocks
give tokens of one shape, prefix tokens first, then the patch grid; only the final norm follows. For any other model
the tokens of a block could not be pooled as its own classifier does.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from extract.backbones.timm_models import build_empty, first_line
from extract.backbones.timm_vit import TimmBackbone, not_plain
from store.errors import UserError


@dataclass
class _Trace:
    """Records one forward pass.

    Attributes:
        blocks: indices of the blocks that ran, in order.
        shapes: of their outputs; None for an output that is no tensor.
        after: names of the modules that ran after the blocks.
    """

    blocks: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...] | None] = field(default_factory=list)
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
    """Why a model is no plain vision transformer; empty if it is one."""
    model: Any = backbone.module
    image = torch.zeros(1, *backbone.image_size, device="meta")
    trace, features = _run(model, image)
    expected = (1, backbone.layout.num_tokens, backbone.dim)
    if obstacle := _obstacle_in_blocks(trace, backbone) or _obstacle_after_blocks(trace, features, expected):
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


def _obstacle_after_blocks(trace: _Trace, features: object, expected: tuple[int, ...]) -> str:
    if others := sorted(set(trace.after) - {"norm"}):
        return f"its blocks are followed by more than a norm: {', '.join(others)}"
    if not isinstance(features, Tensor) or features.flatten(1, -2).shape != expected:
        return "what follows its blocks changes the shape of its tokens"
    return ""


def _run(model: Any, image: Tensor) -> tuple[_Trace, object]:
    """Trace one forward pass; returns the trace and the features before the classifier."""
    trace = _Trace()

    def on_block(index: int, output: object) -> None:
        trace.blocks.append(index)
        trace.shapes.append(tuple(output.shape) if isinstance(output, Tensor) else None)

    def on_child(name: str) -> None:
        if len(trace.blocks) >= len(model.blocks):
            trace.after.append(name)

    hooks = [
        block.register_forward_hook(lambda _, args, output, index=index: on_block(index, output))
        for index, block in enumerate(model.blocks)
    ]
    hooks += [
        child.register_forward_pre_hook(lambda *_, name=name: on_child(name))
        for name, child in model.named_children()
        if not isinstance(child, nn.Identity)
    ]
    try:
        return trace, model.forward_features(image)
    finally:
        for hook in hooks:
            hook.remove()
