"""A training step of the weight-update methods: `python -m benchmarks.methods [--model NAME] [--out FILE]`.

LoRA is compared with peft's, both on q and v of the same model with separate projections (an EVA of the size of
--model; peft cannot adapt q and v of a fused map), and Kronecker with LoRA on --model itself, whose qkv is fused. All
run in one process; in every round every contestant makes one step (forward, backward, AdamW), in a rotating order.
Times are medians, of wall-clock seconds and of CPU seconds (`cpu_seconds`, which other work on the machine disturbs
less).

Memory is measured separately, with one model alive: `saved_bytes`, all that autograd keeps for the backward pass
without the weights, and `peak_bytes`, how far one step rises above the memory before it (`adapt.job.cost.peak_memory`:
allocations on a GPU, else the resident memory of the process, which is accurate to some MB).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from adapt.features.specs import spec_of_backbone
from adapt.job.cost import peak_memory
from adapt.methods.in_backbone.kronecker import KroneckerOptions, inject_kronecker
from adapt.methods.in_backbone.lora import LoRAOptions, inject_lora
from adapt.methods.in_backbone.target_modules import TargetViT
from adapt.methods.in_backbone.tuned_backbone import Inject, TunedBackbone, TunedOptions
from adapt.methods.trained_parameters import trainable
from benchmarks.record import add_record_options, machine, save
from extract.backbones.backbone import TimmBackbone, empty_backbone, load_backbone
from extract.config import BackboneConfig
from extract.forward.device import synchronize

CLASSES, RANK = 10, 4
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64}  # of `--small`
RATIOS = {  # ours / theirs
    "LoRA / peft's, separate q and v": ("lora, separate", "peft, separate"),
    "Kronecker / LoRA, fused qkv": ("kronecker, fused", "lora, fused"),
    "Kronecker of slow rank 1 / LoRA, fused qkv": ("kronecker of slow rank 1, fused", "lora, fused"),
}


def inject_peft(vit: TargetViT, options: TunedOptions) -> None:
    """Inject peft's LoRA."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(config, vit.module)


def build_contestants(name: str, small: bool) -> dict[str, Callable[[], nn.Module]]:
    """Contestant -> function that builds its model."""
    size: dict[str, Any] = dict(SMALL) if small else {}
    fused = BackboneConfig(name=name, weights="random", model_kwargs=size)
    shape: Any = empty_backbone(name, size).module
    separate = BackboneConfig(
        name="eva02_tiny_patch14_224",
        weights="random",
        model_kwargs={
            "embed_dim": shape.embed_dim,
            "depth": len(shape.blocks),
            "num_heads": shape.blocks[0].attn.num_heads,
            "patch_size": shape.patch_embed.patch_size[0],
            "img_size": shape.patch_embed.img_size[0],
            "mlp_ratio": 4,
            "swiglu_mlp": False,
            "use_rot_pos_emb": False,
            "qkv_fused": False,
        },
    )
    lora, slow_rank_1 = LoRAOptions(rank=RANK), KroneckerOptions(n=32, slow_rank=1)
    return {
        "lora, separate": lambda: build(load_backbone(separate), inject_lora, lora),
        "peft, separate": lambda: build(load_backbone(separate), inject_peft, TunedOptions()),
        "lora, fused": lambda: build(load_backbone(fused), inject_lora, lora),
        "kronecker, fused": lambda: build(load_backbone(fused), inject_kronecker, KroneckerOptions(n=32)),
        "kronecker of slow rank 1, fused": lambda: build(load_backbone(fused), inject_kronecker, slow_rank_1),
    }


def build(backbone: TimmBackbone, inject: Inject, options: TunedOptions) -> nn.Module:
    """A model on all blocks of the backbone."""
    spec = spec_of_backbone(backbone, range(backbone.depth))
    return TunedBackbone(backbone, spec, CLASSES, inject=inject, options=options)


class Step:
    """One training step of a model."""

    def __init__(self, model: nn.Module, batch: int, device: torch.device, precision: torch.dtype | None) -> None:
        self.model, self.device, self.precision = model.to(device).train(), device, precision
        size = model.module.patch_embed.img_size
        self.images = torch.randn(batch, 3, *size, device=device)
        self.labels = torch.arange(batch, device=device) % CLASSES
        self.optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        self.run()

    def loss(self) -> torch.Tensor:
        """Forward pass and loss."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            return F.cross_entropy(self.model(self.images).float(), self.labels)

    def run(self) -> tuple[float, float]:
        """Make the step; returns its wall-clock and CPU seconds."""
        synchronize(self.device)
        started = time.perf_counter(), time.process_time()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - started[0], time.process_time() - started[1]


def saved_bytes(step: Step) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, each counted once, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in step.model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()  # keep it until all storages are counted: a freed address might be reused
    n_bytes = sum(found.values())
    del loss
    return n_bytes


def peak_bytes(step: Step) -> int | None:
    """How far one step rises above the memory in use before it, in bytes."""
    with peak_memory(step.device) as peak:
        step.run()
    return peak.n_bytes


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure seconds and bytes of each contestant."""
    device, precision = torch.device(args.device), torch.bfloat16 if args.bfloat16 else None
    builders = build_contestants(args.model, args.small)
    figures: dict[str, dict[str, Any]] = {}
    # Memory: one model at a time.
    for name, builder in builders.items():
        step = Step(builder(), args.batch, device, precision)
        parameters = sum(tensor.numel() for tensor in trainable(step.model).values())
        figures[name] = {"parameters": parameters, "saved_bytes": saved_bytes(step), "peak_bytes": peak_bytes(step)}
        del step
    # Time: all models take turns.
    steps = {name: Step(builder(), args.batch, device, precision) for name, builder in builders.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(steps[name].run())
    for name in steps:
        for key, values in zip(("seconds", "cpu_seconds"), zip(*seconds[name], strict=True), strict=True):
            figures[name] |= {key: statistics.median(values), f"all_{key}": values}
    return figures


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Ours divided by theirs, for every pair of RATIOS and every figure."""
    keys = ("seconds", "cpu_seconds", "saved_bytes", "peak_bytes")
    return {
        name: {key: figures[ours][key] / figures[theirs][key] if figures[theirs][key] else None for key in keys}
        for name, (ours, theirs) in RATIOS.items()
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm model with fused qkv")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contestant, of which the median is taken")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that the script runs")
    add_record_options(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    figures = measure(args)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    save({**machine(), "settings": settings, "figures": figures, "ratios": ratios(figures)}, args.out)


if __name__ == "__main__":
    main()
