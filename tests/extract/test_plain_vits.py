"""Each of timm's models gives the tokens of its blocks and its own pre-logits features, or is refused by its name."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import weight_init
from torch import Tensor, nn

import sidecache as sc
from adapt.config.pipeline import Config
from extract.backbones.backbone import TimmBackbone, empty_backbone, load_backbone
from extract.backbones.backbone_shape import backbone_shape
from extract.backbones.pre_logits import pre_logits_from_arrays
from extract.config import BackboneConfig, ClipConfig
from store.errors import UserError

# Arguments for the smallest model of an architecture; the first that it accepts are used.
TINY: list[dict[str, Any]] = [
    {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 112},
    {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 112},  # heads at least 32 wide
    {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 112, "num_kv_heads": 1},  # else one number a block
    {"depth": 2, "img_size": 112},  # as wide as its stem
    {"depth": 2, "img_size": 224},
]


@pytest.fixture(autouse=True)
def _leave_meta_tensors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing values for meta tensors, which takes half the time of building a model there."""
    draw = weight_init._trunc_normal_
    monkeypatch.setattr(weight_init, "_trunc_normal_", lambda t, *args: t if t.is_meta else draw(t, *args))


def smallest(name: str) -> dict[str, Any]:
    """The first of TINY that timm accepts for an architecture.

    Raises:
        UserError: the model is refused, or accepts none of them.
    """
    for kwargs in TINY[:-1]:
        with suppress(UserError):
            empty_backbone(name, kwargs)
            return kwargs
    empty_backbone(name, TINY[-1])
    return TINY[-1]


@torch.no_grad()
def open_disturbed(name: str, kwargs: dict[str, Any]) -> TimmBackbone:
    """A model on the CPU, with no norm or scale at its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **kwargs).eval().requires_grad_(False)
    for tensor in model.parameters():
        tensor.add_(0.05 * torch.randn_like(tensor))
    return TimmBackbone(name, kwargs, model, None)


@torch.no_grad()
def require_own_tokens_and_pre_logits(backbone: TimmBackbone) -> None:
    """Bit by bit: from the loaded model, and rebuilt from the tensors in a store."""
    model: Any = backbone.module
    outputs: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda *call, index=index: outputs.update({index: call[2]}))
        for index, block in enumerate(model.blocks)
    ]
    images = torch.randn(2, *backbone.image_size, generator=torch.Generator().manual_seed(1))
    features = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    tokens = backbone.tokens(images, range(backbone.depth))
    assert list(tokens) == list(outputs)
    assert [layer for layer in tokens if not torch.equal(tokens[layer], outputs[layer])] == []
    assert tokens[0].shape == (2, backbone.layout.num_tokens, backbone.dim)
    require_own_pre_logits(backbone, tokens[backbone.depth - 1], features)


def require_own_pre_logits(backbone: TimmBackbone, last: Tensor, features: Tensor) -> None:
    """Compare with timm, which computes `features` from the last block's tokens."""
    tail = backbone.tail
    assert tail is not None
    stored = pre_logits_from_arrays(backbone.name, json.loads(json.dumps(backbone.model_kwargs)), tail.arrays())
    try:
        expected = backbone.module.forward_head(features, pre_logits=True)  # type: ignore[operator]
    except NotImplementedError:  # an encoder
        expected = features
    for each in (tail, stored):
        assert torch.equal(each.normalize(last).reshape(features.shape), features)
        assert bool(each.unavailable) == (expected.shape != (2, backbone.dim))
        if not each.unavailable:
            assert torch.equal(each.pool(each.normalize(last)), expected)
            assert each.can_pool(backbone.layout)


@torch.no_grad()
def require_meaning_of_prefix(backbone: TimmBackbone) -> None:
    """Class tokens come first, then registers: a NaN parameter shows where each is."""
    model: Any = backbone.module
    given: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    places = dict[str, list[int]]()
    for name in ("cls_token", "dist_token", "reg_token"):
        places[name] = []
        if (parameter := getattr(model, name, None)) is not None:
            original = parameter.clone()
            parameter.fill_(torch.nan)
            model.forward_features(torch.zeros(1, *backbone.image_size))
            parameter.copy_(original)
            places[name] = given[-1].isnan().any(dim=2)[0].nonzero().flatten().tolist()
    hook.remove()
    classes = places["cls_token"] + places["dist_token"]
    assert classes == list(range(backbone.layout.num_class_tokens))
    assert classes + places["reg_token"] == list(range(backbone.layout.num_prefix_tokens))


