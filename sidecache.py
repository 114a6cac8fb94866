"""sidecache: run a frozen vision transformer once, keep its per-layer tokens, then train adaptors in seconds.

The command line, and the public names: `import sidecache as sc`.
"""

import importlib
import importlib.util
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from adapt.adaptor import Adaptor, load_adaptor
    from adapt.config.pipeline import Config, load_config
    from adapt.create import create_model
    from adapt.job.extraction import OnChanged
    from adapt.methods.from_features.linear_probe import LinearProbe, LinearProbeOptions
    from adapt.methods.from_features.losa import LoSA, LoSAOptions
    from adapt.methods.in_backbone.merge import merge, unmerge
    from adapt.run_dir.results import Row
    from extract.backbones.backbone import Backbone, TappedBackbone
    from extract.job.extraction import Extraction
    from extract.sources.open_source import ImageSource
    from extract.sources.user_datasets import from_datasets
    from store.errors import JobError, UserError
    from store.reader import Store, open_store
    from store.verify_report import Report

__version__ = "0.1.0"

# Public names and where they live, loaded when first used: `sidecache --help` waits for no torch.
_HOME = {
    "Adaptor": "adapt.adaptor",
    "Config": "adapt.config.pipeline",
    "JobError": "store.errors",
    "LinearProbe": "adapt.methods.from_features.linear_probe",
    "LinearProbeOptions": "adapt.methods.from_features.linear_probe",
    "LoSA": "adapt.methods.from_features.losa",
    "LoSAOptions": "adapt.methods.from_features.losa",
    "Store": "store.reader",
    "TappedBackbone": "extract.backbones.backbone",
    "UserError": "store.errors",
    "create_model": "adapt.create",
    "from_datasets": "extract.sources.user_datasets",
    "load_adaptor": "adapt.adaptor",
    "load_config": "adapt.config.pipeline",
    "merge": "adapt.methods.in_backbone.merge",
    "open_store": "store.reader",
    "unmerge": "adapt.methods.in_backbone.merge",
}
__all__ = [
    "Adaptor",
    "Config",
    "JobError",
    "LinearProbe",
    "LinearProbeOptions",
    "LoSA",
    "LoSAOptions",
    "Store",
    "TappedBackbone",
    "UserError",
    "create_model",
    "extract",
    "from_datasets",
    "load_adaptor",
    "load_config",
    "merge",
    "open_store",
    "run",
    "train",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sidecache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def extract(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    on_changed: "OnChanged" = "fail",
) -> "Extraction":
    """Bring the token store of a configuration to completion; a whole store is left as it is.

    Args:
        config: from `load_config`.
        source: your own samples instead of `data:`; see `from_datasets`.
        backbone: your own frozen module instead of `backbone:`; see `TappedBackbone`.
        on_changed: `fail`, or `new-store`: where samples that the store holds are gone or changed, extract to one
            beside it.

    Returns:
        the open store (`.store`), where it is (`.path`), and what this call wrote.

    Raises:
        UserError: the store there was made from something else, a sample cannot be decoded.
        JobError: a value cannot be stored, the disk refuses.
    """
    from extract.job.main_guard import require_main_guard

    if config.extract.workers > 1 and not config.extract.scheduler:
        require_main_guard()

    from adapt.job.extraction import extract as run_extraction
    from adapt.job.feature_set import Inputs
    from extract.forward.device import configure_process

    configure_process()
    return run_extraction(config, Inputs(config, source, backbone), on_changed)


def train(config: "Config", source: "ImageSource | None" = None, backbone: "Backbone | None" = None) -> "list[Row]":
    """Train every method of a configuration for every seed from its store; write results.json, .csv and report.html.

    Arguments and errors are those of `extract`. Returns one row a trained trial, those of earlier calls included.
    """
    from adapt.training.distributed import own_run_dir
    from extract.forward.device import configure_process

    configure_process()
    with own_run_dir(config.run_dir) as run_dir:
        return _train_in(run_dir, config, source, backbone)


def _train_in(
    run_dir: Path, config: "Config", source: "ImageSource | None", backbone: "Backbone | None"
) -> "list[Row]":
    from adapt.job.feature_set import Inputs
    from adapt.job.training_job import train as run_training

    own = config.model_copy(update={"run_dir": run_dir})
    rows = run_training(own, Inputs(own, source, backbone), say)
    _write_report(run_dir)
    return rows


def run(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    on_changed: "OnChanged" = "fail",
) -> "list[Row]":
    """The whole job: `extract` what is missing, `train` what is not trained yet, write results and report."""
    from adapt.job.trainable import require_trainable
    from adapt.training.distributed import own_run_dir
    from extract.forward.device import configure_process

    configure_process()
    require_trainable(config, backbone)  # this and the lock before hours are spent on the store
    with own_run_dir(config.run_dir) as run_dir:
        return _train_in(run_dir, _extract_first(config, source, backbone, on_changed), source, backbone)


def say(message: str) -> None:
    """One line on standard error: what the job decided or finished; of many processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        from store.console.visible import visible

        print(visible(message), file=sys.stderr, flush=True)


def _extract_first(
    config: "Config",
    source: "ImageSource | None" = None,
    backbone: "Backbone | None" = None,
    on_changed: "OnChanged" = "fail",
) -> "Config":
    """The configuration with the store that was extracted to."""
    from adapt.job.extraction import at_store
    from adapt.training.distributed import world

    here, path = world(), config.store.path
    if config.train.feature_source != "online" and here.is_main_process:
        extraction = extract(config, source, backbone, on_changed)
        _say_extraction(extraction, config)
        path = extraction.path
    return at_store(config, here.broadcast(path))


def _say_extraction(extraction: "Extraction", config: "Config") -> None:
    if extraction.path != config.store.path:
        say(
            f"samples have changed: {config.store.path} is left as it is, {extraction.path} takes its place; to train "
            f"from that one later, set store.path={extraction.path}"
        )
    if skipped := sum(len(extraction.store.skipped(split)) for split in extraction.store.splits):
        say(f"{skipped:,} samples could not be decoded and are left out; `sidecache inspect` lists them")
    if extraction.shards_written:
        again = f"; {extraction.retries} shards were begun again" if extraction.retries else ""
        say(f"extracted {extraction.samples_written:,} samples in {extraction.seconds:.1f} s{again}")
    else:
        say(f"nothing to extract: {extraction.store.url} is complete")


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run a frozen vision transformer once, keep its tokens, then train adaptors in seconds.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", help="the job's configuration")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", metavar="SECTION.KEY=VALUE", help="override a field; may be repeated")
]
OnChangedOption = Annotated[
    Literal["fail", "new-store"],
    typer.Option(help="if samples in the store are gone or changed: refuse, or extract to a store beside it"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]


def _read(path: Path, overrides: list[str] | None) -> "Config":
    from adapt.config.pipeline import load_config

    return load_config(path, overrides or [])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command("run", epilog="Example: sidecache run pipeline.yaml -o train.epochs=5")
def run_command(config: ConfigPath, overrides: Overrides = None, on_changed: OnChangedOption = "fail") -> None:
    """Extract what is missing, train, and report: the whole job."""
    parsed = _read(config, overrides)
    run(parsed, on_changed=on_changed)
    _print_results(parsed.run_dir)


@app.command("plan", epilog="Example: sidecache plan pipeline.yaml --budget 20GB --json")
def plan_command(
    config: ConfigPath,
    overrides: Overrides = None,
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="what the store may take, such as 20GB; says what would fit")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say what the job would cost, in bytes and seconds on this machine, before anything runs."""
    from adapt.planning.plan import print_plan
    from adapt.planning.planner import make_plan, parse_bytes
    from extract.forward.device import configure_process

    configure_process()
    plan = make_plan(_read(config, overrides), None if budget is None else parse_bytes(budget))
    _print_json(plan.document()) if json else print_plan(plan, str(config))


@app.command("extract", epilog="Example: sidecache extract pipeline.yaml --workers 4")
def extract_command(
    config: ConfigPath,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(help="processes on this machine, one a GPU; same as -o extract.workers=")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="tcp://HOST:PORT", help="of a dask cluster; same as -o extract.scheduler="),
    ] = None,
    on_changed: OnChangedOption = "fail",
) -> None:
    """Run the frozen backbone over every sample that the store lacks."""
    quoted = None if scheduler is None else json.dumps(scheduler, ensure_ascii=False)  # an empty one is not `null`
    given = {"extract.workers": workers, "extract.scheduler": quoted}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    parsed = _read(config, [*(overrides or []), *more])
    _say_extraction(extract(parsed, on_changed=on_changed), parsed)


