"""Visual prompt tuning: learned tokens beside those of the image (VPT, Jia et al., arXiv 2203.12119).

    deep:     x_i = block_i([prefix, P_i, patches])        P_i is removed behind block i
    shallow:  x   = block_L(... block_1([prefix, P, patches]))

with P (m, d), m = num_prompts: Lmd parameters in L blocks, or md. As in the paper, prompts come after the prefix
tokens, have no position, and start uniform in +-sqrt(6 / (3 patch_h patch_w + d)), with the frames of a patch of ViViT
as one more factor. They draw attention from the first step on: this is the only method that does not start as the
frozen model.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.methods.in_backbone.target_modules import TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import PositiveInt
from store.errors import UserError


class PromptOptions(TunedOptions):
    """Options of `prompt`.

    Args:
        num_prompts: m.
        deep: new prompts for every block; false: one set for all, m d parameters.
    """

    num_prompts: PositiveInt = 10
    deep: bool = True


class Prompts(nn.Module):
    """Prompt tokens, from the input of one block to the output of the same or a later one.

    `insert` and `drop` are hooks; as bound methods of a module in the backbone they are copied with it by `deepcopy`.

    Args:
        num_prompts: how many tokens.
        dim: their width.
        num_prefix_tokens: how many tokens of the backbone come before them.
        bound: they start uniform between -bound and bound.
    """

    def __init__(self, num_prompts: int, dim: int, num_prefix_tokens: int, bound: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_prompts, dim).uniform_(-bound, bound))
        self.start, self.stop = num_prefix_tokens, num_prefix_tokens + num_prompts

    def insert(self, block: nn.Module, args: tuple[Float[Tensor, "batch tokens dim"], ...]) -> tuple[Any, ...]:
        """Insert the prompts behind the prefix tokens of the block's input."""
        x, *others = args
        prompts = self.tokens.to(x.dtype).expand(len(x), -1, -1)  # `cat` would widen all tokens to float32
        return torch.cat([x[:, : self.start], prompts, x[:, self.start :]], dim=1), *others

    def drop(
        self, block: nn.Module, args: Any, output: Float[Tensor, "batch more dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Remove them from the block's output."""
        return torch.cat([output[:, : self.start], output[:, self.stop :]], dim=1)


def inject_prompts(vit: TargetViT, options: PromptOptions) -> None:
    """Insert prompts before the blocks.

    Raises:
        UserError: the attention depends on a fixed number of tokens.
    """
    _refuse_relative_positions(vit.module)
    bound = math.sqrt(6 / (3 * math.prod(vit.patch_size) + vit.dim))
    blocks = vit.blocks
    _shift_rotary(blocks, options.num_prompts)
    for first, last in zip(blocks, blocks, strict=True) if options.deep else [(blocks[0], blocks[-1])]:
        prompts = Prompts(options.num_prompts, vit.dim, vit.layout.num_prefix_tokens, bound)
        first.add_module("prompts", prompts)
        first.register_forward_pre_hook(prompts.insert)
        last.register_forward_hook(prompts.drop)


def _shift_rotary(blocks: list[Any], num_prompts: int) -> None:
    """Let rotary embeddings begin behind the prompts, which have no position either."""
    for module in (module for block in blocks for module in block.modules()):
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens += num_prompts


def _refuse_relative_positions(module: nn.Module) -> None:
    for name, _ in module.named_parameters():
        if "rel_pos" in name or "relative_position" in name:
            raise UserError(
                f"prompt adds tokens, but this backbone has a bias for every pair of the tokens that it was made for "
                f"({name}); choose another method, or a backbone without relative position bias (vit_*, deit_*, eva*)"
            )