def kind_of(backbone: TimmBackbone) -> tuple[Any, ...]:
    """What a model's tokens and pre-logits features depend on; one test per kind is enough."""
    model: Any = backbone.module
    parts = (model, model.blocks[0], *(getattr(model, part, None) for part in ("norm", "attn_pool", "fc_norm", "rope")))
    registers = backbone.layout.num_prefix_tokens - backbone.layout.num_class_tokens
    pooling = model.global_pool, getattr(model, "pool_include_prefix", False)
    return (*(type(part).__name__ for part in parts), *pooling, backbone.layout.num_class_tokens, registers > 0)


# The smallest model of every kind (see `kind_of`); the sweep below finds missing ones.
KINDS = [
    "aimv2_3b_patch14_224",
    "beit_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "eva02_enormous_patch14_clip_224",
    "eva02_large_patch14_clip_224",
    "eva02_small_patch14_224",
    "eva_giant_patch14_224",
    "eva_giant_patch14_clip_224",
    "eva_large_patch14_196",
    "qwen3_vit_88m_enc",
    "test_vit3",
    "test_vit4",
    "test_vit_relpos",
    "vit_5b_patch16_sapiens2",
    "vit_7b_patch16_dinov3",
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_lingbot",
    "vit_base_patch16_rope_mixed_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch8_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_huge_patch14_xp_224",
    "vit_intern300m_patch14_448",
    "vit_mediumd_patch16_rope_reg1_gap_256",
    "vit_pe_core_gigantic_patch14_448",
    "vit_pe_core_large_patch14_336",
    "vit_pe_lang_gigantic_patch14_448",
    "vit_pe_spatial_large_patch14_448",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_relpos_base_patch16_cls_224",
    "vit_relpos_base_patch16_clsgap_224",
    "vit_relpos_base_patch16_plus_240",
    "vit_relpos_base_patch16_rpn_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_so400m_patch14_reg1_tipsv2",
    "vit_so400m_patch14_siglip_224",
    "vit_so400m_patch14_siglip_gap_224",
    "vit_so400m_patch16_radio_v4",
    "vitamin_small_224",
]
LARGE_KINDS = ["deepseek_vit_412m_enc"]  # cannot be built small


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_model_gives_its_own_tokens_and_pre_logits(name: str) -> None:
    backbone = open_disturbed(name, smallest(name))
    require_own_tokens_and_pre_logits(backbone)
    require_meaning_of_prefix(backbone)


def refusal_of(name: str) -> str:
    """The message for a model at its own size, empty if it is accepted; any exception but UserError fails the test."""
    try:
        empty_backbone(name, {})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_all_of_timms_models_give_their_own_tokens_and_pre_logits_or_are_refused() -> None:
    """Each is built on the meta device at its own size; those that are accepted, on the CPU as small as possible."""
    accepted, names, kinds = 0, timm.list_models(), set[tuple[Any, ...]]()
    known = {kind_of(empty_backbone(name, smallest(name))) for name in KINDS + LARGE_KINDS}
    for name in names:
        if refusal := refusal_of(name):
            assert f"backbone.name '{name}' is no plain vision transformer" in refusal
            continue
        backbone = open_disturbed(name, smallest(name))
        require_own_tokens_and_pre_logits(backbone)
        require_meaning_of_prefix(backbone)
        accepted, kinds = accepted + 1, kinds | {kind_of(backbone)}
    print(f"{accepted} of {len(names)} names are plain vision transformers, of {len(kinds)} kinds")
    assert kinds == known
    assert accepted >= 250


# Every pooling option of timm