@app.command("train", epilog="Example: sidecache train pipeline.yaml -o train.seeds=[0]")
def train_command(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train every method from the store, and report."""
    parsed = _read(config, overrides)
    train(parsed)
    _print_results(parsed.run_dir)


@app.command("intrinsic", epilog="Example: sidecache intrinsic pipeline.yaml --dims 16,64,256 --json")
def intrinsic_command(
    config: ConfigPath,
    overrides: Overrides = None,
    block: Annotated[int | None, typer.Option(min=0, help="which block; the last one by default")] = None,
    dims: Annotated[str, typer.Option(metavar="D,D,...", help="dimensions of the subspaces")] = "8,32,128,512",
    json: AsJson = False,
) -> None:
    """Measure the local intrinsic dimension of a block's attention and MLP; `targets: auto` then goes by it."""
    from adapt.job.feature_set import Inputs
    from adapt.job.intrinsic_dimension import parse_dims, print_measurement
    from adapt.job.trainable import require_trainable
    from adapt.job.training_job import measure_intrinsic_dimension
    from adapt.training.distributed import own_run_dir, world
    from extract.forward.device import configure_process

    configure_process()
    parsed, chosen = _read(config, overrides), parse_dims(dims)
    require_trainable(parsed)
    with own_run_dir(parsed.run_dir) as run_dir:
        _extract_first(parsed)
        own = parsed.model_copy(update={"run_dir": run_dir})
        measurement = measure_intrinsic_dimension(own, Inputs(own), block, chosen, say)
    if world().is_main_process:
        _print_json(measurement.document()) if json else print_measurement(measurement)
        say(f"curves: {parsed.run_dir / 'intrinsic.json'}, figure: {parsed.run_dir / 'intrinsic.svg'}")


@app.command("report", epilog="Example: sidecache report runs/digits")
def report_command(run_dir: Annotated[Path, typer.Argument(help="a run directory")]) -> None:
    """Print the table of a run, and write its report.html anew."""
    _write_report(run_dir)
    _print_results(run_dir)


def _write_report(run_dir: Path) -> None:
    from adapt.report.page import write_report
    from adapt.run_dir.config_file import read_config
    from adapt.run_dir.results import read_results

    text, title = read_config(run_dir)
    write_report(run_dir, read_results(run_dir), text, title)


def _print_results(run_dir: Path) -> None:
    from adapt.report.seed_averages import summarize
    from adapt.report.table import print_table
    from adapt.run_dir.results import read_results
    from adapt.training.distributed import world
    from store.console.terminal import Terminal

    if not world().is_main_process:
        return
    print_table(summarize(read_results(run_dir)), Terminal())
    say(f"results: {run_dir / 'results.json'}, report: {run_dir / 'report.html'}")


@app.command("inspect", epilog="Example: sidecache inspect runs/digits/cache.zarr --json")
def inspect_command(
    store: Annotated[str, typer.Argument(help="a store's folder or URL")], json: AsJson = False
) -> None:
    """Say what a store holds, from what, and whether it is complete."""
    from store.inspect import describe_store, print_store
    from store.reader import open_store

    description = describe_store(open_store(store))
    _print_json(description) if json else print_store(description)


@app.command("verify", epilog="Example: sidecache verify runs/digits/cache.zarr --repair pipeline.yaml")
def verify_command(
    store: Annotated[str, typer.Argument(help="a store's folder or URL")],
    repair: Annotated[
        Path | None, typer.Option(metavar="PIPELINE.YAML", help="extract damaged shards anew, as this job does")
    ] = None,
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Read every byte of a store and list what is damaged; exit status 1 if anything is."""
    from store.errors import JobError
    from store.verify import verify_store
    from store.verify_report import print_report

    report = verify_store(store)
    if repair and report.damaged:
        _repair(store, _read(repair, overrides), report)
        report = verify_store(store)
    _print_json(report.document()) if json else print_report(report)
    if not report.ok:
        raise JobError(f"{store} is damaged; `--repair PIPELINE.YAML` extracts damaged shards anew, and nothing else")


def _repair(store: str, config: "Config", report: "Report") -> None:
    from adapt.job.extraction import repair
    from adapt.job.feature_set import Inputs
    from extract.forward.device import configure_process
    from store.address import store_url
    from store.errors import UserError
    from store.verify_report import damaged_shards

    configure_process()
    if store_url(config.store.path) != store_url(store):
        raise UserError(f"that job makes the store {config.store.path}, not {store}; give the job that made this one")
    _say_extraction(repair(config, Inputs(config), damaged_shards(report)), config)


@app.command("methods", epilog="Example: sidecache methods --backbone vit_base_patch16_224 --num-classes 10 --json")
def methods_command(
    backbone: Annotated[str, typer.Option(help="a timm model to count parameters for")] = "vit_base_patch16_224",
    num_classes: Annotated[int, typer.Option(min=1, help="width of the classifier")] = 1000,
    json: AsJson = False,
) -> None:
    """List the methods, what each trains from, and how many parameters it trains."""
    from adapt.create import list_methods, print_methods

    listed = list_methods(backbone, num_classes)
    _print_json(listed) if json else print_methods(listed, backbone)


@app.command(
    "predict", epilog="Example: sidecache predict runs/digits/adaptors/losa-seed0-1a2b3c4d.safetensors a.png b.png"
)
def predict_command(
    adaptor: Annotated[Path, typer.Argument(help="an adaptor's .safetensors file")],
    files: Annotated[list[Path], typer.Argument(help="images")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json: AsJson = False,
) -> None:
    """Classify images with a trained adaptor and the backbone it was trained on."""
    from adapt.adaptor import load_adaptor
    from adapt.predict import predict
    from store.console.visible import one_line

    predictions = predict(load_adaptor(adaptor, device=device), files)
    if json:
        _print_json(predictions)
    for prediction in [] if json else predictions:
        names = f"{one_line(prediction['file'])}\t{one_line(prediction['class'])}"
        print(f"{names}\t{prediction['probability']:.4f}")


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1))


def _require_own_packages() -> None:
    """PyPI has unrelated packages called adapt, extract and store; refuse to run with one of them in our place."""
    here = Path(__file__).resolve().parent
    for name in ("adapt", "extract", "store"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != here:
            where = spec.origin if spec else "nowhere"
            raise SystemExit(
                f"sidecache: the package {name!r} is found at {where}, not beside sidecache itself; "
                f"another distribution owns that name: `pip uninstall {name}`, or use an environment of its own"
            )


_UsageError: Any = typer.BadParameter.__base__  # the command line's own errors, wherever this typer keeps them


def main() -> None:
    """The command `sidecache`. Exit status: 0 done, 1 failure, 2 the user's mistake, 130 interrupted."""
    _require_own_packages()
    from store.console.visible import visible
    from store.errors import JobError, UserError
    from store.out_of_memory import is_shortage

    _open_streams()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        status = app(prog_name="sidecache", standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        error.message = visible(error.message)
        error.show(sys.stderr)  # of its own accord click writes UTF-8 where ASCII is asked for
        sys.exit(error.exit_code)
    except UserError as error:
        _fail(error, 2)
    except BrokenPipeError:  # the reader of our output is content, as in `sidecache methods | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except JobError as error:
        _fail(error, 1)
    except Exception as error:
        if is_shortage(error):
            _fail(_explain_shortage(error), 1)
        if not isinstance(error, OSError):
            raise
        _fail(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    if status == 130:  # what newer typers make of an interrupt
        _fail("interrupted; the same command goes on from here", 130)


def _open_streams() -> None:
    """Make both take every character: what their encoding lacks is written as its code, what is closed goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explain_shortage(error: Exception) -> str:
    less = "lower train.batch_size or extract.batch_size"
    if "out of memory" in str(error):  # torch's words, for which it has several types
        return f"the GPU is out of memory; {less}"
    reason = " ".join(str(error).split())[:200]
    return f"out of memory{f' ({reason})' if reason else ''}; {less}, or raise the limit if there is one (`ulimit -v`)"


def _show_warning(message: Warning | str, kind: type[Warning], *place: Any) -> None:
    from store.errors import Note

    say(f"note: {message}" if issubclass(kind, Note) else warnings.formatwarning(message, kind, *place[:2]).rstrip())


def _fail(reason: object, status: int) -> NoReturn:
    say(f"sidecache: {reason}")
    sys.exit(status)


if __name__ == "__main__":
    main()
