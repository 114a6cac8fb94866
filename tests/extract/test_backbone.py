"""Backbones: token layouts, tokens by layer, the pre-logits features, and users' own modules."""

import doctest
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from tiny_vit import TINY
from torch import Tensor, nn

import sidecache as sc
from extract.backbones import tapped_backbone
from extract.backbones.backbone import TappedBackbone, TimmBackbone, digests, empty_backbone, load_backbone
from extract.config import BackboneConfig, ExtractConfig
from extract.forward.frozen_forward import FrozenForward
from store.errors import Note, UserError
from store.layout import TokenLayout


def shape(name: str, **kwargs: Any) -> TimmBackbone:
    """Without weights, on the meta device."""
    return empty_backbone(name, kwargs)


def small(name: str, **kwargs: Any) -> TimmBackbone:
    """With random weights, and few of them."""
    return load_backbone(BackboneConfig(name=name, weights="random", model_kwargs=kwargs))


# Layouts


@pytest.mark.parametrize(
    ("name", "depth", "dim", "prefix", "classes", "grid"),
    [
        ("vit_base_patch16_224", 12, 768, 1, 1, (14, 14)),
        ("vit_giant_patch14_224", 40, 1408, 1, 1, (16, 16)),
        ("vit_small_patch14_reg4_dinov2", 12, 384, 5, 1, (37, 37)),
        ("vit_mediumd_patch16_reg4_gap_256", 20, 512, 4, 0, (16, 16)),
        ("deit_tiny_distilled_patch16_224", 12, 192, 2, 2, (14, 14)),
        ("vit_base_patch16_siglip_224", 12, 768, 0, 0, (14, 14)),
        ("eva02_tiny_patch14_224", 12, 192, 1, 1, (16, 16)),
        ("beit_base_patch16_224", 12, 768, 1, 1, (14, 14)),
        ("vit_base_patch16_clip_224", 12, 768, 1, 1, (14, 14)),
        ("vit_small_patch16_dinov3", 12, 384, 5, 1, (16, 16)),
    ],
)
def test_depth_width_and_layout_of_known_models(
    name: str, depth: int, dim: int, prefix: int, classes: int, grid: Any
) -> None:
    backbone = shape(name)
    assert (backbone.depth, backbone.dim, backbone.layout) == (
        depth,
        dim,
        TokenLayout(prefix, grid, num_class_tokens=classes),
    )
    assert all(tensor.is_meta for tensor in backbone.module.parameters())


def test_the_giant_has_257_tokens() -> None:
    assert shape("vit_giant_patch14_224").layout.num_tokens == 1 + 16 * 16