OPTIONS: dict[str, dict[str, list[Any]]] = {
    "vit_tiny_patch16_224": {
        "global_pool": ["", "token", "avg", "avgmax", "max", "map", "prr"],
        "fc_norm": [None, True, False],
        "final_norm": [True, False],
        "pool_include_prefix": [False, True],
        "class_token": [True, False],
        "reg_tokens": [0, 2],
        "no_embed_class": [False, True],
    },
    "eva02_tiny_patch14_224": {
        "global_pool": ["", "token", "avg", "avgmax", "max", "map"],
        "use_fc_norm": [None, True, False],
        "use_post_transformer_norm": [None, True, False],
        "class_token": [True, False],
        "num_reg_tokens": [0, 2],
    },
    "beit_base_patch16_224": {"global_pool": ["", "token", "avg"], "use_fc_norm": [None, True, False]},
    "vit_relpos_base_patch16_224": {
        "global_pool": ["", "token", "avg"],
        "fc_norm": [True, False],
        "class_token": [True, False],
    },
    "deit_tiny_distilled_patch16_224": {"fc_norm": [None, True], "final_norm": [True, False]},
}


def options_of(name: str) -> Iterator[dict[str, Any]]:
    """Every combination but token pooling without a class token, which timm refuses."""
    options = OPTIONS[name]
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if chosen.get("class_token", True) or chosen["global_pool"] != "token":
            yield chosen


COMBINATIONS = [(name, chosen) for name in OPTIONS for chosen in options_of(name)]


def require_reproduced(name: str, chosen: dict[str, Any]) -> None:
    backbone = open_disturbed(name, {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, **chosen})
    require_own_tokens_and_pre_logits(backbone)
    require_meaning_of_prefix(backbone)


@pytest.mark.parametrize(("name", "chosen"), COMBINATIONS[::13])
def test_pooling_options_are_reproduced(name: str, chosen: dict[str, Any]) -> None:
    require_reproduced(name, chosen)


@pytest.mark.slow
def test_every_pooling_option_is_reproduced() -> None:
    for name, chosen in COMBINATIONS:
        require_reproduced(name, chosen)


# What is refused

