"""Pretrains the backbone of the digits example, a small ViT, to classify images drawn from formulas.

    python examples/fractal_vit/pretrain.py --out extract/fractal_vit  # the shipped weights: 5 minutes
    timm.create_model("local-dir:extract/fractal_vit", pretrained=True)

Formula-driven supervision: Kataoka et al., arXiv 2101.08515. For speed most steps use half of the patches, as in
PatchDropout (arXiv 2208.07220); the last ones use all. No image shows a digit. The result is a folder that timm loads.
"""

import argparse
import json
import math
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from draw import FAMILIES, SIZE, Album
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": SIZE, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
MEAN = STD = (0.5, 0.5, 0.5)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors and config.json")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--families", nargs="+", choices=list(FAMILIES), default=["fractals", "textures"], help="what to draw"
    )
    parser.add_argument("--classes", type=int, default=32, help="classes in each family")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--full-share", type=float, default=0.25, help="share of the run that sees every patch")
    return parser.parse_args()


def normalize(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def make_model(num_classes: int) -> nn.Module:
    """A model with a 2-d sine and cosine table as its initial position embedding, for short runs (arXiv 2205.01580)."""
    set_fused_attn(False)  # the fused bfloat16 attention is several times slower on a CPU, at 33 to 65 tokens
    model = timm.create_model(
        ARCHITECTURE, num_classes=num_classes, patch_drop_rate=0.5, weight_init="jax", **MODEL_ARGS
    )
    side, dim = SIZE // MODEL_ARGS["patch_size"], MODEL_ARGS["embed_dim"]
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.5 * build_sincos2d_pos_embed([side, side], dim)
    return model


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def rate(done: float) -> float:
    """Learning rate as a fraction of its peak, after the fraction `done` of the run: linear warmup, then a cosine."""
    return min(done / 0.05, 0.5 + 0.5 * math.cos(math.pi * done)) + 1e-3


def train(model: nn.Module, album: Album, args: argparse.Namespace, g: torch.Generator) -> None:
    optimizer = make_optimizer(model, args.lr)
    start, right = time.perf_counter(), 0.0
    for step in range(args.steps):
        done = step / args.steps
        if done > 1 - args.full_share:
            model.patch_drop.prob = 0.0
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(done)
        images, labels = album.batch(args.batch_size, g)
        right = 0.98 * right + 0.02 * train_step(model, optimizer, normalize(images), labels)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  {time.perf_counter() - start:.0f} s  training accuracy {right:.3f}", flush=True)
    print(f"{args.steps} steps in {time.perf_counter() - start:.0f} s")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step with the loss of both read-outs, class token and mean of patches; returns the accuracy of the mean."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_features(images)  # (B, N, d)
        cls, mean = model.head(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)])).float()
    loss = F.cross_entropy(cls, labels) + F.cross_entropy(mean, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return (mean.argmax(1) == labels).float().mean().item()


def hub_config() -> dict[str, object]:
    """The content of config.json in a model folder of timm."""
    pretrained_cfg = {
        "input_size": [3, SIZE, SIZE],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(MEAN),
        "std": list(STD),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": MODEL_ARGS["embed_dim"],
        "global_pool": "token",
        "model_args": {**MODEL_ARGS, "num_classes": 0},
        "pretrained_cfg": pretrained_cfg,
    }


def save(model: nn.Module, folder: Path) -> None:
    """Save the backbone without its head, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hub_config(), indent=2) + "\n")


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    album = Album.of(args.families, args.classes, g)
    model = make_model(album.num_classes)
    train(model, album, args, g)
    save(model, args.out)


if __name__ == "__main__":
    main()
