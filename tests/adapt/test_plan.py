"""The plan of a job: exact bytes, values that follow from the measured speeds, and no files left behind."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from typer.testing import CliRunner

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.features import choice
from adapt.job.extraction import extract
from adapt.job.inputs import Inputs
from adapt.job.trial_count import trials_of
from adapt.planning import laps, planner
from adapt.planning.job_facts import JobFacts
from adapt.planning.other_machine import OtherMachine
from adapt.planning.plan import Plan, print_plan
from adapt.planning.planner import make_plan, parse_bytes
from adapt.planning.proposals import describe_price, propose
from adapt.planning.speeds import Speeds, decode_seconds, forward_seconds
from adapt.planning.step_speeds import StepSeconds
from benchmarks.made_up import encode
from extract.backbones.backbone import empty_backbone, load_backbone
from extract.backbones.backbone_shape import backbone_shape
from extract.config import BackboneConfig, ClipConfig, ExtractConfig
from extract.sources.open_source import open_source
from sidecache.command_line import app
from store.address import store_url
from store.arrays import STORED
from store.errors import UserError
from store.kvstore import KeyValueStore
from store.listing import Listing
from store.writer import StoreWriter, create_store

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if "\ndatasets:" not in path.read_text())
FOLDERS = ("SIDECACHE_DATA", "CIFAR10_FOLDER", "TORCHVISION_DATA", "VTAB_TASK_FOLDER", "INATURALIST_FOLDER")
CORES = os.cpu_count() or 1
TINY_TRAIN, TINY_TEST, TINY_BYTES = 24, 12, 3 * 17 * 32 * 4  # layers x tokens x dim x float32

Build = Callable[..., Config]


def known(config: Config, budget: int | None = None) -> Plan:
    """The plan without its measurements."""
    return make_plan(config, budget, with_speeds=False)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the measurements by fixed seconds a sample; trials that are trained together take as long as alone."""
    fixed = Speeds(
        decode=2.0 * CORES,
        forward=10.0,
        encode=1.0,
        write=3.0,
        steps={"resident": 4.0, "streamed": 5.0},
        end_to_end=None,
        cores=CORES,
    )

    def measure(job: JobFacts, **changes: Any) -> Speeds:
        trials = tuple(
            StepSeconds(points=4.0 * one.share * one.points, seeds=4.0 * one.seeds)
            for one in trials_of(job.config)
            if one.in_steps
        )
        return replace(fixed, trials=trials, **changes)

    return lambda **changes: monkeypatch.setattr(planner, "measure_speeds", lambda job: measure(job, **changes))


class TestBytes:
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
    def test_every_example_is_planned_without_its_data(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in (*FOLDERS, "VTAB_TASK"):
            monkeypatch.setenv(name, f"/nowhere/{name.lower()}")
        plan = known(load_config(path, [f"store.path={tmp_path / 'cache.zarr'}"]))
        document = json.loads(json.dumps(plan.document()))
        assert document["samples"] is document["store_bytes"] is document["fits"] is None
        width = {"float16": 2 * plan.dim, "int8": plan.dim + 4}[plan.dtype]
        assert plan.bytes_per_sample == len(plan.layers) * plan.num_tokens * width
        assert re.search("the samples cannot be listed.* does not exist", plan.notes[0])
        assert "a thousand" in plan.recommendation
        assert list(tmp_path.iterdir()) == []

    def test_the_default_job_is_planned_by_its_data(self, tmp_path: Path) -> None:
        plan = known(load_config(ROOT / "pipeline.yaml", [f"store.path={tmp_path / 'cache.zarr'}"]))
        assert plan.samples == {"train": 1346, "test": 451}
        assert plan.bytes_per_sample == len(plan.layers) * 65 * 128 * 2
        assert plan.store_bytes == 1797 * plan.bytes_per_sample
        assert (plan.fits, plan.notes) == (True, [])

    @pytest.mark.parametrize("dtype", ["float32", "int8"])
    @pytest.mark.parametrize("tokens", ["all", "{pool: 2}"])
    def test_bytes_and_samples_are_those_of_the_store(self, tiny_config: Build, dtype: str, tokens: str) -> None:
        config = tiny_config(f"store.dtype={dtype}", f"store.tokens={tokens}")
        plan = known(config)
        store = extract(config, Inputs(config)).store
        assert plan.bytes_per_sample == store.schema.bytes_per_sample
        assert plan.samples == {split: store.num_samples(split) for split in store.splits}
        assert plan.store_bytes == 36 * plan.bytes_per_sample < store.n_bytes()

    def test_a_compressed_store_has_an_upper_bound(self, tiny_config: Build) -> None:
        plan = known(tiny_config("store.compressor=zstd"))
        assert plan.upper_bound
        assert plan.store_bytes == 36 * TINY_BYTES
        assert "at most 235.0 kB" in plan.recommendation

    def test_a_video_model_of_four_billion_parameters_is_planned_without_its_memory(self) -> None:
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 1792, "num_hidden_layers": 56, "num_attention_heads": 16, "intermediate_size": 15360}
        document = {
            "data": {"source": "video_folder", "root": "/nowhere", "video": {"frames": 32, "clips": 4, "crops": 3}},
            "backbone": {"name": "vivit", "weights": "random", "model_kwargs": sizes | {"tubelet_size": [2, 14, 14]}},
        }
        plan = known(load_config(document))
        assert plan.views == 12
        assert plan.num_tokens == 1 + 16 * 16 * 16
        assert plan.bytes_per_sample == 56 * 4097 * 1792 * 2 == 822_284_288
        pooled = known(load_config(document, ["store.tokens={pool: 4, time: 2}", "store.dtype=int8"]))
        assert pooled.bytes_per_sample == 56 * (1 + 8 * 4 * 4) * (1792 + 4)


