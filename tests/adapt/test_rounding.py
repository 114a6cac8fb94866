"""The read-out must not magnify the rounding of a stored format in channels that hardly vary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
import torch
from torch import Tensor

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.features.cached import StreamedFeatures
from adapt.features.online import OnlineFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.inputs import Inputs
from adapt.job.trial_run import adaptor_path
from adapt.methods.readout import Readout
from benchmarks.made_up import encode
from extract.forward.encoding import rounding_error
from extract.forward.frozen_forward import FrozenForward
from store.arrays import STORED
from store.config import Dtype
from store.dtypes import CODES, channel_rms
from store.listing import Listing
from store.schema import SplitInfo
from store.writer import StoreWriter, create_store

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
ROWS, DIM = 300, 24
# A random class token with layer scale: the blocks change it by a hundred-thousandth.
NEARLY_CONSTANT: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_stored_value_differs_by_more_than_the_stated_rounding(tiny_config: MakeConfig, dtype: str) -> None:
    config = tiny_config(f"store.dtype={dtype}")
    inputs = Inputs(config)
    store = sc.extract(config, inputs.source, inputs.backbone).store
    forward = FrozenForward(inputs.backbone, store.layers, "all", config.extract)
    streamed, online = StreamedFeatures(store, CPU), OnlineFeatures(inputs.source, forward, "all")
    groups, layers = [np.arange(24)], store.layers
    ((_, stored),) = streamed.batches("train", groups, layers)
    ((_, exact),) = online.batches("train", groups, layers)
    for layer in layers:
        share = (stored[layer] - exact[layer]).abs() / streamed.rounding(layer, stored[layer])
        assert share.max() <= 1
        assert share.max() > 0.8 or dtype == "float32", "the bound is not a tight one"


@pytest.mark.parametrize("dtype", CODES)
def test_codes_need_the_rms(dtype: Dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype} needs the per-channel rms of the layer"):
        rounding_error(torch.ones(1, 1, 4), dtype)


def tokens_of(draw: np.random.Generator, most: float) -> np.ndarray:
    """Random tokens: deviations of channels start at a millionth of their magnitude; one channel is massive."""
    mean = draw.choice([-1, 1], DIM) * 10 ** draw.uniform(-1, 1, (5, DIM))
    mean[:, 3] *= 50
    spread = np.abs(mean) * 10 ** draw.uniform(-6, most, DIM)
    tokens = mean + spread * draw.normal(size=(ROWS, 5, DIM))
    return tokens.astype(np.float32)


def write(path: Path, tokens: np.ndarray, dtype: str) -> StreamedFeatures:
    fields: dict[str, Any] = {"layers": (0,), "dim": DIM, "shard_samples": ROWS, "tail_tensors": ()}
    schema = small_store.schema(dtype, splits={"train": SplitInfo(num_samples=ROWS)}, **fields)
    ids = tuple(f"{row}" for row in range(ROWS))
    listing = Listing(ids, np.arange(ROWS, dtype=np.int64) % 3, np.zeros((ROWS, 16), np.uint8))
    rms = channel_rms(np.mean(tokens.astype(np.float64) ** 2, axis=(0, 1)))
    folder = small_store.kvstore_at(path)
    create_store(folder, schema, {"train": listing}, {0: rms} if dtype in CODES else {}, {})
    encoded = encode(tokens, schema.dtype, rms)
    StoreWriter(folder, schema).commit("train", 0, {0: encoded}, np.full(ROWS, STORED, np.uint8))
    return StreamedFeatures(sc.open_store(path), CPU)


def standardized(features: StreamedFeatures, exact: Tensor, pool: Any) -> tuple[Readout, Tensor, Tensor]:
    """A read-out that was standardized by stored tokens, and its features of the stored and of the exact ones."""
    readout, pooled = Readout(features.spec, 3, pool), PooledFeatures(features)
    values = pooled.whole("train", readout)
    readout.standardize(values, pooled.rounding("train", readout))
    return readout, readout.standardized(values), readout.standardized(readout.pool(readout.normalize(exact)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("most", [-5, -4, -3, -2, -1, 1])
def test_the_head_reads_the_same_from_stored_and_from_exact_tokens(
    tmp_path: Path, dtype: str, pool: str, most: int
) -> None:
    """The coarsest steps that are divided by are one deviation; rounding to them has a deviation of 0.29 and mean 0."""
    tokens = tokens_of(np.random.default_rng(most + 9), most)
    readout, stored, exact = standardized(write(tmp_path / "s.zarr", tokens, dtype), torch.from_numpy(tokens), pool)
    moved = (stored - exact)[:, (readout.std != 1) | (dtype != "int4")]  # what int4 rounds away is not divided
    assert (moved.square().mean(dim=0).sqrt() < 0.5).all()
    assert (moved.mean(dim=0).abs() < 0.25).all(), "new images would lie beside those that were trained on"
    if dtype == "int4":  # its steps may be as large as what varies
        return
    torch.manual_seed(0)
    head = torch.nn.Linear(DIM, 3)
    error, logits = (head(stored) - head(exact)).square().mean().sqrt(), head(exact).std()
    assert error < 0.3 * logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_varies_by_more_than_a_step_is_standardized(tmp_path: Path, dtype: str) -> None:
    """Half a step of the coarsest format is a fiftieth of these values."""
    tokens = np.random.default_rng(0).normal(1, 0.5, (ROWS, 5, DIM)).astype(np.float32)
    readout, stored, _ = standardized(write(tmp_path / "s.zarr", tokens, dtype), torch.from_numpy(tokens), "cls")
    torch.testing.assert_close(stored.std(dim=0, correction=0), torch.ones(DIM))
    assert readout.std.min() > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_that_never_vary_are_only_centered(tmp_path: Path, dtype: str) -> None:
    tokens = np.tile(np.linspace(-3, 5, DIM, dtype=np.float32), (ROWS, 5, 1))
    readout, stored, exact = standardized(write(tmp_path / "s.zarr", tokens, dtype), torch.from_numpy(tokens), "mean")
    assert torch.equal(readout.std, torch.ones(DIM))
    assert stored.abs().max() < 1e-5
    assert exact.abs().max() < 0.05


@pytest.mark.parametrize("source", ["resident", "streamed", "online"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_accuracy_reported_is_that_of_the_saved_adaptor(tiny_config: MakeConfig, dtype: str, source: str) -> None:
    """The backbone has a class token that is nearly the same for all images."""
    if source == "online" and dtype != "float32":
        pytest.skip("nothing is stored")
    config = tiny_config(
        "backbone.name=vit_small_patch16_dinov3",
        f"backbone.model_kwargs={NEARLY_CONSTANT}",
        f"store.dtype={dtype}",
        f"train.feature_source={source}",
        "train.epochs=4",
    )
    for row in sc.run(config):
        adaptor = sc.load_adaptor(adaptor_path(config.run_dir, row), device="cpu")
        files = sorted((config.data.root / "test").rglob("*.png"))  # type: ignore[operator]
        right = [found.label == file.parent.name for found, file in zip(adaptor.predict(files), files, strict=True)]
        assert row.top1 == pytest.approx(100 * np.mean(right)), row.method
