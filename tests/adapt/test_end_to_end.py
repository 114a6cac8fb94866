"""Training through the backbone: the same rows and head as from the store; images are augmented by the seed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adapt.training.trials
import sidecache as sc
from adapt.config.pipeline import Config
from adapt.features.image_batches import ImageBatches
from adapt.job.inputs import Inputs
from adapt.job.trial_run import adaptor_path
from adapt.training.loop import TrainingPass
from extract.backbones.augmentation import Augment, random_box
from extract.backbones.backbone import TappedBackbone, TimmBackbone
from extract.sources.user_datasets import from_datasets
from store.errors import JobError, UserError

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


def images_of(config: Config, augment: bool = False) -> ImageBatches:
    inputs = Inputs(config)
    rows = {split: np.arange(len(images)) for split, images in inputs.source.splits.items()}
    return ImageBatches(source=inputs.source, backbone=inputs.backbone, device=CPU, rows=rows, augment=augment)


def test_a_job_of_both_kinds_fills_one_table(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[linear_probe, bitfit, {name: full, epochs: 1}]")
    rows = {row.method: row for row in sc.run(config)}
    assert [rows[name].feature_source for name in ("linear_probe", "bitfit", "full")] == [
        "resident",
        "images",
        "images",
    ]
    assert rows["full"].trainable_params > rows["bitfit"].trainable_params > 0
    assert len({row.head_params for row in rows.values()}) == 1
    assert rows["bitfit"].break_even_epochs is None
    again = sc.run(config)
    assert [row.trial_id for row in again] == [row.trial_id for row in rows.values()]


def test_an_end_to_end_adaptor_predicts_what_was_evaluated(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[layernorm]", "train.lr=0.05")
    row = sc.run(config)[0]
    adaptor = sc.load_adaptor(adaptor_path(config.run_dir, row))
    images = images_of(config)
    _, pixels = next(images.batches("test", [np.arange(12)], [2]))
    right = adaptor.probabilities(pixels).argmax(dim=1) == images.labels("test")
    assert 100 * float(right.float().mean()) == pytest.approx(row.top1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adaptors_run_in_the_precision_of_their_training(tiny_config: MakeConfig, precision: str) -> None:
    """With any precision of the extraction."""
    extracted = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
    config = tiny_config(
        "methods=[layernorm, linear_probe]", f"train.precision={precision}", f"extract.precision={extracted}"
    )
    images = torch.randn(4, 3, 32, 32)
    for row in sc.run(config):
        adaptor = sc.load_adaptor(adaptor_path(config.run_dir, row), device="cpu")
        inputs = images if row.method == "layernorm" else adaptor.forward(images)
        logits = {}
        for name in ("float32", "bfloat16"):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                logits[name] = adaptor.model(inputs).float()
        assert torch.equal(adaptor.logits(images), logits[precision])


@pytest.mark.parametrize(("precision", "fused"), [("float32", True), ("bfloat16", False)])
def test_the_fused_kernel_of_attention_is_left_out_where_it_is_slow(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, precision: str, fused: bool
) -> None:
    seen: list[bool] = []
    fit = adapt.training.trials.fit

    def watched(job: TrainingPass, checkpoint: Path | None) -> None:
        seen.extend(module.fused_attn for module in job.candidates[0].model.modules() if hasattr(module, "fused_attn"))
        fit(job, checkpoint)

    monkeypatch.setattr("adapt.training.trials.fit", watched)
    sc.run(tiny_config("methods=[bitfit]", f"train.precision={precision}", "train.device=cpu"))
    assert seen
    assert set(seen) == {fused}


def test_the_search_tries_every_point_and_resumes_between_them(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("methods=[bitfit]", "sweep={lr: [0.001, 0.01], weight_decay: [0.0, 0.1]}")
    trained: list[float] = []
    fit = adapt.training.trials.fit

    def counted(job: TrainingPass, checkpoint: Path | None) -> None:
        (candidate,) = job.candidates  # one model inside the backbone at a time
        assert candidate.lr
        trained.append(candidate.lr)
        if len(trained) == 3:
            raise KeyboardInterrupt
        fit(job, checkpoint)

    monkeypatch.setattr("adapt.training.trials.fit", counted)
    with pytest.raises(KeyboardInterrupt):
        sc.run(config)
    sc.run(config)
    assert trained == [
        0.001,
        0.001,
        0.01,
        0.01,
        0.01,
        trained[-1],
    ]  # the interrupted third one twice; the last one is the chosen trial


def test_a_rate_that_diverges_loses_the_search_of_an_end_to_end_method_too(tiny_config: MakeConfig) -> None:
    wild = "train={optimizer: sgd, epochs: 2, seeds: [0]}"  # refit: a single trial is scored too
    (row,) = sc.run(tiny_config("methods=[bitfit]", wild, "sweep={lr: [1.0e+30, 0.01]}"))
    assert row.lr == 0.01
    with pytest.raises(JobError, match=r"diverged in its first epoch at learning rates 1e\+30; lower train\.lr"):
        sc.run(tiny_config("methods=[bitfit]", wild, "train.lr=1.0e+30"))


def test_samples_that_the_store_skipped_are_left_out(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[bitfit]", "data.on_error=skip")
    (config.data.root / "train" / "blue" / "3.png").write_bytes(b"no image")  # type: ignore[operator]
    row = sc.run(config)[0]
    assert row.top1 is not None
    assert sc.open_store(config.store.path).num_samples("train") == 23


def _remove(root: Path) -> None:
    (root / "train" / "blue" / "3.png").unlink()


def _blacken(root: Path) -> None:
    Image.new("RGB", (40, 32)).save(root / "train" / "red" / "3.png")


def _rename_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "red").rename(root / split / "rust")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove, r"train: 1 \('.*blue/3\.png'\) gone"),
        (_blacken, r"train: 1 \('.*red/3\.png'\) changed"),
        (_rename_class, r"classes: 1 \('rust'\) new\n  classes: 1 \('red'\) gone"),
    ],
)
def test_samples_that_are_no_longer_the_stores_are_named(
    tiny_config: MakeConfig, change: Callable[[Path], None], message: str
) -> None:
    config = tiny_config("methods=[linear_probe, bitfit]")
    sc.extract(config)
    change(config.data.root)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"(?s){message}.*Methods that train end to end read the images again\. Put"):
        sc.train(config)
    assert [row.method for row in sc.train(tiny_config("methods=[linear_probe]"))] == ["linear_probe"]


def test_a_sample_that_got_another_label_is_named(tiny_config: MakeConfig) -> None:
    """Its image and its id are the stored ones."""
    images = [(Image.new("RGB", (32, 32), (60 * row, 0, 90)), row % 2) for row in range(5)]
    relabelled = [*images[:4], (images[4][0], 1)]
    config = tiny_config("methods=[bitfit]")
    sc.extract(config, from_datasets({"train": images, "test": images}, ["a", "b"]))
    other = from_datasets({"train": images, "test": relabelled}, ["a", "b"])
    with pytest.raises(UserError, match=r"test: 1 \('test/00000004'\) of another class"):
        sc.train(config, other)
    vectors = [(image, np.eye(2)[label]) for image, label in images]
    with pytest.raises(UserError, match="multi_label: stored False, wanted True"):
        sc.train(config, from_datasets({"train": vectors, "test": vectors}, ["a", "b"]))


def test_reduced_tokens_and_foreign_modules_are_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"end-to-end methods need store\.tokens: all"):
        sc.run(tiny_config("methods=[bitfit]", "store.tokens={pool: 2}"))

    def tap(module: torch.nn.Module, images: torch.Tensor) -> dict[int, torch.Tensor]:
        return {0: module(images).transpose(1, 2)}

    tapped = TappedBackbone(torch.nn.Flatten(2), tap, torch.zeros(3, 8, 8), grid=(8, 8))
    split = [(torch.randn(3, 8, 8), row % 3) for row in range(12)]
    source = from_datasets({"train": split, "test": split}, ["a", "b", "c"])
    with pytest.raises(UserError, match="end-to-end methods need a timm or ViViT backbone"):
        sc.run(tiny_config("methods=[bitfit]", f"store.path={tiny_config().run_dir}/own.zarr"), source, tapped)


def test_gradient_checkpointing_and_accumulation_change_no_result(tiny_config: MakeConfig, tmp_path: Path) -> None:
    rows = []
    for override in ("train.grad_checkpointing=false", "train.grad_checkpointing=true", "train.grad_accumulation=4"):
        config = tiny_config("methods=[full]", override, f"run_dir={tmp_path}/run-{len(rows)}")
        rows.append(sc.run(config)[0])
    assert len({row.trial_id for row in rows}) == 3
    assert [row.val_score for row in rows] == [rows[0].val_score] * 3
    assert [row.top1 for row in rows] == [rows[0].top1] * 3


def test_mixup_and_a_rate_for_the_head_change_the_training(tiny_config: MakeConfig) -> None:
    tensors, known = [], set[str]()
    for overrides in ((), ("train.mixup=0.4",), ("train.head_lr=0.1",)):
        config = tiny_config("methods=[bitfit]", *overrides)
        (row,) = (row for row in sc.run(config) if row.trial_id not in known)
        known.add(row.trial_id)
        tensors.append(sc.load_adaptor(adaptor_path(config.run_dir, row)).model.readout.head.weight.clone())
    assert not torch.equal(tensors[0], tensors[1])
    assert (tensors[2] - tensors[0]).abs().max() > 0.01


def test_augmented_views_come_from_seed_epoch_and_row(tiny_config: MakeConfig) -> None:
    images = images_of(tiny_config(), augment=True)

    def pixels(seed: int, epoch: int, rows: list[int]) -> torch.Tensor:
        return next(images.for_epoch(seed, epoch).batches("train", [np.array(rows)], [2]))[1]

    first = pixels(0, 0, [4, 7])
    assert torch.equal(first, pixels(0, 0, [4, 7]))
    assert torch.equal(first[1], pixels(0, 0, [7])[0])
    assert not torch.equal(first, pixels(0, 1, [4, 7]))
    assert not torch.equal(first, pixels(1, 0, [4, 7]))
    plain = images_of(tiny_config())
    assert plain.for_epoch(0, 0) is plain


@pytest.mark.parametrize(("width", "height"), [(400, 300), (30, 300), (7, 5)])
def test_random_boxes_lie_in_the_image(width: int, height: int) -> None:
    draw = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        left, upper, right, lower = random_box(width, height, draw)
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= upper < lower <= height + 1e-9
        shares.append((right - left) * (lower - upper) / (width * height))
    assert min(shares) < 0.3
    assert max(shares) > 0.6


def test_an_augmented_image_has_the_backbones_size_and_normalization(tiny_backbone: TimmBackbone) -> None:
    gray = Image.new("RGB", (50, 40), (128, 128, 128))
    view = tiny_backbone.augment(gray, np.random.default_rng(0))
    assert view.shape == (3, 32, 32)
    torch.testing.assert_close(view, tiny_backbone.transform(gray))


def test_half_of_the_views_are_flipped() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    augment = Augment({"input_size": (3, 16, 16), "interpolation": "bilinear", "mean": (0.0,) * 3, "std": (1.0,) * 3})
    views = [augment(ramp, np.random.default_rng(seed)) for seed in range(200)]
    rising = sum(bool(view[0, 8, -1] > view[0, 8, 0]) for view in views)
    assert 70 < rising < 130
