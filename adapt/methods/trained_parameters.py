"""Which tensors of a model are trained, saved and counted."""

from typing import Any

import torch
from torch import nn

from adapt.methods.in_backbone.updated_linear import update_tensors


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def adapter_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adaptor, by name.

    These are the trained parameters, those of weight updates that are not trained (A of `lora_fix`), mean and deviation
    by which the read-out standardizes features, and the samples of `knn`.
    """
    standardization = model.readout.named_buffers(prefix="readout", recurse=False)
    samples = model.readout.head.named_buffers(prefix="readout.head")
    return {**trainable(model), **update_tensors(model), **dict(standardization), **dict(samples)}


def count_params(model: Any) -> tuple[int, int]:
    """(trainable parameters without the head, parameters of the head)."""
    head = sum(tensor.numel() for tensor in model.readout.head.parameters())
    return sum(tensor.numel() for tensor in trainable(model).values()) - head, head
