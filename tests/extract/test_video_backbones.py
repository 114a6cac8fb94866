"""Tests video backbones (an image model on every frame, and ViViT), their readout and the reduction of their tokens."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vit import TINY
from torch import Tensor

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.in_backbone.tuned_backbone import TrainableBackbone
from adapt.methods.readout import Readout
from extract.backbones.backbone import (
    ModelBackbone,
    TimmBackbone,
    digests,
    empty_backbone,
    load_backbone,
    reduce_tokens,
)
from extract.backbones.frame_by_frame import FrameBackbone
from extract.backbones.pre_logits import pre_logits_from_arrays
from extract.backbones.vivit import VivitBackbone
from extract.backbones.vivit_preprocessing import build_vivit_transform, vivit_data_config
from extract.config import BackboneConfig, ClipConfig
from store.config import Pool, Tokens
from store.errors import JobError, UserError
from store.layout import TokenLayout, reduced_layout

transformers = pytest.importorskip("transformers")

FRAMES = 4
# 1 class token and a grid of 2 x 4 x 4
VIVIT = {
    "image_size": 32,
    "num_frames": FRAMES,
    "tubelet_size": [2, 8, 8],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
# The parameters of a layer as checkpoints name them, and as transformers' modules are called.
RENAMED = {
    "encoder.layer.": "layers.",
    "attention.query": "q_proj",
    "attention.key": "k_proj",
    "attention.value": "v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def open_vivit(weights: Path | str = "random", frames: int = FRAMES, **changes: Any) -> VivitBackbone:
    config = BackboneConfig(name="vivit", weights=str(weights), **changes)
    backbone = load_backbone(config, ClipConfig(frames=frames))
    assert isinstance(backbone, VivitBackbone)
    return backbone


def open_frames(name: str, frames: int = FRAMES, **kwargs: Any) -> FrameBackbone:
    config = BackboneConfig(name=name, weights="random", model_kwargs=kwargs)
    backbone = load_backbone(config, ClipConfig(frames=frames))
    assert isinstance(backbone, FrameBackbone)
    return backbone


def clips_for(backbone: ModelBackbone, count: int = 2) -> Tensor:
    return torch.randn(count, *backbone.image_size, generator=torch.Generator().manual_seed(0))


def disturb(module: torch.nn.Module) -> None:
    """Move every tensor away from its initial value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))


# An image backbone, frame by frame

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit mean with fc_norm": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "fc_norm": True}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}),
    "siglip attention pool": ("vit_base_patch16_siglip_224", SMALL),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "registers, no class token": ("vit_mediumd_patch16_reg4_gap_256", SMALL),
    "attention pool over patches and registers": ("test_vit3", SMALL),
}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def framed(request: pytest.FixtureRequest) -> FrameBackbone:
    name, kwargs = request.param
    image = load_backbone(BackboneConfig(name=name, weights="random", model_kwargs=kwargs))
    assert isinstance(image, TimmBackbone)
    disturb(image.module)
    return FrameBackbone(TimmBackbone(name, kwargs, image.module, None), FRAMES)


