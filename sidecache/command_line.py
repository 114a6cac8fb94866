"""The commands of `sidecache`. Imports are inside the functions, so that `--help` does not wait for torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import sidecache
from sidecache.backbones_command import backbones_command
from sidecache.doctor_command import doctor_command
from sidecache.init_command import init_command
from sidecache.intrinsic_command import intrinsic_command
from sidecache.job_options import AsJson, JobPath, Overrides
from sidecache.messages import print_json
from sidecache.predict_command import app as predict_app
from sidecache.results_command import results_command

if TYPE_CHECKING:
    from adapt.config.pipeline import Config
    from adapt.config.study import Study
    from store.verify_report import Report

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run a frozen vision transformer once, keep its tokens, then train adaptors in seconds.",
)

OnChangedOption = Annotated[
    Literal["fail", "new-store"],
    typer.Option(help="if stored samples are gone or changed: fail, or extract to a new store beside it"),
]


def _read(path: Path, overrides: list[str] | None) -> "Config":
    return sidecache.load_config(path, overrides or [])


def _read_job(path: Path, overrides: list[str] | None) -> "Config | Study":
    from adapt.config.study import load_job

    return load_job(path, overrides or [])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(sidecache.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command("run", epilog="Example: sidecache run pipeline.yaml -o train.epochs=5")
def run_command(config: JobPath, overrides: Overrides = None, on_changed: OnChangedOption = "fail") -> None:
    """Run the whole job, or every job of a study: extract what is missing, train, and report."""
    from sidecache import commands

    commands.run(_read_job(config, overrides), on_changed)


app.command("init", epilog="Example: sidecache init my_photos --output pipeline.yaml")(init_command)
app.command("doctor", epilog="Example: sidecache doctor --json")(doctor_command)
app.command("backbones", epilog="Example: sidecache backbones 'vit_small*'")(backbones_command)


@app.command("plan", epilog="Example: sidecache plan pipeline.yaml --budget 20GB --json")
def plan_command(
    config: JobPath,
    overrides: Overrides = None,
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="disk space for all stores, such as 20GB; shows what would fit")
    ] = None,
    pilot: Annotated[
        bool,
        typer.Option("--pilot", help="first run some training samples through the backbone: which preset suffices"),
    ] = False,
    device_tflops: Annotated[
        float | None, typer.Option(metavar="N", help="plan for a device that sustains N TFLOP/s in matrix products")
    ] = None,
    read_gbps: Annotated[
        float | None, typer.Option(metavar="N", help="plan for a disk that reads and writes N GB/s")
    ] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="plan for N GPUs")] = None,
    cores: Annotated[int | None, typer.Option(metavar="N", help="plan for N cores that decode")] = None,
    json: AsJson = False,
) -> None:
    """Estimate the cost of a job or a study, in bytes and seconds on this machine or another one, before it runs."""
    from adapt.planning.other_machine import OtherMachine
    from sidecache import commands

    machine = OtherMachine(device_tflops=device_tflops, read_gbps=read_gbps, gpus=gpus, cores=cores)
    commands.plan(_read_job(config, overrides), budget, machine, with_pilot=pilot, as_json=json, title=str(config))


@app.command("extract", epilog="Example: sidecache extract pipeline.yaml --workers 4")
def extract_command(
    config: JobPath,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(help="processes on this machine, one a GPU; same as -o extract.workers=")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="tcp://HOST:PORT", help="a dask scheduler; same as -o extract.scheduler="),
    ] = None,
    on_changed: OnChangedOption = "fail",
) -> None:
    """Run the frozen backbone over every sample that is not in the store yet."""
    from sidecache import commands

    options = list(overrides or [])
    if workers is not None:
        options.append(f"extract.workers={workers}")
    if scheduler is not None:
        options.append(f"extract.scheduler={json.dumps(scheduler, ensure_ascii=False)}")  # quoted: "" is not null
    commands.extract(_read_job(config, options), on_changed)


@app.command("train", epilog="Example: sidecache train pipeline.yaml -o train.seeds=[0]")
def train_command(config: JobPath, overrides: Overrides = None) -> None:
    """Train every method from the store, and report."""
    from sidecache import commands

    commands.train(_read_job(config, overrides))


app.command("intrinsic", epilog="Example: sidecache intrinsic pipeline.yaml --dims 16,64,256 --json")(intrinsic_command)


@app.command("report", epilog="Example: sidecache report runs/digits runs/flowers --output both.html")
def report_command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run directories, or folders of some")],
    output: Annotated[Path | None, typer.Option(metavar="FILE.html", help="one report of all of them")] = None,
) -> None:
    """Print the table of a run or a study, and write its report.html again; or one report of several."""
    from sidecache import commands

    commands.report(run_dirs, output)


app.command("results", epilog="Example: sidecache results runs --by dataset --format markdown")(results_command)


@app.command("inspect", epilog="Example: sidecache inspect runs/digits/cache.zarr --json")
def inspect_command(
    store: Annotated[str, typer.Argument(help="a store's folder or URL")], json: AsJson = False
) -> None:
    """Show what a store contains, what it was made from, and whether it is complete."""
    from store.inspect import describe_store, print_store
    from store.reader import open_store

    description = describe_store(open_store(store))
    if json:
        print_json(description)
    else:
        print_store(description)


@app.command("layers", epilog="Example: sidecache layers runs/digits/cache.zarr --figure layers.svg")
def layers_command(
    store: Annotated[str, typer.Argument(help="a store's folder or URL")],
    samples: Annotated[int, typer.Option(min=2, help="random training samples that are scored")] = 1000,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="draw the curves into this file")] = None,
    json: AsJson = False,
) -> None:
    """Score every layer of a store, alone and with others, by solved probes: which are worth storing."""
    from adapt.planning.layer_report import draw_scores, print_scores
    from adapt.planning.layer_scores import score_layers
    from adapt.run_dir.files import write_bytes
    from extract.forward.device import configure_process
    from store.reader import open_store

    configure_process()
    scores = score_layers(open_store(store), n_samples=samples)
    if json:
        print_json(scores.document())
    else:
        print_scores(scores)
    if figure:
        write_bytes(figure, memoryview(draw_scores(scores).encode()))


@app.command("verify", epilog="Example: sidecache verify runs/digits/cache.zarr --repair pipeline.yaml")
def verify_command(
    store: Annotated[str, typer.Argument(help="a store's folder or URL")],
    repair: Annotated[
        Path | None, typer.Option(metavar="PIPELINE.YAML", help="extract damaged shards again, with this job")
    ] = None,
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Read every byte of a store and list what is damaged; the exit status is then 1."""
    from store.errors import JobError
    from store.verify import verify_store
    from store.verify_report import print_report

    report = verify_store(store)
    if repair and report.damaged:
        _repair(store, _read(repair, overrides), report)
        report = verify_store(store)
    if json:
        print_json(report.document())
    else:
        print_report(report)
    if not report.ok:
        raise JobError(f"{store} is damaged; `--repair PIPELINE.YAML` extracts damaged shards again, and nothing else")


