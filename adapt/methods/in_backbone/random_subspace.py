"""Training in a random subspace of one module: the local intrinsic dimension of He et al. (arXiv 2203.16329, Figure 3).

    theta = theta_0 + P theta_d

theta_0 are all D parameters of the attention or the MLP of one block, frozen; P is a fixed random map (Fastfood);
theta_d, d numbers from zero on, is all that is trained. The least d that nearly reaches the accuracy of d = D is the
intrinsic dimension (Li et al., arXiv 1804.08838; Aghajanyan et al., arXiv 2012.13255). Ours: the block may be chosen,
the last is the default, since it lies next to what the classifier reads.
"""

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from adapt.methods.in_backbone.fastfood import Fastfood
from adapt.methods.in_backbone.target_modules import Sublayer, Vit, sublayer_name
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import PositiveInt
from store.errors import UserError


class IntrinsicOptions(TunedOptions):
    """Options of `intrinsic`; see `inject_intrinsic`."""

    dim: PositiveInt = 100
    block: Annotated[int, Field(ge=0)] | None = None
    module: Sublayer = "attention"
    seed: Annotated[int, Field(ge=0)] = 0


class Subspace(nn.Module):
    """A frozen module, run with its parameters moved by P theta."""

    def __init__(self, module: nn.Module, dim: int, seed: int) -> None:
        super().__init__()
        self.module = module
        device = next(module.parameters()).device
        self.project = Fastfood(dim, count(module), seed, device)
        self.theta = nn.Parameter(torch.zeros(dim, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return functional_call(self.module, self._moved(), args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain copy of the module, its parameters moved for good."""
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


def inject_intrinsic(
    vit: Vit, dim: int = 100, block: int | None = None, module: Sublayer = "attention", seed: int = 0
) -> None:
    """Train one module of one block in a random subspace.

    Args:
        vit: what to change.
        dim: d, at most the number of the module's parameters.
        block: which block; the last one by default.
        module: its attention (without the norm before it) or its MLP.
        seed: of the random map; the same seed gives the same map anywhere.

    Raises:
        UserError: there is no such block or module, or it has fewer parameters than `dim`.
    """
    blocks = vit.blocks
    index = len(blocks) - 1 if block is None else block
    if not 0 <= index < len(blocks):
        raise UserError(f"block {block} does not exist; legal: 0 to {len(blocks) - 1}, or null for the last")
    chosen, name = blocks[index], sublayer_name(blocks[index], module)
    if not hasattr(chosen, name):
        raise UserError(
            f"this backbone's blocks ({type(chosen).__name__}) have no {module} of their own; choose another method"
        )
    part = getattr(chosen, name)
    if dim > count(part):
        raise UserError(
            f"dim {dim} is more than the {count(part)} parameters of the {module} of block {index}; lower dim"
        )
    setattr(chosen, name, Subspace(part, dim, seed))


def count(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())