def blocks_of(model: Any, images: Tensor) -> list[Tensor]:
    """The output of every block of a timm model."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in model.blocks]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
def test_the_tokens_of_a_clip_are_those_of_its_frames(framed: FrameBackbone) -> None:
    clips, prefix = clips_for(framed), framed.block_layout.num_prefix_tokens
    assert framed.layout == TokenLayout(
        FRAMES * prefix,
        (FRAMES, *framed.block_layout.grid),
        FRAMES,
        num_class_tokens=FRAMES * framed.block_layout.num_class_tokens,
    )
    expected = blocks_of(framed.module, clips.flatten(0, 1))
    tokens = framed.tokens(clips, [0, 2])
    assert list(tokens) == [0, 2]
    patches = framed.block_layout.num_patches
    for layer, values in tokens.items():
        assert values.shape == (2, framed.layout.num_tokens, framed.dim)
        for sample in range(2):
            for frame in range(FRAMES):
                block = expected[layer][sample * FRAMES + frame]
                start = FRAMES * prefix + frame * patches
                assert torch.equal(values[sample, frame * prefix : (frame + 1) * prefix], block[:prefix])
                assert torch.equal(values[sample, start : start + patches], block[prefix:])


@torch.no_grad()
def test_the_read_out_is_the_mean_of_the_frames_read_outs(framed: FrameBackbone) -> None:
    clips = clips_for(framed)
    features = framed.module.forward_features(clips.flatten(0, 1))
    expected = framed.module.forward_head(features, pre_logits=True).reshape(2, FRAMES, -1).mean(dim=1)
    last = framed.tokens(clips, [2])[2]
    assert framed.tail is not None
    torch.testing.assert_close(framed.tail.pool(framed.tail.normalize(last)), expected, rtol=1e-5, atol=1e-5)
    stored = pre_logits_from_arrays(framed.name, framed.model_kwargs, framed.tail.arrays(), prefix_sets=FRAMES)
    torch.testing.assert_close(stored.pool(stored.normalize(last)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cls", Pool(time=2), Pool(pool=2)])
def test_reduced_tokens_of_frames_are_still_read_out(how: Tokens) -> None:
    backbone = open_frames("vit_small_patch14_reg4_dinov2", **SMALL | {"img_size": 56})
    tokens = backbone.tokens(clips_for(backbone), [2])[2]
    layout = reduced_layout(backbone.layout, how)
    assert backbone.tail is not None
    tail = pre_logits_from_arrays(backbone.name, backbone.model_kwargs, backbone.tail.arrays(), layout.prefix_sets)
    normalized = tail.normalize(reduce_tokens(tokens, backbone.layout, how))
    per_set = layout.num_prefix_tokens // layout.prefix_sets
    firsts = [normalized[:, number * per_set] for number in range(layout.prefix_sets)]
    expected = torch.stack(firsts).mean(dim=0)  # this backbone reads its class token
    torch.testing.assert_close(tail.pool(normalized), expected)
    assert torch.equal(backbone.tail.for_sets(layout.prefix_sets).pool(normalized), tail.pool(normalized))
    assert backbone.tail.prefix_sets == FRAMES


def test_a_clip_is_prepared_as_its_frames_are(tiny_backbone: TimmBackbone) -> None:
    backbone = open_frames("vit_tiny_patch16_224", **TINY, img_size=32)
    assert backbone.image_size == (FRAMES, 3, 32, 32)
    assert digests(backbone)["preprocessing_digest"] == digests(tiny_backbone)["preprocessing_digest"]
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    one, other = (model.augment(frame, np.random.default_rng(3)) for model in (backbone, tiny_backbone))
    assert torch.equal(one, other)


@torch.no_grad()
def test_frames_of_a_real_clip_give_what_real_weights_give_on_each(real_data: Path) -> None:
    av = pytest.importorskip("av")
    weights = real_data / "weights" / "vit_tiny_patch16_224_imagenet1k.safetensors"
    config = BackboneConfig(name="vit_tiny_patch16_224", weights=str(weights))
    image, clip = load_backbone(config), load_backbone(config, ClipConfig(frames=2))
    path = next((real_data / "videos" / "drone_vs_bird_cc0").glob("*/*.mp4"))
    with av.open(str(path)) as container:
        pictures = [frame.to_image() for frame, _ in zip(container.decode(video=0), range(2), strict=False)]
    frames = torch.stack([torch.as_tensor(clip.transform(picture)) for picture in pictures])
    prefix, patches = clip.tokens(frames[None], [11])[11].tensor_split([2], dim=1)
    for number, frame in enumerate(frames):
        expected = image.tokens(frame[None], [11])[11][0]
        of_frame = torch.cat([prefix[0, number : number + 1], patches[0, number * 196 : (number + 1) * 196]])
        torch.testing.assert_close(of_frame, expected, rtol=1e-4, atol=1e-4)


# ViViT


@pytest.fixture(scope="module")
def vivit() -> VivitBackbone:
    backbone = open_vivit(model_kwargs=VIVIT)
    disturb(backbone.module)
    return VivitBackbone(backbone.module, {})


@torch.no_grad()
def test_vivits_tokens_are_transformers_hidden_states(vivit: VivitBackbone) -> None:
    clips = clips_for(vivit)
    states = vivit.module(clips, output_hidden_states=True).hidden_states  # the first are the embeddings
    tokens = vivit.tokens(clips, [2, 0, 1])
    assert list(tokens) == [0, 1, 2]
    for layer, values in tokens.items():
        assert values.shape == (2, vivit.layout.num_tokens, vivit.dim)
        assert torch.equal(values, states[layer + 1])


@torch.no_grad()
def test_vivits_grid_is_time_then_height_then_width(vivit: VivitBackbone) -> None:
    assert vivit.layout == vivit.block_layout == TokenLayout(1, (2, 4, 4), num_class_tokens=1)
    clips = torch.zeros(2, *vivit.image_size)
    clips[1, 2:4, :, 8:16, 24:32] = 1.0  # the second tubelet in time, row 1, column 3
    embedded = vivit.module.embeddings(clips)
    changed = (embedded[0] != embedded[1]).any(dim=-1).nonzero().flatten().tolist()
    assert changed == [1 + 1 * 16 + 1 * 4 + 3]


@torch.no_grad()
def test_layers_after_the_last_are_not_run(vivit: VivitBackbone) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(vivit.module.layers)
    ]
    vivit.tokens(clips_for(vivit), [1])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


@torch.no_grad()
def test_vivits_read_out_is_what_its_classifier_reads(vivit: VivitBackbone) -> None:
    clips = clips_for(vivit)
    expected = vivit.module(clips).last_hidden_state[:, 0]
    last = vivit.tokens(clips, [2])[2]
    assert vivit.tail is not None
    assert torch.equal(vivit.tail.pool(vivit.tail.normalize(last)), expected)
    stored = pre_logits_from_arrays(vivit.name, vivit.model_kwargs, vivit.tail.arrays())
    assert torch.equal(stored.pool(stored.normalize(last)), expected)


def test_random_weights_are_the_same_in_every_process(vivit: VivitBackbone) -> None:
    first, again = open_vivit(model_kwargs=VIVIT), open_vivit(model_kwargs=VIVIT)
    assert digests(first) == digests(again)
    assert digests(first)["weights_digest"] != digests(vivit)["weights_digest"]


def test_the_architecture_is_built_again_from_what_a_store_keeps(vivit: VivitBackbone) -> None:
    kept = json.loads(json.dumps(vivit.model_kwargs))
    empty = empty_backbone("vivit", kept, FRAMES)
    assert kept == VIVIT
    assert (empty.depth, empty.dim, empty.layout, empty.image_size) == (3, 32, vivit.layout, vivit.image_size)
    assert {name: tensor.shape for name, tensor in empty.module.state_dict().items()} == {
        name: tensor.shape for name, tensor in vivit.module.state_dict().items()
    }


def test_vivit_b_and_vivit_e_have_the_sizes_of_the_papers() -> None:
    base = empty_backbone("vivit", {})
    assert (base.depth, base.dim, base.layout) == (12, 768, TokenLayout(1, (16, 14, 14), num_class_tokens=1))
    enormous = empty_backbone(
        "vivit",
        {"hidden_size": 1792, "num_hidden_layers": 56, "num_attention_heads": 16, "intermediate_size": 15360},
    )
    assert sum(tensor.numel() for tensor in enormous.module.parameters()) == 3_812_281_088
    assert all(tensor.is_meta for tensor in enormous.module.parameters())
    clips = torch.zeros(1, *enormous.image_size, device="meta")
    assert enormous.tokens(clips, [55])[55].shape == (1, 1 + 16 * 14 * 14, 1792)


# Both


@pytest.fixture(params=["frames", "vivit"])
def either(request: pytest.FixtureRequest) -> ModelBackbone:
    if request.param == "vivit":
        return open_vivit(model_kwargs=VIVIT)
    return open_frames("vit_tiny_patch16_224", **TINY, img_size=32)


@torch.no_grad()
def test_a_trainable_copy_is_the_first_blocks_in_a_module_of_its_own(either: ModelBackbone) -> None:
    assert isinstance(either, TrainableBackbone)
    clips = clips_for(either)
    before = either.tokens(clips, [1])[1]
    copied = either.trainable_copy(2)
    assert copied.layout == either.layout
    assert torch.equal(copied.tokens(clips, [1])[1], before)
    assert copied.tail is not None
    modules = set(copied.module.modules())
    assert copied.tail.model.norm in modules
    assert not modules & set(either.module.modules())
    assert not any(tensor.requires_grad for tensor in copied.module.parameters())
    disturb(copied.module)
    assert torch.equal(either.tokens(clips, [1])[1], before)
    assert either.tokens(clips, [2])[2].shape == before.shape


@torch.no_grad()
def test_cls_reads_the_mean_of_the_class_tokens(either: ModelBackbone) -> None:
    tokens = either.tokens(clips_for(either), [2])[2]
    assert either.tail is not None
    spec = FeatureSpec(layers=(2,), depth=either.depth, dim=either.dim, layout=either.layout, pre_logits=either.tail)
    readout = Readout(spec, 5, "cls")
    sets = either.layout.prefix_sets
    expected = torch.stack([tokens[:, number] for number in range(sets)]).sum(dim=0) / sets
    torch.testing.assert_close(readout.pool(tokens), expected)
    assert torch.equal(Readout(spec, 5, "mean").pool(tokens), tokens[:, either.layout.num_prefix_tokens :].mean(dim=1))


@pytest.mark.parametrize("registers", [0, 4])
def test_one_class_token_is_read_to_the_bit(tiny_backbone: TimmBackbone, registers: int) -> None:
    assert tiny_backbone.tail is not None
    layout = TokenLayout(1 + registers, (4, 4), num_class_tokens=1)
    spec = FeatureSpec(layers=(2,), depth=3, dim=32, layout=layout, pre_logits=tiny_backbone.tail)
    tokens = torch.randn(3, spec.layout.num_tokens, 32)
    assert torch.equal(Readout(spec, 5, "cls").pool(tokens), tokens[:, 0])


# Checkpoints of ViViT


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    digest: str

    def variant(self, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], pickled: bool) -> Path:
        """The same folder with other weights in it."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        state = change(load_file(self.folder / "model.safetensors"))
        if pickled:
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A classifier in the format of transformers, and the digest of its backbone."""
    torch.manual_seed(0)
    model = transformers.VivitForVideoClassification(transformers.VivitConfig(**VIVIT, num_labels=5))
    disturb(model)
    folder = tmp_path_factory.mktemp("vivit")
    model.save_pretrained(folder)
    return Checkpoint(folder, digests(VivitBackbone(model.vivit, {}))["weights_digest"])


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def with_module_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = renamed(state, RENAMED)
    assert "vivit.layers.0.attention.q_proj.weight" in result
    return result


def with_checkpoint_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names in google's checkpoints, for any version of transformers that saved them."""
    result = renamed(with_module_names(state), {new: old for old, new in RENAMED.items()})
    assert "vivit.encoder.layer.0.attention.attention.query.weight" in result
    return result


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vivit."): t for name, t in state.items() if not name.startswith("classifier")}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("change", [with_checkpoint_names, with_module_names, without_prefix])
def test_every_layout_of_a_checkpoint_gives_the_same_model(
    checkpoint: Checkpoint, tmp_path: Path, change: Any, pickled: bool
) -> None:
    backbone = open_vivit(checkpoint.variant(tmp_path / "other", change, pickled))
    assert digests(backbone)["weights_digest"] == checkpoint.digest
    assert backbone.model_kwargs == VIVIT
    assert not any(tensor.requires_grad for tensor in backbone.module.parameters())