def _repair(store: str, config: "Config", report: "Report") -> None:
    from adapt.job.extraction import repair
    from adapt.job.inputs import Inputs
    from adapt.planning.preset_choice import require_preset
    from extract.forward.device import configure_process
    from sidecache.steps import log_extraction
    from store.address import store_url
    from store.errors import UserError
    from store.verify_report import damaged_shards

    configure_process()
    config = require_preset(config)
    if store_url(config.store.path) != store_url(store):
        raise UserError(f"that job makes the store {config.store.path}, not {store}; give the job that made this one")
    log_extraction(repair(config, Inputs(config), damaged_shards(report)), config)


@app.command("methods", epilog="Example: sidecache methods --backbone vit_base_patch16_224 --num-classes 10 --json")
def methods_command(
    backbone: Annotated[str, typer.Option(help="a timm model to count parameters for")] = "vit_base_patch16_224",
    num_classes: Annotated[int, typer.Option(min=1, help="width of the classifier")] = 1000,
    json: AsJson = False,
) -> None:
    """List the methods with what they train from and how many parameters they train."""
    from adapt.create import list_methods, print_methods

    listed = list_methods(backbone, num_classes)
    if json:
        print_json(listed)
    else:
        print_methods(listed, backbone)


app.add_typer(predict_app)
