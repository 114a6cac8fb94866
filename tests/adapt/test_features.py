"""Resident, streamed and online features give the same numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_vit import TINY

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.choice import choose_source
from adapt.features.online import OnlineFeatures
from adapt.features.pooled import PooledFeatures
from adapt.features.specs import spec_of_backbone, spec_of_store
from adapt.job.executor import InProcess
from adapt.job.feature_set import needed_layers
from adapt.job.inputs import Inputs
from adapt.job.training_job import train as train_job
from adapt.job.trial_run import adaptor_path
from adapt.methods.readout import Readout
from adapt.methods.registry import build_model
from adapt.methods.trained_parameters import trainable
from extract.backbones.backbone import TimmBackbone
from extract.forward.frozen_forward import FrozenForward
from store.errors import JobError, UserError
from store.writer import StoreWriter

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_resident_and_streamed_batches_are_what_the_store_reads(
    tiny_config: MakeConfig, dtype: str, together: int
) -> None:
    store = sc.extract(tiny_config(f"store.dtype={dtype}")).store
    streamed = StreamedFeatures(store, CPU)
    groups = [np.array([5, 0, 17]), np.array([23]), np.array([3, 3])]
    for features in (streamed, ResidentFeatures(streamed, store.layers)):
        batches = list(features.batches("train", groups, [0, 2], together))
        assert [rows.tolist() for rows, _ in batches] == [group.tolist() for group in groups]
        for rows, tokens in batches:
            for layer, values in store.read("train", rows, [0, 2]).items():
                assert torch.equal(tokens[layer], torch.from_numpy(values))


def test_online_features_are_the_stored_ones_to_the_bit_whatever_the_batch(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    inputs = Inputs(config)
    store = sc.extract(config, inputs.source, inputs.backbone).store
    forward = FrozenForward(inputs.backbone, store.layers, "all", config.extract)
    online = OnlineFeatures(inputs.source, forward, "all")
    groups = [np.array([5, 0, 17]), np.array([23]), np.arange(20)]
    for rows, tokens in online.batches("train", groups, store.layers):
        for layer, values in store.read("train", rows).items():
            assert torch.equal(tokens[layer], torch.from_numpy(values))


def test_the_three_sources_train_to_the_same_bits(tiny_config: MakeConfig) -> None:
    """In float32 on a CPU, training from the cache equals training online."""
    trained = {}
    for kind in ("resident", "streamed", "online"):
        config = tiny_config(f"train.feature_source={kind}", "methods=[{name: losa, rank: 4, token_rank: 2}]")
        row = next(row for row in sc.run(config) if row.feature_source == kind)
        trained[kind] = load_file(adaptor_path(config.run_dir, row)), row.top1, row.val_score
    for kind in ("streamed", "online"):
        assert trained[kind][1:] == trained["resident"][1:]
        for name, tensor in trained["resident"][0].items():
            assert torch.equal(trained[kind][0][name], tensor), (kind, name)


@pytest.mark.parametrize("change", ["images", "labels", "classes"])
def test_online_results_of_other_samples_are_not_taken_for_these(tiny_config: MakeConfig, change: str) -> None:
    """The configuration does not describe a user's own datasets."""
    config = tiny_config("train.feature_source=online", "methods=[linear_probe]")
    pairs = [(Image.new("RGB", (32, 32), (9 * row, 80 * (row % 2), 90)), row % 2) for row in range(24)]
    other = [(image.rotate(9, fillcolor="red") if change == "images" else image, label) for image, label in pairs]
    if change == "labels":
        other[0] = (other[0][0], 1)
    before = sc.from_datasets({"train": pairs, "test": pairs}, ["a", "b"])
    after = sc.from_datasets({"train": pairs, "test": other}, ["a", "c" if change == "classes" else "b"])
    assert [len(sc.train(config, source)) for source in (before, before, after)] == [1, 1, 2]


def test_no_gradient_reaches_the_backbone(tiny_config: MakeConfig) -> None:
    config = tiny_config("train.feature_source=online")
    inputs = Inputs(config)
    before = {name: tensor.clone() for name, tensor in inputs.backbone.module.state_dict().items()}
    forward = FrozenForward(inputs.backbone, (0, 1, 2), "all", config.extract)
    _, tokens = next(OnlineFeatures(inputs.source, forward, "all").batches("train", [np.arange(4)], (0, 1, 2)))
    assert not any(values.requires_grad for values in tokens.values())
    train_job(config, inputs, InProcess(lambda _: None, "cpu"))
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in inputs.backbone.module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.backbone.module.state_dict().items())


def test_pooled_features_are_the_readout_of_the_tokens(tiny_config: MakeConfig) -> None:
    store = sc.extract(tiny_config()).store
    streamed = StreamedFeatures(store, CPU)
    readouts = [Readout(streamed.spec, 3, mode) for mode in ("cls", "mean", "cls_mean", "flatten", "backbone")]
    pooled = PooledFeatures(streamed)
    _, tokens = next(streamed.batches("train", [np.arange(24)], [2]))
    for readout in readouts:
        expected = readout.pool(readout.normalize(tokens[2]))
        torch.testing.assert_close(pooled.whole("train", readout), expected)
    several, (first, last) = (
        Readout(streamed.spec, 3, "cls_mean", (0, 2)),
        (Readout(streamed.spec, 3, "cls_mean", (layer,)) for layer in (0, 2)),
    )
    for of in (pooled.whole, pooled.rounding):
        assert torch.equal(of("train", several), torch.cat([of("train", first), of("train", last)], dim=-1))