def test_loading_says_nothing_and_changes_no_setting(checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str]) -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    assert digests(open_vivit(checkpoint.folder))["weights_digest"] == checkpoint.digest
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def lose_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    del state["vivit.layernorm.weight"]
    return state


def add_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"vivit.encoder.layer.9.output.dense.bias": torch.zeros(32)}


def shorten_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"vivit.layernorm.weight": torch.zeros(16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_one, r"missing \['layernorm.weight'\], unexpected \[\], of another shape \[\]"),
        (add_one, r"missing \[\], unexpected \['[\w.]*9[\w.]*bias'\], of another shape \[\]"),
        (shorten_one, r"missing \[\], unexpected \[\], of another shape \['layernorm.weight'\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=f"is not a checkpoint of this ViViT: {message}; check image_size"):
        open_vivit(checkpoint.variant(tmp_path / "other", change, False))


def test_a_checkpoint_at_another_image_size_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"of another shape \['embeddings.position_embeddings'\]; check image_size"):
        open_vivit(checkpoint.folder, image_size=48)


class Pickled:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was run",)


def test_weights_are_never_unpickled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint.variant(tmp_path / "other", lambda state: state | {"code": Pickled()}, True)
    with pytest.raises(UserError, match="does not load: Weights only load failed"):
        open_vivit(folder)


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights" * 10_000)  # a shorter file could not fill the model


