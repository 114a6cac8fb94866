"""Training in a random subspace of one module: the local intrinsic dimension of He et al. (arXiv 2203.16329, Figure 3).

    theta = theta_0 + P theta_d

theta_0 are all D parameters of the attention or the MLP of one block, frozen; P is a fixed random map (Fastfood);
theta_d, d numbers that start at zero, is all that is trained. The smallest d that nearly reaches the accuracy of d = D
is the intrinsic dimension (Li et al., arXiv 1804.08838; Aghajanyan et al., arXiv 2012.13255). Ours: the block may be
chosen; the last is the default, since the classifier reads its output.
"""

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from adapt.methods.in_backbone.fastfood import Fastfood
from adapt.methods.in_backbone.target_modules import Sublayer, TargetViT, sublayer_name
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import PositiveInt
from store.errors import UserError


class IntrinsicOptions(TunedOptions):
    """Options of `intrinsic`.

    Args:
        dim: m.
        block: which block; null: the last.
        module: attention (without the norm before it) or mlp.
        seed: of the random map, which is the same on every machine.
    """

    dim: PositiveInt = 100
    block: Annotated[int, Field(ge=0)] | None = None
    module: Sublayer = "attention"
    seed: Annotated[int, Field(ge=0)] = 0


class Subspace(nn.Module):
    """A frozen module that runs with its parameters moved by P theta.

    Args:
        module: any module.
        dim: d.
        seed: of P.
    """

    def __init__(self, module: nn.Module, dim: int, seed: int) -> None:
        super().__init__()
        self.module = module
        device = next(module.parameters()).device
        self.project = Fastfood(dim, count(module), seed, device)
        self.theta = nn.Parameter(torch.zeros(dim, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        return functional_call(self.module, self._moved(), args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain copy of the module, its parameters moved by P theta."""
        plain = copy.deepcopy(self.module)
        for name, moved in self._moved().items():
            plain.get_parameter(name).copy_(moved)
        return plain

    def _moved(self) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        steps = self.project(self.theta).split([parameter.numel() for parameter in parameters.values()])
        return {
            name: parameter + step.view_as(parameter)
            for (name, parameter), step in zip(parameters.items(), steps, strict=True)
        }


def inject_intrinsic(vit: TargetViT, options: IntrinsicOptions) -> None:
    """Train one module of one block in a random subspace.

    Raises:
        UserError: there is no such block or module, or it has fewer parameters than `dim`.
    """
    blocks, dim = vit.blocks, options.dim
    index = len(blocks) - 1 if options.block is None else options.block
    if not 0 <= index < len(blocks):
        raise UserError(f"block {index} does not exist; legal: 0 to {len(blocks) - 1}, or null for the last")
    block, name = blocks[index], sublayer_name(blocks[index], options.module)
    if not hasattr(block, name):
        raise UserError(
            f"this backbone's blocks ({type(block).__name__}) have no separate {options.module}; choose another method"
        )
    module = getattr(block, name)
    if dim > count(module):
        raise UserError(
            f"dim {dim} is more than the {count(module)} parameters of the {options.module} of block {index}; lower dim"
        )
    setattr(block, name, Subspace(module, dim, options.seed))


def count(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
