"""The pipeline files of the papers' benchmarks can be run, and their comments are right."""

import itertools
import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig
from adapt.features.specs import spec_of_backbone
from adapt.methods.registry import build_model, find_method
from adapt.methods.trained_parameters import count_params
from extract.backbones.backbone import TimmBackbone, empty_backbone
from store.dtypes import bytes_per_token
from store.layout import reduced_layout, resolve_layers

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
KRONECKER = [f"{data}_{weights}" for data in ("cifar10", "cifar100", "sun397") for weights in ("supervised", "clip")]
NAMES = [*KRONECKER, "vtab1k", "inaturalist2018", "inaturalist2021"]
VARIABLES = ("TORCHVISION_DATA", "VTAB_TASK", "VTAB_TASK_FOLDER", "INATURALIST_FOLDER")
STORE = re.compile(
    r"^# store: ([\d,.]+) GiB = ([\d,]+) samples x (\d+) layers x (\d+) tokens x \(([\d,]+) \+ (\d+)\) bytes$",
    re.MULTILINE,
)
VTAB_TASKS = 19
CLASSES = 10


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, f"/data/{name.lower()}")


@cache
def text_of(name: str) -> str:
    return (PAPER / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def shape_of(backbone: str) -> TimmBackbone:
    return empty_backbone(backbone, {})


def config_of(name: str, overrides: tuple[str, ...] = ()) -> Config:
    return load_config(PAPER / f"{name}.yaml", overrides)


def comment_of(name: str) -> str:
    """The comment at the top of the file, as one line without `#`."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text_of(name).splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def test_every_benchmark_has_its_file() -> None:
    assert sorted(path.stem for path in PAPER.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestEveryFile:
    def test_searches_every_method_over_a_log_grid_of_rates_and_decays(self, name: str) -> None:
        for method in config_of(name).parsed_methods():
            decays = sorted({trial.weight_decay for trial in method.trials})
            if find_method(method.name).solved:
                assert len(decays) >= 5
                continue
            rates = sorted({trial.lr for trial in method.trials})
            assert len(rates) >= 5
            assert len(decays) >= 3
            assert len(method.trials) == len(rates) * len(decays)
            for values in (rates, decays):
                steps = [high / low for low, high in itertools.pairwise(values)]
                assert max(steps) < 1.2 * min(steps), f"{method.name}: {values} is no log grid"

    def test_names_a_backbone_that_timm_has_weights_of(self, name: str) -> None:
        backbone = config_of(name).backbone
        assert backbone.weights == "pretrained"
        assert backbone.name in timm.list_pretrained()

    def test_names_data_that_torchvision_knows_or_a_folder(self, name: str) -> None:
        kind, _, dataset = config_of(name).data.source.partition(":")
        assert kind in ("folder", "torchvision")
        assert not dataset or dataset in torchvision.datasets.__all__

    def test_builds_every_method_at_its_full_size(self, name: str) -> None:
        config = config_of(name)
        assert config.backbone.name
        backbone = shape_of(config.backbone.name)
        layers = resolve_layers(config.store.layers, backbone.depth)
        spec = spec_of_backbone(backbone, layers, config.store.tokens)
        for method in config.parsed_methods():
            with torch.device("meta"):
                model = build_model(method.name, spec, CLASSES, method.trials[0].options, backbone=backbone)
            assert count_params(model)[1] == CLASSES * (2 * backbone.dim + 1)

    def test_keeps_all_tokens_where_a_method_trains_end_to_end(self, name: str) -> None:
        """Its read-out is standardized by the stored tokens; a store of pooled tokens is refused."""
        config = config_of(name)
        methods = [find_method(method.name) for method in config.parsed_methods()]
        assert config.store.tokens == "all" or not any(method.trains_backbone for method in methods)

    def test_states_the_bytes_of_its_store(self, name: str) -> None:
        config = config_of(name)
        stated = STORE.findall(text_of(name))
        assert len(stated) == 1
        gib, samples, n_layers, n_tokens, dim, scale = (part.replace(",", "") for part in stated[0])
        assert config.backbone.name
        backbone = shape_of(config.backbone.name)
        layers = resolve_layers(config.store.layers, backbone.depth)
        layout = reduced_layout(backbone.layout, config.store.tokens)
        assert (int(n_layers), int(n_tokens), int(dim)) == (len(layers), layout.num_tokens, backbone.dim)
        n_bytes = bytes_per_token(config.store.dtype, backbone.dim)
        assert int(dim) + int(scale) == n_bytes
        assert gib == f"{int(samples) * len(layers) * layout.num_tokens * n_bytes / 2**30:.1f}"

    def test_counts_the_samples_that_its_first_line_names(self, name: str) -> None:
        counted = int(STORE.findall(text_of(name))[0][1].replace(",", ""))
        named = [
            int(number.replace(",", ""))
            for number in re.findall(
                r"([\d,]+)(?= (?:training|validation|test|images)\b)", text_of(name).splitlines()[0]
            )
        ]
        assert sum(named) == counted or name == "vtab1k", "of VTAB only the training images are as many in every task"

    def test_says_what_was_run_and_what_is_published(self, name: str) -> None:
        text = text_of(name)
        assert "\n# ours: " in text
        assert "\n# published: " in text
        for entry in re.findall(r"^# published: .*(?:\n#   .*)*", text, re.MULTILINE):
            assert re.search(r"arXiv \d{4}\.\d{5}|github\.com/|huggingface\.co/", entry), entry


def test_the_files_of_one_paper_compare_the_same_methods() -> None:
    methods = {name: config_of(name).parsed_methods() for name in KRONECKER}
    assert all(found == methods[KRONECKER[0]] for found in methods.values())
    assert {"linear_probe", "losa", "kronecker", "full"} <= {method.name for method in methods[KRONECKER[0]]}


def test_kronecker_has_as_many_parameters_as_in_the_papers_code() -> None:
    config = config_of("cifar10_supervised")
    kronecker = next(method for method in config.parsed_methods() if method.name == "kronecker")
    assert count(kronecker, shape_of("vit_base_patch16_224")) == 50176


def count(method: MethodConfig, backbone: TimmBackbone) -> int:
    spec = spec_of_backbone(backbone, range(backbone.depth))
    with torch.device("meta"):
        return count_params(build_model(method.name, spec, CLASSES, method.trials[0].options, backbone=backbone))[0]


def test_vtab_names_its_tasks() -> None:
    groups = re.search(r"natural: (.*?) specialized: (.*?) structured: (.*?) VTAB_TASK ", comment_of("vtab1k"))
    assert groups
    tasks = [task.strip() for group in groups.groups() for task in group.split(",")]
    assert len(set(tasks)) == len(tasks) == VTAB_TASKS


def test_the_images_of_a_published_partition_can_be_named_on_the_command_line() -> None:
    config = config_of("sun397_clip", ("data.source=folder", "data.root=/data/sun397"))
    assert (config.data.source, config.data.root) == ("folder", Path("/data/sun397"))


def test_lora_on_vit_g_is_a_matter_of_the_command_line() -> None:
    overrides = tuple(re.findall(r"-o '?([\w.]+=(?:\[.*?\]|[\w]+))", text_of("inaturalist2018")))
    assert len(overrides) == 4
    config = config_of("inaturalist2018", overrides)
    assert [method.name for method in config.parsed_methods()] == ["lora"]
    assert (config.train.feature_source, config.store.tokens) == ("online", "all")
    assert config.train.grad_checkpointing