def of_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_broken_card(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "does not load: Error while deserializing header"),
        (of_another_model, "holds a 'vit', no ViViT"),
        (without_weights, "does not load: Error no file named model.safetensors, or pytorch_model.bin"),
        (without_config, "has no config.json"),
        (with_broken_card, "does not load: Expecting property name"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint.folder, folder)
    harm(folder)
    with pytest.raises(UserError, match=f"{message}.*; legal for a ViViT: random, hf-hub:ORG/NAME such as") as refused:
        open_vivit(folder)
    assert "\n" not in str(refused.value)


def test_a_hub_out_of_reach_is_the_worlds_fault() -> None:
    with pytest.raises(JobError, match=r"'hf-hub:nobody/vivit' could not be fetched .*legal for a ViViT: random"):
        open_vivit("hf-hub:nobody/vivit")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_sise": 32}, "a ViViT has no 'hidden_sise'; legal: image_size, num_frames, tubelet_size,"),
        ({"num_labels": 3}, "a ViViT has no 'num_labels'; legal: "),
        ({"hidden_size": "wide"}, "no ViViT can be built with {'hidden_size': 'wide'}: .*expected int, got str"),
        ({"num_channels": 1}, "frames have 3 channels"),
        ({"num_frames": 1}, r"at least one tubelet \(2, 16, 16\) must fit into 1 frames of \(224, 224\) pixels"),
        ({"num_frames": 16}, "this ViViT takes 16 frames; set data.video.frames: 16"),
        ({"num_frames": FRAMES, "hidden_act": "none"}, "transformers cannot build this ViViT: KeyError: 'none'"),
    ],
)
def test_wrong_fields_of_a_vivit_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_vivit(model_kwargs=kwargs)
    if "data.video" not in message:
        with pytest.raises(UserError, match=message):
            empty_backbone("vivit", kwargs)