NOT_PLAIN = {
    "cait_xxs24_224": r"its blocks give .* = \(1, 196, 192\), but 1 prefix tokens and a grid of 14 x 14 make \(1, 197",
    "convit_tiny": r"its blocks give tokens of different shapes: \(1, 196, 192\), \(1, 197, 192\)",
    "samvit_base_patch16_224": r"its blocks give \(1, 14, 14, 768\), not \(batch, tokens, dim\)",
    **dict.fromkeys(
        [
            "coat_tiny",
            "convnext_atto",
            "crossvit_tiny_240",
            "davit_tiny",
            "hiera_tiny_224",
            "levit_128s",
            "mixer_s32_224",
            "mvitv2_tiny",
            "naflexvit_base_patch16_gap",
            "pit_ti_224",
            "pvt_v2_b0",
            "resnet18",
            "swin_tiny_patch4_window7_224",
            "tnt_s_legacy_patch16_224",
            "volo_d1_224",
            "xcit_nano_12_p16_224",
        ],
        "it has no token blocks on a patch grid",
    ),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_no_plain_vision_transformer_is_refused_by_its_name(name: str) -> None:
    refusal = rf"backbone.name '{name}' is no plain vision transformer \({NOT_PLAIN[name]}.*\); legal: timm's vit_\*"
    with pytest.raises(UserError, match=refusal):
        empty_backbone(name, {})


ARGUMENTS = {
    "padded images": (
        "vit_base_patch16_224",
        {"img_size": 60, "dynamic_img_size": True, "dynamic_img_pad": True},
        r"its blocks give .* \(1, 17, 768\), but 1 prefix tokens and a grid of 3 x 3 make \(1, 10, 768\)",
    ),
    "a size that the patches do not divide": (
        "eva02_tiny_patch14_224",
        {"img_size": 60, "dynamic_img_size": True},
        r"one image through it ends in AssertionError: Input height \(60\) should be divisible",
    ),
    "patch dropout": ("vit_base_patch16_224", {"patch_drop_rate": 0.1}, "in training it drops patches; leave"),
    "patch dropout of EVA": ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.1}, "in training it drops patches; leave"),
    "registers that no one reads": (
        "deit_tiny_distilled_patch16_224",
        {"reg_tokens": 2},
        "of its 2 prefix tokens, these are known: .*'reg_token': 2",
    ),
    "sizes for every image": ("vit_base_patch16_224", {"use_naflex": True}, "no token blocks on a patch grid"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("clips", [None, ClipConfig(frames=2)])
def test_arguments_that_leave_no_plain_vision_transformer_are_refused(kind: str, clips: ClipConfig | None) -> None:
    """By the plan, and by the job before it reads weights."""
    name, kwargs, reason = ARGUMENTS[kind]
    config = BackboneConfig(name=name, weights="pretrained", model_kwargs=kwargs | {"depth": 2})
    for ask in (backbone_shape, load_backbone):
        with pytest.raises(UserError, match=rf"backbone.name '{name}' with model_kwargs .* \(.*{reason}"):
            ask(config, clips)


def test_sizes_that_change_with_the_image_are_no_obstacle() -> None:
    backbone = open_disturbed("vit_base_patch16_224", TINY[0] | {"dynamic_img_size": True})
    require_own_tokens_and_pre_logits(backbone)
    assert empty_backbone(backbone.name, backbone.model_kwargs).layout == backbone.layout


@pytest.mark.parametrize("command", ["plan", "extract", "run", "methods"])
def test_every_command_refuses_in_one_line_before_a_sample_is_read(
    command: str,
    tiny_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = tiny_config("backbone={name: convit_tiny, weights: pretrained}")  # which could not be fetched here
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(config.model_dump(mode="json", include={"run_dir", "data", "backbone", "store"})))
    monkeypatch.setattr("extract.sources.samples.FileSlice._read", lambda *_: pytest.fail("a sample is read"))
    arguments = ["--backbone", "convit_tiny"] if command == "methods" else [str(job)]
    monkeypatch.setattr(sys, "argv", ["sidecache", command, *arguments])
    with pytest.raises(SystemExit) as stopped:
        sc.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert re.fullmatch(r"sidecache: backbone.name 'convit_tiny' is no plain vision transformer .*\n", printed.err)
    assert printed.out == ""
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache.zarr").exists()


class Odd(nn.Module):
    """A vision transformer by its attributes, with one deviation."""

    def __init__(self, way: str) -> None:
        super().__init__()
        model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY[0])
        self.patch_embed, self.blocks, self.norm, self.neck = model.patch_embed, model.blocks, model.norm, nn.ReLU()
        self.cls_token, self.embed_dim, self.num_prefix_tokens, self.way = model.cls_token, 32, 1, way
        self.global_pool, self.pretrained_cfg = "token", model.pretrained_cfg

    def forward_features(self, x: Tensor) -> Any:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in reversed(self.blocks) if self.way == "backwards" else self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.way == "a neck":
            x = self.neck(x)
        return (x, x) if self.way == "two" else x[:, 1:] if self.way == "patches only" else x

    def forward_intermediates(self, x: Tensor, **options: Any) -> list[Any]:
        if self.way == "an error":
            raise KeyError("no such thing")
        tokens = self.forward_features(x)
        return [(tokens[:, 1:], tokens[:, :1])]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, 0]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("backwards", "its blocks do not run once each and in order"),
        ("a neck", "its blocks are followed by more than a norm: neck"),
        ("two", "what follows its blocks changes the shape of its tokens"),
        ("patches only", "what follows its blocks changes the shape of its tokens"),
        ("an error", "one image through it ends in KeyError: 'no such thing'"),
        ("", ""),
    ],
)
def test_each_deviation_is_named(way: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.backbones.plain_vit_check.build_empty", lambda name, kwargs: Odd(way).to("meta"))
    if not reason:
        assert empty_backbone("odd", {}).layout.num_tokens == 50
        return
    with pytest.raises(UserError, match=rf"'odd' is no plain vision transformer \({reason}"):
        empty_backbone("odd", {})