@pytest.mark.parametrize("final_norm", [True, False])
def test_the_read_out_of_a_store_is_that_of_the_backbone(tiny_config: MakeConfig, final_norm: bool) -> None:
    """Also if the backbone has no final norm: then tokens are pooled as they are."""
    kwargs = TINY | {"final_norm": final_norm}
    config = tiny_config(f"backbone.model_kwargs={kwargs}", "methods=[{name: losa, rank: 4, token_rank: 2}]")
    inputs = Inputs(config)
    store = sc.extract(config).store
    of_store, of_backbone = spec_of_store(store).pre_logits, spec_of_backbone(inputs.backbone, range(3)).pre_logits
    assert len(store.tail_arrays()) == (2 if final_norm else 0)
    tokens = torch.randn(2, 17, 32) * 3 + 1
    assert torch.equal(of_store.normalize(tokens), of_backbone.normalize(tokens))
    assert torch.equal(of_store.normalize(tokens), tokens) is not final_norm


@torch.no_grad()
def test_without_a_final_norm_the_head_reads_the_pooled_tokens_as_they_are(tiny_config: MakeConfig) -> None:
    config = tiny_config(f"backbone.model_kwargs={TINY | {'final_norm': False}}", "methods=[linear_probe]")
    (row,) = sc.run(config)
    readout = sc.load_adaptor(adaptor_path(config.run_dir, row), device="cpu").model.readout
    rows = np.arange(24)
    _, tokens = next(StreamedFeatures(sc.open_store(config.store.path), CPU).batches("train", [rows], [2]))
    pooled = torch.cat([tokens[2][:, 0], tokens[2][:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(readout.pool(readout.normalize(tokens[2])), pooled)
    torch.testing.assert_close(
        readout.std, pooled.std(dim=0, correction=0), rtol=0.2, atol=0.0
    )  # without the validation rows


def test_looking_for_the_layers_that_are_read_draws_nothing(
    tiny_config: MakeConfig, tiny_backbone: TimmBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no memory either, and builds one model for trials that differ in their rates only."""
    built = []

    def counted(*args: Any, **kwargs: Any) -> torch.nn.Module:
        built.append(build_model(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr("adapt.job.feature_set.build_model", counted)
    losa = "{name: losa, sweep: {lr: [0.1, 0.2, 0.3], layers: [[0], [1]]}}"
    config = tiny_config(f"methods=[linear_probe, {losa}]")
    before = torch.get_rng_state()
    assert needed_layers(config, spec_of_backbone(tiny_backbone, range(3)), 3) == (0, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [type(model).__name__ for model in built] == ["LinearProbe", "LoSA", "LoSA"]
    assert all(tensor.is_meta for model in built for tensor in trainable(model).values())


def test_the_choice_of_a_source_follows_from_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("extract.forward.device.psutil.virtual_memory", lambda: memory)
    assert choose_source("auto", 500, CPU).kind == "resident"
    assert choose_source("auto", 501, CPU).kind == "streamed"
    assert choose_source("streamed", 500, CPU).reason == "as asked for"


def test_an_unfinished_store_is_not_trained_from(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    store = sc.extract(config).store
    (config.run_dir.parent / "cache.zarr" / "train" / "status" / "c" / "1").unlink()
    with pytest.raises(JobError, match=r"lacks 1 of 5 shards of train; finish it with `sidecache extract`"):
        sc.train(config)
    assert sc.extract(config).shards_written == 1
    assert store.num_samples("train") == 24


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("store.dtype=int8", "store.dtype: stored 'float32', wanted 'int8'"),
        ("store.tokens=mean", "store.tokens: stored 'all', wanted 'mean'"),
        ("backbone.name=vit_small_patch16_224", "backbone.name: stored 'vit_tiny_patch16_224'"),
        ("backbone.image_size=64", "backbone.image_size: stored 32, wanted 64"),
        ("backbone.model_kwargs.depth=5", "backbone.model_kwargs.depth: stored 3, wanted 5"),
        ("extract.precision=bfloat16", "extract.precision: stored 'float32', wanted 'bfloat16'"),
    ],
)
def test_training_refuses_a_store_that_the_configuration_does_not_describe(
    tiny_config: MakeConfig, override: str, field: str
) -> None:
    sc.extract(tiny_config())
    with pytest.raises(UserError, match=field):
        sc.train(tiny_config(override))


def test_training_takes_model_kwargs_that_the_store_spells_otherwise(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    given = config.backbone.model_kwargs | {"img_size": (32, 32)}  # which JSON keeps as a list
    backbone = config.backbone.model_copy(update={"model_kwargs": given, "image_size": None})
    config = config.model_copy(update={"backbone": backbone})
    sc.extract(config)
    assert sc.extract(config).shards_written == 0
    assert sc.train(config)


def test_training_may_use_some_of_the_stored_layers(tiny_config: MakeConfig) -> None:
    sc.extract(tiny_config())
    config = tiny_config("store.layers=[0, 2]", "methods=[losa]")
    assert sc.extract(config).shards_written == 0
    row = sc.train(config)[0]
    adaptor = sc.load_adaptor(adaptor_path(config.run_dir, row))
    assert adaptor.model.layers == (0, 2)


def test_a_store_without_a_single_shard_gives_way_to_another_configuration(tiny_config: MakeConfig) -> None:
    with mock.patch.object(StoreWriter, "write", side_effect=JobError("the disk is full")), pytest.raises(JobError):
        sc.extract(tiny_config())
    assert sc.extract(tiny_config("store.layers=[1]")).store.layers == (1,)


def test_predictions_come_from_the_layers_that_were_trained(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[{name: losa, rank: 4, token_rank: 2, layers: [1, 2]}]")
    row = sc.run(config)[0]
    adaptor = sc.load_adaptor(adaptor_path(config.run_dir, row))
    images = torch.randn(2, 3, 32, 32)
    assert adaptor.probabilities(images).sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert replace(adaptor).card.layers == (0, 1, 2)