def test_a_vivit_takes_no_images() -> None:
    with pytest.raises(UserError, match=r"vivit takes videos, but the samples are images; set data\.source to video_"):
        load_backbone(BackboneConfig(name="vivit", weights="random"))


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("no_transformers")
def test_only_a_vivit_needs_transformers(checkpoint: Checkpoint) -> None:
    assert open_frames("vit_tiny_patch16_224", **TINY, img_size=32).layout.num_tokens == FRAMES * 17
    for weights in ("random", checkpoint.folder):
        with pytest.raises(UserError, match=r"install it with: pip install 'sidecache\[video\]'"):
            open_vivit(weights, model_kwargs=VIVIT)


# Preprocessing of ViViT


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colors with sharp edges and some noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / 17 + y / 29), 255 * x / width, 255 * ((x // 40 + y // 40) % 2)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return Image.fromarray((np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8))


def assert_same_pixels(card: dict[str, Any], picture: Image.Image) -> None:
    """Compare with transformers: both resize 8-bit pixels with Pillow, so only float32 rounding may differ.

    A pixel rounded to another 8-bit value would differ by a whole step, which is at least 1/255.
    """
    processor = transformers.VivitImageProcessor(**card)
    expected = torch.from_numpy(np.asarray(processor(picture)["pixel_values"][0][0]))
    size = processor.crop_size["height"], processor.crop_size["width"]
    config = vivit_data_config(processor.to_dict(), size)
    torch.testing.assert_close(build_vivit_transform(config)(picture), expected.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "card",
    [
        {},
        {"do_normalize": False},
        {"offset": False, "rescale_factor": 1 / 255, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.23, 0.22, 0.21]},
        {"do_rescale": False, "offset": False, "do_normalize": False},
        {"size": {"shortest_edge": 67}, "crop_size": {"height": 61, "width": 61}, "resample": 3},
        {"size": {"height": 64, "width": 64}, "crop_size": {"height": 56, "width": 56}},
        {"size": {"height": 64, "width": 96}, "crop_size": {"height": 32, "width": 48}},
    ],
)
@pytest.mark.parametrize("side", [(320, 240), (240, 427), (1280, 720), (241, 331)])
def test_frames_are_prepared_as_transformers_does(card: dict[str, Any], side: tuple[int, int]) -> None:
    assert_same_pixels(card, photograph(*side))


def test_a_real_frame_is_prepared_as_transformers_does(real_data: Path) -> None:
    av = pytest.importorskip("av")
    path = next((real_data / "videos" / "drone_vs_bird_cc0").glob("*/*.mp4"))
    with av.open(str(path)) as container:
        assert_same_pixels({"do_normalize": False}, next(container.decode(video=0)).to_image())


def test_without_a_card_pixels_go_from_minus_one_to_one() -> None:
    config = vivit_data_config({}, (224, 224))
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bilinear")
    for value, expected in ((0, -1.0), (255, 1.0)):
        pixels = build_vivit_transform(config)(Image.new("RGB", (300, 260), (value,) * 3))
        torch.testing.assert_close(pixels, torch.full((3, 224, 224), expected))


@given(st.integers(8, 600), st.integers(0, 300))
def test_the_resized_side_is_found_again(crop: int, more: int) -> None:
    card = {"size": {"shortest_edge": crop + more}, "crop_size": {"height": crop, "width": crop}}
    share = vivit_data_config(card, (crop, crop))["crop_pct"]
    assert math.floor(crop / share) == crop + more  # as timm finds it
    assert share == pytest.approx(crop / (crop + more), rel=1e-15)


@pytest.mark.parametrize(
    "card",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 200}},
    ],
)
def test_preprocessing_that_cannot_be_said_is_refused(card: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"preprocessing is not supported: .*; legal: a resize, then a crop"):
        vivit_data_config(card, (224, 224))


