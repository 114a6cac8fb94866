"""Every method runs on another device than the CPU, shown without one: fake tensors have a device but no values."""

import copy
from typing import Any

import pytest
import torch
from end_to_end import CLASSES, draw, tune
from method_cases import TUNED_CASES, WITH_PARAMETERS, build, draw_tokens, make_spec
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adapt.training.objective import Objective
from extract.backbones.backbone import TimmBackbone

ELSEWHERE = torch.device("meta")  # the one device besides the CPU whose gradients need no driver
LOSA = [("losa", {"rank": 2, "token_rank": 3, "dropout": 0.3}), ("losa", {"rank": 2, "add": "after_norm"})]


def put_elsewhere(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    fake = mode.from_tensor(tensor.detach())
    with mode:
        return fake.to(ELSEWHERE)


def move(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy with its parameters and buffers moved as by `nn.Module.to`; other tensor attributes stay on the CPU."""
    moved = copy.deepcopy(model)
    for module in moved.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(put_elsewhere(parameter, mode), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, put_elsewhere(buffer, mode))
    return moved.train()


def take_step(model: nn.Module, inputs: Any, weights: Tensor | None) -> None:
    logits = model(inputs)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=ELSEWHERE)
    Objective(multi_label=False, weights=weights).to(ELSEWHERE)(logits, labels).backward()
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in moved)


def test_a_tensor_that_stayed_on_the_cpu_raises() -> None:
    class Forgetful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(CLASSES)

    mode = FakeTensorMode()
    with mode, pytest.raises(RuntimeError, match=r"two different devices|[Dd]evice"):
        take_step(Forgetful(), torch.zeros(4, CLASSES, device=ELSEWHERE), None)


@pytest.mark.parametrize(("method", "options"), [*(case[:2] for case in WITH_PARAMETERS), *LOSA])
def test_methods_from_features(method: str, options: dict[str, Any]) -> None:
    spec, mode = make_spec(), FakeTensorMode()
    tokens = {layer: put_elsewhere(values, mode) for layer, values in draw_tokens(spec).items()}
    model = move(build(method, options, spec), mode)
    with mode:
        take_step(model, tokens, torch.ones(CLASSES))


@pytest.mark.parametrize(("method", "options"), [case[:2] for case in TUNED_CASES])
def test_methods_through_the_backbone(method: str, options: dict[str, Any], tiny_backbone: TimmBackbone) -> None:
    mode = FakeTensorMode()
    images, model = put_elsewhere(draw(tiny_backbone), mode), move(tune(method, options, tiny_backbone), mode)
    with mode:
        take_step(model, images, None)