@pytest.mark.parametrize("size", [[32, 64], 48])
def test_a_size_among_model_kwargs_reaches_layout_and_transform(size: Any) -> None:
    backbone = small("vit_tiny_patch16_224", **TINY, img_size=size)
    height, width = size if isinstance(size, list) else (size, size)
    assert backbone.layout == TokenLayout(1, (height // 8, width // 8), num_class_tokens=1)
    pixels = backbone.transform(Image.new("RGB", (100, 50)))
    assert pixels.shape == (3, height, width) == backbone.image_size
    assert backbone.tokens(pixels[None], [2])[2].shape == (1, backbone.layout.num_tokens, 32)


# Taps and tail

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit mean with fc_norm": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "fc_norm": True}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}),
    "siglip attention pool": ("vit_base_patch16_siglip_224", SMALL),
    "clip": ("vit_base_patch16_clip_224", SMALL),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "eva02 mean with fc_norm": ("eva02_tiny_patch14_224", SMALL | {"img_size": 56, "embed_dim": 64}),
    "beit": ("beit_base_patch16_224", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", SMALL | {"embed_dim": 64}),
}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> TimmBackbone:
    name, kwargs = request.param
    backbone = small(name, **kwargs)
    torch.manual_seed(0)
    for tensor in backbone.module.parameters():  # so that no norm or scale is at its initial value
        tensor.add_(0.05 * torch.randn_like(tensor))
    return TimmBackbone(backbone.name, kwargs, backbone.module, None)


def pixels_for(backbone: TimmBackbone) -> Tensor:
    return torch.randn(2, *backbone.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_tokens_are_what_the_blocks_return(family: TimmBackbone) -> None:
    seen: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda *call, layer=layer: seen.update({layer: call[2]}))
        for layer, block in enumerate(family.module.blocks)
    ]
    pixels = pixels_for(family)
    family.module.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    tokens = family.tokens(pixels, [0, 1, 2])
    assert list(tokens) == [0, 1, 2]
    for layer, values in tokens.items():
        assert values.shape == (2, family.layout.num_tokens, family.dim)
        assert torch.equal(values, seen[layer])


@torch.no_grad()
def test_layers_may_be_asked_for_in_any_order(family: TimmBackbone) -> None:
    pixels = pixels_for(family)
    straight, turned = family.tokens(pixels, [0, 2]), family.tokens(pixels, [2, 0])
    assert all(torch.equal(straight[layer], turned[layer]) for layer in (0, 2))


@torch.no_grad()
def test_blocks_after_the_last_layer_are_not_run(family: TimmBackbone) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(family.module.blocks)
    ]
    family.tokens(pixels_for(family), [0, 1])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


@torch.no_grad()
def test_the_tail_pools_as_timm_does(family: TimmBackbone) -> None:
    pixels = pixels_for(family)
    features = family.module.forward_features(pixels)
    expected = family.module.forward_head(features, pre_logits=True)
    last = family.tokens(pixels, [family.depth - 1])[family.depth - 1]
    assert family.tail is not None
    torch.testing.assert_close(family.tail.pool(family.tail.normalize(last)), expected, rtol=1e-5, atol=1e-5)


def test_tokens_come_out_as_float32_under_autocast(tiny_backbone: TimmBackbone) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    exact = FrozenForward(tiny_backbone, [0, 2], "all", ExtractConfig(device="cpu"))(pixels)
    mixed = FrozenForward(tiny_backbone, [0, 2], "all", ExtractConfig(device="cpu", precision="bfloat16"))(pixels)
    for layer in (0, 2):
        assert mixed[layer].dtype == torch.float32
        assert not torch.equal(mixed[layer], exact[layer])
        torch.testing.assert_close(mixed[layer], exact[layer], rtol=0.1, atol=0.1)
        assert not mixed[layer].requires_grad


# A user's own module