def test_the_card_beside_the_weights_is_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = open_vivit(checkpoint.folder)
    folder = tmp_path / "other"
    shutil.copytree(checkpoint.folder, folder)
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    transformers.VivitImageProcessor(**size, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    other = open_vivit(folder)
    assert json.loads(other.preprocessing)["crop_pct"] == 0.8
    assert digests(plain)["preprocessing_digest"] != digests(other)["preprocessing_digest"]
    assert digests(plain)["weights_digest"] == digests(other)["weights_digest"]


# Fewer tokens


def sets_of(prefix_sets: int, per_set: int, grid: tuple[int, ...]) -> TokenLayout:
    return TokenLayout(prefix_sets * per_set, grid, prefix_sets, num_class_tokens=prefix_sets * min(per_set, 1))


def by_hand(tokens: np.ndarray, layout: TokenLayout, how: Pool) -> list[np.ndarray]:
    """The pooled tokens of one sample, computed with loops."""
    (frames, height, width), prefix = layout.grid, layout.num_prefix_tokens
    per_set = prefix // layout.prefix_sets
    kept = list(tokens[:prefix])
    if layout.prefix_sets > 1:
        kept = [
            np.mean([tokens[(start + frame) * per_set + number] for frame in range(how.time)], axis=0)
            for start in range(0, layout.prefix_sets, how.time)
            for number in range(per_set)
        ]
    for t in range(0, frames, how.time):
        for y in range(0, height, how.pool):
            for x in range(0, width, how.pool):
                members = [
                    tokens[prefix + ((t + dt) * height + y + dy) * width + x + dx]
                    for dt in range(how.time)
                    for dy in range(how.pool)
                    for dx in range(how.pool)
                ]
                kept.append(np.mean(members, axis=0))
    return kept


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_pooling_over_space_and_time_is_that_of_loops(
    m: int, k: int, frames: int, height: int, width: int, per_set: int, per_frame: bool
) -> None:
    if m == k == 1:
        return
    layout = sets_of(frames * m if per_frame else 1, per_set, (frames * m, height * k, width * k))
    tokens = np.random.default_rng(0).normal(size=(2, layout.num_tokens, 3))
    how = Pool(pool=k, time=m)
    reduced, after = reduce_tokens(torch.from_numpy(tokens), layout, how), reduced_layout(layout, how)
    assert after.grid == (frames, height, width)
    assert after.prefix_sets == (frames if per_frame else 1)
    assert reduced.shape == (2, after.num_tokens, 3)
    for sample in range(2):
        np.testing.assert_allclose(reduced[sample], by_hand(tokens[sample], layout, how), rtol=1e-6, atol=1e-9)


def test_cls_keeps_every_frames_class_token_and_mean_one_token() -> None:
    layout = sets_of(3, 2, (3, 2, 2))  # of every frame a class token and a register
    tokens = torch.arange(2 * 18.0).reshape(2, 18, 1)
    assert reduce_tokens(tokens, layout, "cls")[0].flatten().tolist() == [0, 2, 4]
    assert reduced_layout(layout, "cls") == sets_of(3, 1, ())
    assert reduce_tokens(tokens, layout, "mean")[0].flatten().tolist() == [tokens[0, 6:].mean()]
    assert reduced_layout(layout, "mean") == sets_of(1, 0, (1, 1, 1))
    assert reduce_tokens(tokens, layout, "cls_mean")[0].flatten().tolist() == [0, 2, 4, tokens[0, 6:].mean()]
    assert reduced_layout(layout, "cls_mean") == sets_of(3, 1, (1, 1, 1))


def test_factors_that_do_not_divide_name_those_that_do() -> None:
    layout = sets_of(1, 1, (8, 12, 6))
    with pytest.raises(UserError, match=r"pools by 4, which does not divide the grid \(12, 6\); legal: \[2, 3, 6\]"):
        reduced_layout(layout, Pool(pool=4))
    with pytest.raises(UserError, match=r"averages 3 frames, which does not divide the 8 .*: \[2, 4, 8\]"):
        reduced_layout(layout, Pool(time=3))
    with pytest.raises(UserError, match="averages 2 frames, but the samples are images; leave `time` out"):
        reduced_layout(sets_of(1, 1, (8, 8)), Pool(time=2, pool=2))
    for how in ("cls", "cls_mean"):
        with pytest.raises(
            UserError, match=rf"{how}.*no class token; legal here: all, mean, \{{pool: k\}}, \{{time: m"
        ):
            reduced_layout(sets_of(1, 0, (8, 8, 8)), how)