class TestExistingStore:
    def test_shards_that_are_committed_are_not_counted_again(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured()
        config = tiny_config()
        commit_first_shard(config)
        plan = make_plan(config)
        assert plan.samples_to_extract == 36 - 5
        assert plan.store_bytes == 36 * TINY_BYTES
        assert plan.extract_seconds == pytest.approx(31 * 13.0)

    def test_a_complete_one_leaves_nothing_to_extract(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured()
        config = tiny_config()
        extract(config, Inputs(config))
        plan = make_plan(config)
        assert (plan.samples_to_extract, plan.extract_seconds, plan.break_even_epochs) == (0, 0.0, 0.0)
        assert plan.recommendation.startswith("The store is complete: 235.0 kB")

    def test_one_made_from_something_else_is_noted_and_not_counted(self, tiny_config: Build) -> None:
        config = tiny_config()
        extract(config, Inputs(config))
        plan = known(tiny_config("store.dtype=int8"))
        assert plan.samples_to_extract == 36
        assert "was made from something else" in plan.notes[0]

    def test_it_has_the_samples_if_the_data_are_gone(self, tiny_config: Build) -> None:
        config = tiny_config()
        extract(config, Inputs(config))
        plan = known(tiny_config("data.root=/nowhere"))
        assert plan.samples == {"train": TINY_TRAIN, "test": TINY_TEST}
        assert plan.samples_to_extract == 0


def commit_first_shard(config: Config) -> None:
    schema, kvstore = JobFacts(config).schema, KeyValueStore(store_url(config.store.path))
    listings = {
        split: Listing(tuple(map(str, range(n))), np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))
        for split, n in (("train", TINY_TRAIN), ("test", TINY_TEST))
    }
    create_store(kvstore, schema, listings, {}, {})
    encoded = encode(np.zeros((5, 17, 32), np.float32), "float32")
    StoreWriter(kvstore, schema).commit("train", 0, dict.fromkeys(schema.layers, encoded), np.full(5, STORED, np.uint8))


class TestSeconds:
    def test_on_a_cpu_decoding_and_the_forward_pass_share_the_cores(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured()
        plan = make_plan(tiny_config("extract.device=cpu", "train.device=cpu"))
        assert plan.extract_seconds == pytest.approx(36 * (2 + 10 + 1))
        trained_on = TINY_TRAIN * 0.75
        expected = {"resident": 4 * trained_on, "streamed": 5 * trained_on, "online": (4 + 2 + 10) * trained_on}
        assert plan.epoch_seconds == pytest.approx(expected)
        assert plan.break_even_epochs == pytest.approx(36 * 13 / (12 * trained_on))

    def test_a_slow_disk_sets_the_pace(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured(write=20.0)
        assert make_plan(tiny_config()).extract_seconds == pytest.approx(36 * 20)

    def test_a_new_int8_store_looks_at_its_training_samples_first(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured()
        assert make_plan(tiny_config("store.dtype=int8")).extract_seconds == pytest.approx((36 + 24) * 13)

    def test_online_training_is_recommended_if_it_is_no_slower(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured(decode=0.0, forward=0.5)
        plan = make_plan(tiny_config("train.feature_source=streamed"))
        assert plan.break_even_epochs is None
        assert "set train.feature_source to online" in plan.recommendation

    def test_an_end_to_end_method_has_its_own_epoch(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured(end_to_end=30.0)
        plan = make_plan(tiny_config("methods=[losa, lora]"))
        assert plan.epoch_seconds["end_to_end"] == pytest.approx(18 * 32)

    def test_without_samples_there_are_rates(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured(decode=None)
        plan = make_plan(tiny_config("data.root=/nowhere"))
        assert plan.extract_seconds is None
        assert plan.epoch_seconds == {"resident": None, "streamed": None, "online": None}
        assert plan.samples_per_second["online"] == pytest.approx(1 / 14)


class TestWhatIsShown:
    def test_a_source_that_does_not_fit_has_no_times(
        self,
        tiny_config: Build,
        measured: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        measured()
        print_plan(make_plan(tiny_config("train.device=cpu")), "fits")
        assert "training, resident" in capsys.readouterr().out
        memory = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        print_plan(make_plan(tiny_config("train.device=cpu")), "does not")
        shown = capsys.readouterr().out
        assert "training, resident" not in shown
        assert "training, streamed" in shown

    @pytest.mark.parametrize(("load", "is_noted"), [(0.1, False), (2.0, True)])
    def test_a_busy_machine_is_noted(
        self,
        tiny_config: Build,
        measured: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        load: float,
        is_noted: bool,
    ) -> None:
        measured()
        monkeypatch.setattr(os, "getloadavg", lambda: (load * CORES, 0.0, 0.0))
        assert any("keep this machine busy" in note for note in make_plan(tiny_config()).notes) is is_noted
        assert not known(tiny_config()).notes  # nothing is measured


class TestAnotherMachine:
    """Here a forward pass takes 10 s, at 2 TFLOP/s."""

    FLOPS = 20 * 10**12

    def plan(self, config: Config, **machine: Any) -> Plan:
        return make_plan(config, machine=OtherMachine(**machine))

    def test_a_faster_device_takes_less_for_all_that_it_computes(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured(forward_flops=self.FLOPS, end_to_end=30.0)
        config = tiny_config("methods=[losa, lora]")
        here, there = make_plan(config), self.plan(config, device_tflops=20.0)
        assert here.extract_seconds == pytest.approx(36 * (2 + 10 + 1))
        assert there.extract_seconds == pytest.approx(36 * max(2 + 1 + 0.1, 3))  # decoding stays as it is
        rates = {"resident": 0.4, "streamed": 0.4 + 1, "online": 0.4 + 2 + 1, "end_to_end": 2 + 3}
        assert there.epoch_seconds == pytest.approx({name: 18 * seconds for name, seconds in rates.items()})
        assert here.train_seconds is not None
        assert there.train_seconds == pytest.approx(2 * (18 * 5) + (here.train_seconds - 2 * 18 * 32) / 10)

    def test_several_gpus_extract_while_the_cores_decode(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured(write=0.0)
        config = tiny_config("methods=[losa]", "train.seeds=[0, 1, 2]")
        one, three, slow = self.plan(config, gpus=1), self.plan(config, gpus=3), self.plan(config, gpus=3, cores=1)
        assert one.extract_seconds == pytest.approx(36 * 11)
        assert three.extract_seconds == pytest.approx(36 * 11 / 3)
        assert slow.extract_seconds == pytest.approx(36 * max(11 / 3, 2.0 * CORES))
        assert one.train_seconds is not None
        assert three.train_seconds == pytest.approx(one.train_seconds / 3)
        assert self.plan(config, gpus=30).train_seconds == three.train_seconds  # there are three trials

    def test_a_disk_sets_the_pace_of_writing_and_reading(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured()
        plan = self.plan(tiny_config("train.feature_source=streamed"), read_gbps=TINY_BYTES / 50 / 1e9)
        assert plan.extract_seconds == pytest.approx(36 * 50)
        assert plan.epoch_seconds["streamed"] == pytest.approx(18 * 50)  # it reads all layers
        assert plan.epoch_seconds["resident"] == pytest.approx(18 * 4)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("device_tflops", 0.0),
            ("device_tflops", float("nan")),
            ("read_gbps", float("inf")),
            ("gpus", 0),
            ("cores", -1),
        ],
    )
    def test_figures_are_above_zero(self, name: str, value: float) -> None:
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value:g}; legal: a number above 0"):
            OtherMachine(**{name: value})  # type: ignore[arg-type]

    def test_the_command_says_which_machine_it_plans_for(
        self, tiny_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[..., None]
    ) -> None:
        measured(forward_flops=self.FLOPS)
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")))
        options = ["--gpus", "2", "--device-tflops", "400", "--cores", "1", "--read-gbps", "0.5"]
        done = CliRunner().invoke(app, ["plan", str(tmp_path / "job.yaml"), *options], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert "on 2 GPUs, 400 TFLOP/s, 1 core, a disk of 0.5 GB/s" in " ".join(done.output.split())


class TestFeatureSource:
    @pytest.mark.parametrize(
        ("free", "expected", "sizes"),
        [(10**9, "resident", "156.7 kB of features, 1.0 GB"), (1000, "streamed", "156.7 kB of features, 1.0 kB")],
    )
    def test_auto_goes_by_the_memory_that_is_free(
        self, tiny_config: Build, monkeypatch: pytest.MonkeyPatch, free: int, expected: str, sizes: str
    ) -> None:
        memory = psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        plan = known(tiny_config("train.device=cpu"))
        assert plan.feature_source == expected
        assert f"Training uses {expected} features ({sizes} of memory free)" in plan.recommendation

    def test_online_stores_nothing(self, tiny_config: Build) -> None:
        plan = known(tiny_config("train.feature_source=online"), budget=1)
        assert plan.recommendation.startswith("Nothing is stored")
        assert plan.proposals == []


class TestTrials:
    """An epoch trains on 18 of the 24 training samples, at 4 seconds each, and validates on 6; there are 12 to test."""

    @pytest.mark.parametrize(
        ("overrides", "trials", "epochs", "tested"),
        [
            (["methods=[losa]"], 1, 2, 1),
            (["methods=[losa]", "train.seeds=[0, 1, 2]"], 3, 6, 3),
            (["methods=[{name: losa, sweep: {rank: [2, 4], lr: [0.1, 0.2]}}]"], 4 + 1, 10, 1),
            (["methods=[losa]", "sweep={lr: [0.1, 0.2]}", "search.epochs=1", "train.seeds=[0, 1]"], 4, 2 + 4, 2),
            (["methods=[losa, ladder]", "train.epochs=5"], 2, 10, 2),
            (["methods=[linear_probe]", "sweep={weight_decay: [0.1, 0.2]}", "train.seeds=[0, 1]"], 4, 0, 0),
            (["methods=[linear_probe, {name: losa, epochs: 7}]"], 2, 7, 1),
        ],
    )
    def test_the_time_of_training_is_that_of_all_epochs_of_all_trials(
        self,
        tiny_config: Build,
        measured: Callable[..., None],
        overrides: list[str],
        trials: int,
        epochs: int,
        tested: int,
    ) -> None:
        measured()
        plan = make_plan(tiny_config(*overrides))
        assert plan.trials == trials
        assert plan.train_seconds == pytest.approx(4.0 * (epochs * (18 + 6 / 3) + tested * 12 / 3))

    def test_a_refit_trial_is_scored_first_and_then_trained_on_all_samples(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured()
        plan = make_plan(tiny_config("methods=[losa]", "train.seeds=[0, 1]", "train.refit=true"))
        assert plan.trials == 1 + 2
        assert plan.train_seconds == pytest.approx(4.0 * (2 * (18 + 6 / 3) + 2 * 2 * 24 + 2 * 12 / 3))

    def test_methods_inside_the_backbone_take_the_time_of_theirs(
        self, tiny_config: Build, measured: Callable[..., None]
    ) -> None:
        measured(end_to_end=7.0)
        plan = make_plan(tiny_config("methods=[losa, lora]", "train.seeds=[0, 1]"))
        assert plan.trials == 4
        from_features = 4.0 * 2 * (2 * (18 + 6 / 3) + 12 / 3)
        assert plan.train_seconds == pytest.approx(from_features + 2 * 2 * plan.epoch_seconds["end_to_end"])

    def test_candidates_that_are_dropped_take_less(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        """Of six epochs, the second of two points is trained for two; the better one for all."""
        measured()
        sweep = ["methods=[losa]", "sweep={lr: [0.1, 0.2]}", "train.epochs=6"]
        whole, halved = (make_plan(tiny_config(*sweep, f"train.halving={halving}")) for halving in ("null", "{}"))
        (trials,) = trials_of(tiny_config(*sweep, "train.halving={}"))
        assert trials.share == pytest.approx((2 * 1 + 2 * 0.5 + 2 * 0.25) / 6)
        assert halved.train_seconds is not None
        assert whole.train_seconds is not None
        assert halved.train_seconds < whole.train_seconds

    def test_unknown_times_stay_unknown(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        assert known(tiny_config()).train_seconds is None
        measured()
        plan = make_plan(tiny_config("data.root=/nowhere"))
        assert plan.train_seconds is None
        assert plan.fastest is None


class TestTotals:
    """Training from features reads 24 rows an epoch, to train or validate, and once 24 of train and 12 of test."""

    def test_they_have_extraction_reading_and_training(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured(read=0.5)
        plan = make_plan(tiny_config("methods=[losa]"))
        computing, forward = 4.0 * (2 * (18 + 6 / 3) + 12 / 3), 10.0 + 2.0
        assert plan.total_seconds == {
            "online": pytest.approx(computing + (2 * 24 + 36) * forward),
            "resident": pytest.approx(36 * (forward + 1) + computing + (36 + 24) * 0.5),
            "streamed": pytest.approx(36 * (forward + 1) + computing + 36 * 0.5 + 2 * 24 * 1.0),
        }
        assert plan.fastest == "resident"
        assert "The whole job takes" in plan.recommendation

    def test_searches_and_seeds_share_their_reads(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured()
        totals = [
            make_plan(tiny_config("methods=[losa]", f"sweep={{lr: {rates}}}", "train.epochs=3")).total_seconds
            for rates in ([0.1, 0.2], [0.1, 0.2, 0.3, 0.4])
        ]
        two, four = (found["online"] - found["resident"] for found in totals)
        assert two == pytest.approx(four)

    def test_what_is_read_once_needs_no_store(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured(read=0.5)
        plan = make_plan(tiny_config("methods=[linear_probe]"))
        assert plan.fastest == "online"
        assert "set train.feature_source to online" in plan.recommendation

    def test_a_disk_that_is_slower_than_the_backbone_is_not_read_in_every_epoch(
        self, tiny_config: Build, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "free_memory_bytes", lambda _: 1000)
        monkeypatch.setattr(planner, "free_memory_bytes", lambda _: 1000)
        for cold, fastest in ((1.0, "streamed"), (30.0, "online")):
            measured(read_cold=cold)
            plan = make_plan(tiny_config("methods=[losa]"))
            assert plan.total_seconds.keys() == {"online", "streamed"}
            assert plan.fastest == fastest

    def test_augmented_views_are_loaded_and_measured_against_the_memory(
        self, tiny_config: Build, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured(read=0.5)
        plain, views = (make_plan(tiny_config("methods=[losa]", f"data.views={n}")) for n in (1, 4))
        extraction = 3 * 24 * 13.0
        loading = 3 * 24 * 0.5
        assert views.total_seconds["resident"] == pytest.approx(plain.total_seconds["resident"] + extraction + loading)
        monkeypatch.setattr(planner, "free_memory_bytes", lambda _: 2 * TINY_TRAIN * TINY_BYTES)
        measured(read_cold=30.0)
        plain, views = (make_plan(tiny_config("methods=[losa]", f"data.views={n}")) for n in (1, 4))
        waiting = 2 * 24 * 29.0 + (24 + 12) * 30.0
        assert views.total_seconds["streamed"] == pytest.approx(plain.total_seconds["streamed"] + extraction + waiting)

    def test_a_store_that_does_not_fit_is_no_choice(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured()
        plan = make_plan(tiny_config("methods=[losa]"), budget=10)
        assert plan.total_seconds.keys() == {"online"}
        assert "without a store the job takes" in plan.recommendation


class TestBudget:
    def test_proposals_fit_and_are_planned_as_they_say(self, tiny_config: Build) -> None:
        budget = 36 * TINY_BYTES // 4
        plan = known(tiny_config(), budget)
        assert plan.fits is False
        assert plan.proposals
        for proposal in plan.proposals:
            again = known(tiny_config(*proposal.overrides), budget)
            assert again.fits
            assert again.store_bytes == proposal.store_bytes <= budget
            assert "± " in proposal.cost
        assert f"-o '{plan.proposals[0].overrides[0]}'" in plan.recommendation

    def test_a_store_without_the_test_split_comes_first(self, tiny_config: Build) -> None:
        budget = 30 * TINY_BYTES
        first, *_ = known(tiny_config(), budget).proposals
        assert (first.name, first.overrides) == ("train", ("store.splits=[train]",))
        assert first.store_bytes == TINY_TRAIN * TINY_BYTES
        again = known(tiny_config(*first.overrides), budget)
        assert again.fits
        assert again.store_bytes == first.store_bytes
        fewer = known(tiny_config(), (TINY_TRAIN - 1) * TINY_BYTES).proposals
        assert fewer
        assert "train" not in {proposal.name for proposal in fewer}

    def test_the_largest_comes_first(self, tiny_config: Build) -> None:
        """float32 is configured; int8 with its scales is an eighth less than a quarter of it here."""
        plans = [known(tiny_config(), 36 * TINY_BYTES // share) for share in (1, 3, 5, 20, 40)]
        names = [[proposal.name for proposal in plan.proposals] for plan in plans]
        without_int8 = ["int4", "lean", "probe"]
        assert names == [[], ["int8", "coarse", *without_int8], without_int8, ["probe"], []]

    def test_a_preset_is_proposed_by_name_unless_options_would_take_precedence(self) -> None:
        document = {"data": {"source": "digits"}, "backbone": {"name": "vit_tiny_patch16_224", "weights": "random"}}
        for given, expected in (
            ({}, ("store.preset=lean",)),
            ({"dtype": "int8"}, ("store.layers={spread: 4}", "store.tokens={grid: 2}")),
            ({"layers": "all", "dtype": "float16"}, (
                "store.layers={spread: 4}", "store.tokens={grid: 2}", "store.dtype=int8"
            )),
        ):  # fmt: skip
            proposals = propose(JobFacts(load_config({**document, "store": given})), rows={"train": 1}, n_bytes=10**9)
            (lean,) = (proposal for proposal in proposals if proposal.name == "lean")
            assert lean.overrides == expected
            again = load_config({**document, "store": given}, lean.overrides)
            assert again.store == load_config({**document, "store": {"preset": "lean"}}).store

    def test_end_to_end_methods_keep_all_tokens(self, tiny_config: Build) -> None:
        proposals = known(tiny_config("methods=[losa, lora]"), 36 * TINY_BYTES // 2).proposals
        assert [proposal.name for proposal in proposals] == ["full", "int8", "int4"]
        assert not any("tokens" in override for proposal in proposals for override in proposal.overrides)

    def test_methods_get_the_layers_that_they_name(self, tiny_config: Build) -> None:
        config = tiny_config("methods=[{name: losa, layers: [0, 2]}]", "backbone.model_kwargs.depth=8")
        names = {proposal.name for proposal in propose(JobFacts(config), rows={"train": 1}, n_bytes=10**9)}
        assert {"int8", "full"} <= names
        assert not {"grid", "lean"} & names

    def test_if_nothing_fits_online_training_remains(self, tiny_config: Build) -> None:
        plan = known(tiny_config(), 1)
        assert plan.proposals == []
        assert "does not fit" in plan.recommendation
        assert "train.feature_source=online stores nothing" in plan.recommendation

    def test_without_samples_the_budget_is_given_in_samples(self, tiny_config: Build) -> None:
        plan = known(tiny_config("data.root=/nowhere"), 10 * TINY_BYTES)
        assert "65.3 kB hold 10." in plan.recommendation

    def test_quoted_prices_are_in_the_document(self) -> None:
        storage = (ROOT / "docs/storage.md").read_text()
        for name in ("grid", "coarse", "lean", "probe"):
            _, row = re.findall(rf"\| `{name}` \|.*", storage)  # the first says what it stands for
            for price in re.findall(r"-?\d+\.\d ± \d+\.\d", describe_price(name)):
                assert price in row

    @pytest.mark.parametrize(("text", "n_bytes"), [("20GB", 20 * 10**9), ("1.5 GiB", 3 * 2**29), ("12", 12)])
    def test_bytes_have_units(self, text: str, n_bytes: int) -> None:
        assert parse_bytes(text) == n_bytes

    @pytest.mark.parametrize("text", ["", "much", "20 apples", "-1GB"])
    def test_an_illegal_budget_is_refused(self, text: str) -> None:
        with pytest.raises(UserError, match=f"--budget '{text}' is not a number of bytes; legal: such as 20GB"):
            parse_bytes(text)


class TestShape:
    def test_it_is_the_shape_of_the_loaded_backbone(self) -> None:
        config = load_config(ROOT / "pipeline.yaml").backbone
        shape, loaded = backbone_shape(config), load_backbone(config)
        for field in ("name", "model_kwargs", "depth", "dim", "layout", "image_size"):
            assert getattr(shape, field) == getattr(loaded, field), field
        assert all(parameter.is_meta for parameter in shape.module.parameters())

    def test_image_size_and_arguments_count(self) -> None:
        config = BackboneConfig(
            name="vit_tiny_patch16_224", weights="pretrained", image_size=64, model_kwargs={"depth": 2}
        )
        shape = backbone_shape(config, ClipConfig(frames=4))
        assert (shape.depth, shape.layout.grid, shape.image_size) == (2, (4, 4, 4), (4, 3, 64, 64))

    def test_a_name_suffices_if_the_weights_are_missing(self, tiny_config: Build) -> None:
        plan = known(tiny_config("backbone.weights=/nowhere/weights.safetensors"))
        assert plan.bytes_per_sample == TINY_BYTES
        assert plan.notes == [
            "backbone.weights '/nowhere/weights.safetensors' does not exist: the job cannot start without it"
        ]

    def test_neither_name_nor_weights_is_the_users_mistake(self, tiny_config: Build) -> None:
        with pytest.raises(UserError, match="there is no such file or folder"):
            known(tiny_config("backbone.weights=/nowhere", "backbone.name=null"))


class TestSpeeds:
    @pytest.fixture(autouse=True)
    def _be_brief(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(laps, "SECONDS", 0.02)

    def test_all_is_measured_and_nothing_left_behind(self, tiny_config: Build, tmp_path: Path) -> None:
        before = sorted(tmp_path.rglob("*"))
        state = torch.get_rng_state()
        plan = make_plan(tiny_config("methods=[linear_probe, losa, lora]"))
        assert sorted(tmp_path.rglob("*")) == before
        assert plan.epoch_seconds.keys() == {"resident", "streamed", "online", "end_to_end"}
        assert all(seconds and seconds > 0 for seconds in plan.epoch_seconds.values())
        assert plan.extract_seconds
        assert plan.samples_per_second.keys() == {"extract", *plan.epoch_seconds}
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("override", ["store.dtype=int8", "store.tokens=cls", "methods=[ladder]", "methods=[full]"])
    def test_every_kind_of_job_can_be_measured(self, tiny_config: Build, override: str) -> None:
        assert make_plan(tiny_config(override)).extract_seconds

    def test_a_store_that_is_not_local_is_not_measured(self, tiny_config: Build) -> None:
        plan = make_plan(tiny_config("store.path=memory://plan/"))
        assert plan.free_bytes is plan.epoch_seconds["streamed"] is None
        assert plan.extract_seconds
        assert plan.fits
        assert "(not local)" in plan.recommendation

    @pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"])
    def test_one_block_of_any_family_runs_on_random_weights(self, name: str) -> None:
        config = ExtractConfig(device="cpu", batch_size=1)
        assert forward_seconds(empty_backbone(name, {}), 0, config) > 0

    def test_clips_run_frame_by_frame(self) -> None:
        shape = empty_backbone("vit_tiny_patch16_224", {"depth": 3}, frames=2)
        assert forward_seconds(shape, 2, ExtractConfig(device="cpu", batch_size=1)) > 0

    def test_samples_that_cannot_be_decoded_are_skipped(self, tiny_config: Build, image_folder: Path) -> None:
        config = tiny_config()
        shape = JobFacts(config).shape
        images = sorted((image_folder / "train").rglob("*.png"))
        images[0].write_bytes(b"no image")
        assert decode_seconds(open_source(config.data).splits["train"], shape)
        for image in images:
            image.write_bytes(b"no image")
        assert decode_seconds(open_source(config.data).splits["train"], shape) is None


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["sidecache", "plan", *map(str, arguments)])
        try:
            sc.main()
        except SystemExit as done:
            return int(done.code or 0)
        return 0

    def test_json_is_one_document_on_standard_output(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        measured: Callable[..., None],
        tmp_path: Path,
    ) -> None:
        measured()
        status = self.run(monkeypatch, ROOT / "pipeline.yaml", "--json", "-o", f"store.path={tmp_path / 'c.zarr'}")
        document = json.loads(capsys.readouterr().out)
        assert status == 0
        wanted = {
            "store_bytes",
            "bytes_per_sample",
            "extract_seconds",
            "epoch_seconds",
            "break_even_epochs",
            "recommendation",
        }
        assert wanted <= document.keys()
        assert set(document["epoch_seconds"]) == {"resident", "streamed", "online"}

    def test_a_missing_data_root_is_no_failure(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        measured: Callable[..., None],
        tmp_path: Path,
    ) -> None:
        measured(decode=None)
        path = tmp_path / "pipeline.yaml"
        path.write_text("{data: {source: folder, root: gone}, backbone: {name: vit_tiny_patch16_224, weights: random}}")
        assert self.run(monkeypatch, path, "--budget", "20GB") == 0
        out = capsys.readouterr().out
        assert "unknown" in out
        assert "does not exist" in " ".join(out.split())
        assert self.run(monkeypatch, path, "--budget", "lots") == 2
        assert "--budget 'lots' is not a number of bytes" in capsys.readouterr().err

    def test_the_table_lists_what_fits(self, tiny_config: Build, capsys: pytest.CaptureFixture[str]) -> None:
        print_plan(known(tiny_config(), 36 * TINY_BYTES // 3), "a.yaml")
        out = " ".join(capsys.readouterr().out.split())
        assert "store.dtype=int8" in out
        assert "24 train, 12 test" in out


class TestSplits:
    def test_a_split_that_is_not_stored_costs_seconds_and_no_bytes(
        self, tiny_config: Build, measured: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        measured()
        plan = make_plan(tiny_config("store.splits=[train]"))
        assert (plan.samples, plan.unstored_samples) == ({"train": TINY_TRAIN}, {"test": TINY_TEST})
        assert (plan.store_bytes, plan.samples_to_extract) == (TINY_TRAIN * TINY_BYTES, TINY_TRAIN)
        assert plan.unstored_seconds == pytest.approx(TINY_TEST * (2 + 10 + 1))
        print_plan(plan, "")
        assert re.search("test, not stored .* 12 samples go through the backbone", capsys.readouterr().out)

    def test_a_split_that_the_store_has_is_stored(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured()
        extract(config := tiny_config(), Inputs(config))
        plan = make_plan(tiny_config("store.splits=[train]"))
        assert plan.samples == {"train": TINY_TRAIN, "test": TINY_TEST}
        assert (plan.unstored_samples, plan.unstored_seconds, plan.samples_to_extract) == ({}, 0, 0)

    def test_a_split_that_the_store_lacks_is_to_be_extracted(self, tiny_config: Build) -> None:
        extract(config := tiny_config("store.splits=[train]"), Inputs(config))
        assert known(tiny_config("store.splits=[train]")).samples_to_extract == 0
        assert known(tiny_config()).samples_to_extract == TINY_TEST

    def test_splits_are_unknown_without_samples(self, tiny_config: Build, measured: Callable[..., None]) -> None:
        measured()
        plan = make_plan(tiny_config("store.splits=[train]", "data.root=/nowhere"))
        assert plan.unstored_samples is plan.unstored_seconds is None