class Net(nn.Module):
    """Two stages over the eight columns of an 8 x 8 image, as eight tokens of 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


def tap(net: nn.Module, images: Tensor) -> Mapping[int, Tensor]:
    first = net.first(images[:, 0]).relu()
    return {0: first, 1: net.second(first)}


def tapped(**kwargs: Any) -> TappedBackbone:
    return TappedBackbone(Net(), **({"tap": tap, "example": torch.zeros(1, 8, 8), "name": "net"} | kwargs))


def stripes(count: int) -> list[tuple[Tensor, int]]:
    """Bright rows of one class, bright columns of the other."""
    draw = torch.Generator().manual_seed(count)
    pairs = []
    for row in range(count):
        image = 0.1 * torch.rand(1, 8, 8, generator=draw)
        image[0, :: 2 if row % 2 else 1, :: 1 if row % 2 else 2] += 1
        pairs.append((image, row % 2))
    return pairs


@pytest.fixture
def own_config(tmp_path: Path) -> sc.Config:
    return sc.load_config(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"val_fraction": 0.25},
            "backbone": {"weights": "random"},
            "store": {"path": str(tmp_path / "cache.zarr"), "dtype": "float32"},
            "train": {"epochs": 3, "batch_size": 8, "seeds": [0], "lr": 0.01},
            "methods": ["linear_probe", {"name": "losa", "rank": 2, "token_rank": 2}],
        }
    )


def test_the_example_in_the_documentation_runs() -> None:
    results = doctest.testmod(tapped_backbone)
    assert results.attempted > 0
    assert results.failed == 0


def test_an_unknown_option_of_the_layout_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'prefix'"):
        tapped(prefix=1)


def test_a_users_module_and_datasets_work_end_to_end(own_config: sc.Config) -> None:
    source = sc.from_datasets({"train": stripes(24), "test": stripes(8)}, classes=["rows", "columns"])
    extraction = sc.extract(own_config, source, tapped())
    store = extraction.store
    assert (store.layers, store.num_samples("train"), store.schema.dataset) == ((0, 1), 24, "dataset")
    expected = tap(Net(), torch.stack([image for image, _ in stripes(24)]))
    for layer, values in store.read("train", slice(None)).items():
        torch.testing.assert_close(torch.from_numpy(values), expected[layer].detach(), rtol=1e-5, atol=1e-6)
    model = sc.create_model("losa", store, 2, rank=2)
    assert model({k: torch.from_numpy(v) for k, v in store.read("train", [0, 1]).items()}).shape == (2, 2)
    rows = sc.train(own_config, source, tapped())
    assert [row.method for row in rows] == ["linear_probe", "losa"]
    assert {row.backbone for row in rows} == {"net"}
    online = own_config.model_copy(
        update={
            "train": own_config.train.model_copy(update={"feature_source": "online"}),
            "run_dir": own_config.run_dir / "online",
        }
    )
    assert [row.top1 for row in sc.run(online, source, tapped())] == [row.top1 for row in rows]


def test_the_weights_of_a_users_module_identify_it(own_config: sc.Config) -> None:
    source = sc.from_datasets({"train": stripes(24), "test": stripes(8)}, classes=["rows", "columns"])
    scaled = [tapped(transform=lambda sample: 2 * sample) for _ in range(2)]
    assert scaled[0].preprocessing == scaled[1].preprocessing
    sc.extract(own_config, source, scaled[0])
    assert sc.extract(own_config, source, scaled[1]).shards_written == 0
    other = tapped(transform=scaled[0].transform)
    other.module.first.bias.data[0] += 1
    with pytest.raises(UserError, match=r"provenance\.weights_digest: stored"):
        sc.extract(own_config, source, other)


def scaled_tap(net: nn.Module, images: Tensor) -> Mapping[int, Tensor]:
    return {layer: 2 * values for layer, values in tap(net, images).items()}


def tap_in_float32(net: nn.Module, images: Tensor) -> Mapping[int, Tensor]:
    return tap(net, images.float())


def test_another_tap_or_transform_is_another_backbone(own_config: sc.Config) -> None:
    source = sc.from_datasets({"train": stripes(24), "test": stripes(8)}, classes=["rows", "columns"])
    sc.extract(own_config, source, tapped())
    with pytest.raises(UserError, match=r"provenance\.weights_digest: stored '\w+, read by tap \w+', wanted"):
        sc.extract(own_config, source, tapped(tap=scaled_tap))
    with pytest.raises(UserError, match=r"provenance\.preprocessing_digest: stored"):
        sc.extract(own_config, source, tapped(transform=lambda sample: 2 * sample))
    assert sc.extract(own_config, source, tapped(example=torch.randn(1, 8, 8))).shards_written == 0


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        ({"num_prefix_tokens": 2, "num_class_tokens": 2}, "num_class_tokens: stored 1, wanted 2"),
        ({"num_prefix_tokens": 1, "num_class_tokens": 1}, "num_prefix_tokens: stored 2, wanted 1"),
        ({"num_prefix_tokens": 2, "num_class_tokens": 1, "grid": (2, 3)}, r"grid: stored \(1, 6\), wanted \(2, 3\)"),
    ],
)
def test_another_layout_of_the_same_tokens_is_another_backbone(
    own_config: sc.Config, layout: dict[str, Any], field: str
) -> None:
    source = sc.from_datasets({"train": stripes(24), "test": stripes(8)}, classes=["rows", "columns"])
    sc.extract(own_config, source, tapped(num_prefix_tokens=2, num_class_tokens=1))
    with pytest.raises(UserError, match=rf"made from something else:[^$]*\n  {field}"):
        sc.extract(own_config, source, tapped(**layout))


TRANSFORMS: dict[str, Any] = {
    "of images": lambda image: torch.ones(1, 8, 8) * image.width,
    "scaled": lambda sample: sample * 100.0,
    "as it is": lambda sample: sample * 1.0,
    "cut off": lambda sample: sample.clamp(0, 1),
    "no attribute of an image": lambda sample: sample.float() + 1,
    "centered": lambda sample: sample - sample.mean(),
    "of neither": lambda sample: sample["pixels"],
    "of neither, scaled": lambda sample: sample["pixels"] * 100.0,
}


def test_transforms_of_any_kind_have_their_own_stable_digest() -> None:
    first, second = ([digests(tapped(transform=t))["preprocessing_digest"] for t in TRANSFORMS.values()] for _ in "ab")
    assert first == second
    assert len(set(first)) == len(TRANSFORMS)


@pytest.mark.parametrize("one", [tap, tap_in_float32])
def test_the_digest_of_a_tap_tolerates_rounding_only(one: Any) -> None:
    def rounded(net: nn.Module, images: Tensor) -> Mapping[int, Tensor]:
        return {layer: values * (1 + 1e-7) for layer, values in one(net, images).items()}

    def other(net: nn.Module, images: Tensor) -> Mapping[int, Tensor]:
        return {layer: values.roll(1, dims=1) if layer else values for layer, values in one(net, images).items()}

    known, same, changed = (tapped(tap=each).tap_digest() for each in (one, rounded, other))
    assert known == same != changed


def test_images_of_a_dataset_reach_the_transform_as_rgb(tiny_backbone: TimmBackbone) -> None:
    gray = Image.new("L", (40, 30), 77)
    source = sc.from_datasets({"train": [(gray, 0), (gray, 1)], "test": [(gray, 0)]}, classes=["a", "b"])
    assert source.splits["train"][0].mode == "RGB"
    assert tiny_backbone.transform(source.splits["train"][0]).shape == (3, 32, 32)


def test_digests_tell_images_apart_that_differ_in_16_bits() -> None:
    pairs = [(Image.new("I;16", (4, 4), value), 0) for value in (1000, 1001)]
    split = sc.from_datasets({"train": pairs, "test": pairs}, classes=["a", "b"]).splits["train"]
    assert split.digest(0) != split.digest(1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda _, x: {}, r"one \(batch, tokens, dim\) shape for every layer, got \[\]"),
        (lambda _, x: {0: x}, r"one \(batch, tokens, dim\) shape for every layer, got \[\(1, 8, 8\)\]"),
        (lambda _, x: {0: x[:, 0], 1: x[:, 0, :4]}, r"got \[\(4, 8\), \(8, 8\)\]"),
    ],
)
def test_a_tap_of_wrong_shapes_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tapped(tap=returned)


@pytest.mark.parametrize("key", [-1, "last", 0.5])
def test_a_tap_of_other_keys_than_layers_is_refused(key: Any) -> None:
    with pytest.raises(UserError, match="tap must return tokens by layer index, from 0 on"):
        tapped(tap=lambda net, x: {key: tap(net, x)[1]})


def test_a_layout_that_does_not_fit_the_tap_is_refused() -> None:
    layout = TokenLayout(2, (2, 3), num_class_tokens=1)
    assert tapped(num_prefix_tokens=2, num_class_tokens=1, grid=(2, 3)).layout == layout
    with pytest.raises(UserError, match=r"tap returned 8 tokens, but .* has 9"):
        tapped(grid=(3, 3))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"num_prefix_tokens": 2}, "num_prefix_tokens is 2: say how many of these are class tokens; .*: 0 to 2$"),
        ({"num_prefix_tokens": 2, "num_class_tokens": 3}, "0 to num_prefix_tokens class tokens"),
        ({"num_class_tokens": 1}, "0 to num_prefix_tokens class tokens"),
        ({"num_prefix_tokens": 9, "num_class_tokens": 1}, "at least one patch a side"),
    ],
)
def test_prefix_tokens_of_unknown_meaning_are_refused(layout: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tapped(**layout)


def test_registers_of_a_users_module_are_no_class_tokens() -> None:
    """Neither by default, nor by `cls` if there is a class token before the registers."""
    registers, both = tapped(num_prefix_tokens=2, num_class_tokens=0), tapped(num_prefix_tokens=2, num_class_tokens=1)
    tokens = torch.randn(3, 8, 8)
    assert torch.equal(pooled(registers, "auto", tokens), tokens[:, 2:].mean(dim=1))
    assert torch.equal(pooled(both, "cls", tokens), tokens[:, 0])
    with pytest.raises(UserError, match=r"pool 'cls' is not available: .*; legal: mean, flatten$"):
        pooled(registers, "cls", tokens)
    with pytest.raises(UserError, match="pool 'backbone' is not available: this backbone has no pooling of its own"):
        pooled(registers, "backbone", tokens)


def pooled(backbone: TappedBackbone, pool: str, tokens: Tensor) -> Tensor:
    readout: Any = sc.create_model("linear_probe", backbone, 2, pool=pool).readout
    result: Tensor = readout.pool(tokens)
    return result


def test_a_layer_that_the_tap_lacks_is_refused() -> None:
    backbone = tapped(tap=lambda net, x: {3: tap(net, x)[1]})
    assert backbone.depth == 4
    with pytest.raises(UserError, match=r"tap returned layers \[3\], not \[0\]"):
        backbone.tokens(torch.zeros(1, 1, 8, 8), [0, 3])


@pytest.mark.parametrize("label", [2, -1, 0.5, "a", None, [0, 1, 0], [0, 2], [0.5, 0], [[0], [1]]])
def test_a_label_that_is_none_of_the_classes_is_refused(label: Any) -> None:
    image = torch.zeros(1, 8, 8)
    with pytest.raises(UserError, match=r"the label of train/00000001 is .*legal: a class index from 0 to 1, or 2 num"):
        sc.from_datasets({"train": [(image, 0), (image, label)], "test": [(image, 0)]}, classes=["a", "b"])


def test_labels_may_be_vectors_over_the_classes() -> None:
    image = torch.zeros(1, 8, 8)
    train = [(image, torch.tensor([1.0, 0.0])), (image, [1, 1]), (image, (False, False))]
    source = sc.from_datasets({"train": train, "test": train}, classes=["a", "b"])
    assert source.multi_label
    assert source.splits["train"].labels.tolist() == [[1, 0], [1, 1], [0, 0]]


def test_datasets_of_another_form_are_refused() -> None:
    image = torch.zeros(1, 8, 8)
    good, vector = [(image, 0)], [(image, [0, 1])]
    for datasets, classes, message in (
        ({"train": good}, ["a", "b"], "a non-empty `train` and a non-empty `test`, got {'train': 1}"),
        ({"train": good, "test": []}, ["a", "b"], "got {'train': 1, 'test': 0}"),
        ({"train": good, "test": vector}, ["a", "b"], "the labels of train and test are of two kinds"),
        ({"train": good + vector, "test": good}, ["a", "b"], "class indices in some samples and 0/1 vectors in others"),
        ({"train": [image], "test": good}, ["a", "b"], r"a dataset must yield \(sample, label\) pairs"),
        ({"train": good, "test": good}, ["a"], "classes must be at least two different names"),
        ({"train": good, "test": good}, ["a", "a"], "classes must be at least two different names"),
    ):
        with pytest.raises(UserError, match=message):
            sc.from_datasets(datasets, classes=classes)


# Models by name, store and backbone


def test_a_model_is_built_from_a_name_or_a_backbone_alike(tiny_backbone: TimmBackbone) -> None:
    by_name = sc.create_model("losa", "vit_tiny_patch16_224", 10, rank=4, token_rank=2, layers={"every": 6})
    assert by_name.layers == (5, 11)
    tokens = {layer: torch.randn(2, 197, 192) for layer in (5, 11)}
    assert by_name(tokens).shape == (2, 10)
    by_backbone = sc.create_model("losa", tiny_backbone, 10, rank=4, layers=[0, 2])
    assert by_backbone({layer: torch.randn(2, 17, 32) for layer in (0, 2)}).shape == (2, 10)
    assert {tensor.device.type for tensor in by_name.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "losa: rank: given 0; input should be greater than or equal to 1"),
        ({"rnk": 4}, "losa: rnk: unknown key; legal keys here: rank, token_rank, start, "),
        ({"layers": "some"}, r"losa: layers: given 'some'; legal: auto, all, a list such as"),
        ({"layers": [3]}, r"layers \[3\] do not exist: this backbone has 3, numbered 0 to 2"),
        ({"dropout": 1.0}, "losa: dropout: given 1.0; input should be less than 1"),
        (
            {"pool": "max"},
            "losa: pool: given 'max'; input should be 'auto', 'cls', 'mean', 'cls_mean', 'flatten' or 'backbone'",
        ),
    ],
)
def test_options_of_a_model_are_checked(tiny_backbone: TimmBackbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sc.create_model("losa", tiny_backbone, 10, **options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_the_tail_of_a_model_by_name_is_initialized(name: str) -> None:
    model = sc.create_model("linear_probe", name, 2, pool="backbone")
    width = model.readout.head.in_features
    assert torch.isfinite(model({11: torch.randn(2, shape(name).layout.num_tokens, width)})).all()
    assert all(tensor.abs().max() < 2 for tensor in model.parameters())


def test_a_classifier_without_classes_is_refused(tiny_backbone: TimmBackbone) -> None:
    with pytest.raises(UserError, match="num_classes must be at least 1, got 0"):
        sc.create_model("losa", tiny_backbone, 0)


def test_an_unknown_method_or_backbone_is_refused(tiny_backbone: TimmBackbone) -> None:
    with pytest.raises(UserError, match="there is no method 'lossa'; legal: linear_probe, "):
        sc.create_model("lossa", tiny_backbone, 10)
    with pytest.raises(UserError, match="'vit_tinny' is no timm model; near ones: "):
        sc.create_model("losa", "vit_tinny", 10)


def test_the_same_backbone_has_the_same_digests() -> None:
    config = BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY)
    first, second = digests(load_backbone(config)), digests(load_backbone(config))
    bigger = digests(load_backbone(config.model_copy(update={"image_size": 40})))
    assert first == second
    assert first["preprocessing_digest"] != bigger["preprocessing_digest"]


def test_preprocessing_is_the_models_own(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    other = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY, pretrained_cfg_overlay={"mean": [0.1, 0.2, 0.3]}
    )
    one, two = (digests(TimmBackbone("vit", {}, m, None)) for m in (model, other))
    assert one["preprocessing_digest"] != two["preprocessing_digest"]


@pytest.mark.parametrize(("image_size", "unseen"), [(64, 0), (60, 4), (47, 7)])
def test_pixels_that_no_patch_sees_are_noted(image_size: int, unseen: int) -> None:
    config = BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=image_size, model_kwargs=TINY)
    with pytest.warns(Note, match=f"the last {unseen} of every row") if unseen else nullcontext():
        assert load_backbone(config).layout.grid == (image_size // 8, image_size // 8)
