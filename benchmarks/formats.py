"""Measures the rounding error of stored formats on the tokens of a real ViT-Tiny and real photographs.

    SIDECACHE_DATA=... python -m benchmarks.formats --out benchmarks/results/formats.json

For every format: bytes a value, and the mean over tokens of the relative L2 error, (a) without the one massive channel,
(b) after a LayerNorm without parameters over all channels, which is how LoSA reads tokens; patches and CLS separately.
Statistics (RMS, mean, deviation) come from one half of the images, errors from the other. A minute on two cores.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from benchmarks.made_up import encode
from benchmarks.record import add_record_options, machine, save
from extract.backbones.backbone import load_backbone
from extract.config import BackboneConfig
from extract.images.decode import decode_rgb
from store.dtypes import channel_rms, decode_numpy

Array = np.ndarray
Format = Callable[
    [Array, Array], Array
]  # (statistics' tokens, tokens), both (samples, tokens, dim) -> tokens read back
LAYERS = (8, 11)
INT8_MAX = 127
BLOCK = 32
# The 16 levels of NF4 (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution.
NF4 = np.array(
    [
        *(-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0),
        *(0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1),
    ]
)


def rms_of(tokens: Array) -> Array:
    """Per-channel RMS (dim,), as the store keeps it."""
    return channel_rms(np.mean(tokens.astype(np.float64) ** 2, axis=(0, 1)))


def levels(values: Array, scale: Array) -> Array:
    """Whole numbers from -127 to 127."""
    return np.clip(np.rint(values / scale), -INT8_MAX, INT8_MAX)


def largest_scale(values: Array) -> Array:
    """The scale at which the largest value of every token is level 127."""
    return np.abs(values).max(axis=-1, keepdims=True) / INT8_MAX


def stored(dtype: Any) -> Format:
    """A format of sidecache itself."""

    def round_trip(known: Array, tokens: Array) -> Array:
        rms = rms_of(known)
        return decode_numpy(encode(tokens, dtype, rms), dtype, rms)

    return round_trip


def token_scale(known: Array, tokens: Array) -> Array:
    """Linear levels with a scale for every token."""
    return levels(tokens, largest_scale(tokens)) * largest_scale(tokens)


def channel_scale(known: Array, tokens: Array) -> Array:
    """Linear levels with a scale for every channel."""
    scale = np.abs(known).max(axis=(0, 1)) / INT8_MAX
    return levels(tokens, scale) * scale


def linear_rms(known: Array, tokens: Array) -> Array:
    """Divide by channel RMS, then linear levels with a scale for every token."""
    relative = tokens / rms_of(known)
    return levels(relative, largest_scale(relative)) * largest_scale(relative) * rms_of(known)


def centered(known: Array, tokens: Array) -> Array:
    """Standardize channels, then linear levels with a scale for every token."""
    mean, std = known.mean(axis=(0, 1)), known.std(axis=(0, 1))
    relative = (tokens - mean) / std
    return levels(relative, largest_scale(relative)) * largest_scale(relative) * std + mean


def least_squares(known: Array, tokens: Array) -> Array:
    """Choose the scale of every token by the smallest squared error: 26 clipping points, each refitted."""
    relative = tokens / rms_of(known)
    best, error = np.zeros_like(relative), np.full((*relative.shape[:-1], 1), np.inf)
    for clip in np.linspace(0.5, 1.0, 26):
        values = levels(relative, clip * largest_scale(relative))
        step = (values * relative).sum(-1, keepdims=True) / np.maximum((values**2).sum(-1, keepdims=True), 1e-12)
        missed = ((values * step - relative) ** 2).sum(-1, keepdims=True)
        best, error = np.where(missed < error, values * step, best), np.minimum(missed, error)
    return best * rms_of(known)


def mu_law(mu: float) -> Format:
    """Logarithmic levels, as telephones have them."""

    def round_trip(known: Array, tokens: Array) -> Array:
        relative = tokens / rms_of(known)
        largest = np.abs(relative).max(axis=-1, keepdims=True)
        folded = np.sign(relative) * np.log1p(mu * np.abs(relative) / largest) / np.log1p(mu)
        folded = np.rint(folded * INT8_MAX) / INT8_MAX
        return np.sign(folded) * np.expm1(np.abs(folded) * np.log1p(mu)) / mu * largest * rms_of(known)

    return round_trip


def quadratic(linear: int) -> Format:
    """Level q means q (|q| + linear): fine steps near zero, whole numbers that float32 holds exactly, no table."""

    def round_trip(known: Array, tokens: Array) -> Array:
        relative = tokens / rms_of(known)
        scale = np.abs(relative).max(axis=-1, keepdims=True) / (INT8_MAX * (INT8_MAX + linear))
        folded = (np.sqrt(linear**2 + 4 * np.abs(relative) / scale) - linear) / 2
        values = np.clip(np.rint(folded), 0, INT8_MAX) * np.sign(relative)
        return values * (np.abs(values) + linear) * scale * rms_of(known)

    return round_trip


def blocks(tokens: Array) -> Array:
    """Values in blocks of 32 channels, (samples, tokens, blocks, 32)."""
    return tokens.reshape(*tokens.shape[:-1], -1, BLOCK)


def from_book(book: Array) -> Format:
    """Divide by channel RMS, then the nearest of some levels from -1 to 1, with a float16 scale for every block."""

    def round_trip(known: Array, tokens: Array) -> Array:
        relative = blocks(tokens / rms_of(known))
        scale = np.abs(relative).max(axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
        nearest = np.searchsorted((book[1:] + book[:-1]) / 2, relative / scale)
        return (book[nearest] * scale).reshape(tokens.shape) * rms_of(known)

    return round_trip


def lloyd_max(known: Array, tokens: Array) -> Array:
    """Fit 256 levels to tokens that are divided by channel RMS and by their L2 norm."""

    def normalized(part: Array) -> tuple[Array, Array]:
        relative = part / rms_of(known)
        norm = np.sqrt((relative**2).mean(axis=-1, keepdims=True))
        return relative / norm, norm

    sample = np.sort(normalized(known)[0].ravel())
    counts, edges = np.histogram(sample, 4000)
    density = np.cumsum(np.cbrt(counts))  # the best density of levels is the cube root of that of the values
    book = np.interp((np.arange(256) + 0.5) / 256, density / density[-1], edges[1:])
    for _ in range(60):
        parts = np.split(sample, np.searchsorted(sample, (book[1:] + book[:-1]) / 2))
        book = np.array([part.mean() if len(part) else level for part, level in zip(parts, book, strict=True)])
    values, norm = normalized(tokens)
    return book[np.searchsorted((book[1:] + book[:-1]) / 2, values)] * norm * rms_of(known)


def fp8(known: Array, tokens: Array) -> Array:
    """8-bit floats (e4m3) with a scale for every token."""
    relative = tokens / rms_of(known)
    scale = np.abs(relative).max(axis=-1, keepdims=True) / 448  # the largest e4m3 value
    return (relative / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale * rms_of(known)


FORMATS: dict[str, tuple[float, Format]] = {  # name -> (bytes a value, round trip)
    "float16": (2, stored("float16")),
    "bfloat16": (2, stored("bfloat16")),
    "int8, scale a token": (1, token_scale),
    "int8, scale a channel": (1, channel_scale),
    "int8, channel RMS, scale a token": (1, linear_rms),
    "int8, channel mean and deviation, scale a token": (1, centered),
    "channel RMS, step by least squares and clipping": (1, least_squares),
    "channel RMS, mu-law (mu = 5)": (1, mu_law(5)),
    "channel RMS, mu-law (mu = 10)": (1, mu_law(10)),
    "channel RMS, mu-law (mu = 30)": (1, mu_law(30)),
    "**sidecache int8**: code q stands for q (abs(q) + 64)": (1, stored("int8")),
    "channel RMS, code q stands for q (abs(q) + 32)": (1, quadratic(32)),
    "channel RMS, code q stands for q abs(q)": (1, quadratic(0)),
    "channel RMS, Lloyd-Max levels, norm a token": (1, lloyd_max),
    "fp8 e4m3, channel RMS, scale a token": (1, fp8),
    "**sidecache int4**: code q stands for q (abs(q) + 4), a scale for 32 channels": (0.5625, stored("int4")),
    "channel RMS, levels from -7 to 7, a scale for 32 channels": (0.5625, from_book(np.arange(-7, 8) / 7)),
    "channel RMS, NF4 levels, a scale for 32 channels": (0.5625, from_book(NF4)),
}


def layer_norm(tokens: Array) -> Array:
    """LayerNorm without parameters."""
    centered = tokens - tokens.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6)


def relative_error(read: Array, tokens: Array) -> Array:
    """L2 norm of the error divided by that of the token, (samples, tokens)."""
    return np.linalg.norm(read - tokens, axis=-1) / np.linalg.norm(tokens, axis=-1)


def errors_of(read: Array, tokens: Array) -> dict[str, float]:
    """Mean errors in percent, by measure and kind of token."""
    massive = int(np.abs(tokens).max(axis=(0, 1)).argmax())
    others = relative_error(np.delete(read, massive, axis=-1), np.delete(tokens, massive, axis=-1))
    normed = relative_error(layer_norm(read), layer_norm(tokens))
    kinds = {"patches": slice(1, None), "cls": slice(0, 1)}
    return {
        f"{measure} {kind}": 100 * float(error[:, part].mean())
        for measure, error in (("without_massive", others), ("layer_norm", normed))
        for kind, part in kinds.items()
    }


def images(folder: Path, count: int) -> Iterator[Any]:
    """Decode images of a folder of classes, equally many of every class."""
    classes = [sorted(path.iterdir()) for path in sorted(folder.iterdir())]
    for number in range(count):
        path = classes[number % len(classes)][number // len(classes)]
        yield decode_rgb(path.read_bytes(), str(path))


def real_tokens(data: Path, count: int) -> dict[int, Array]:
    """Tokens (samples, tokens, dim) of two layers."""
    weights = data / "weights/vit_tiny_patch16_224_imagenet1k.safetensors"
    backbone = load_backbone(BackboneConfig(name="vit_tiny_patch16_224", weights=str(weights)))
    parts: dict[int, list[Array]] = {layer: [] for layer in LAYERS}
    with torch.no_grad():
        for image in images(data / "images/rsscn7/test", count):
            for layer, values in backbone.tokens(torch.as_tensor(backbone.transform(image))[None], LAYERS).items():
                parts[layer].append(values.numpy())
    return {layer: np.concatenate(values) for layer, values in parts.items()}


def measure(tokens: dict[int, Array]) -> dict[str, Any]:
    """Bytes a value and errors of every format."""
    rows: dict[str, Any] = {}
    for name, (n_bytes, round_trip) in FORMATS.items():
        rows[name] = {"bytes": n_bytes}
        for layer, values in tokens.items():
            known, unseen = values[0::2], values[1::2]
            rows[name][f"block {layer}"] = errors_of(round_trip(known, unseen), unseen)
    return rows


def table(rows: dict[str, Any]) -> str:
    """A Markdown table; a cell is the error in percent of patches (of CLS)."""
    blocks = [f"block {layer}" for layer in LAYERS]
    heads = [f"{b}, {m}" for b in blocks for m in ("massive channel left out", "after LayerNorm")]
    lines = ["| format | bytes | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for name, row in rows.items():
        cells = [
            f"{row[b][f'{m} patches']:.2f} ({row[b][f'{m} cls']:.2f})"
            for b in blocks
            for m in ("without_massive", "layer_norm")
        ]
        lines.append(f"| {name} | {row['bytes']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    add_record_options(parser)
    args = parser.parse_args()
    if "SIDECACHE_DATA" not in os.environ:
        parser.error("set SIDECACHE_DATA to the folder of real images and weights")
    tokens = real_tokens(Path(os.environ["SIDECACHE_DATA"]), args.images)
    rows = measure(tokens)
    spread = {
        f"block {k}": {"smallest over median channel RMS": float(np.min(rms_of(v)) / np.median(rms_of(v)))}
        for k, v in tokens.items()
    }
    save({**machine(), "images": args.images, "unit": "percent", "rms": spread, "formats": rows}, args.out)
    print(table(rows))


if __name__ == "__main__":
    main()
