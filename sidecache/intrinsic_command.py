"""The command `sidecache intrinsic`. Imports are inside the function, so that `--help` does not wait for torch."""

from typing import Annotated

import typer

import sidecache
from sidecache.job_options import AsJson, ConfigPath, Overrides
from sidecache.messages import log, print_json


def intrinsic_command(
    config: ConfigPath,
    overrides: Overrides = None,
    block: Annotated[int | None, typer.Option(min=0, help="number of the block; the last one by default")] = None,
    dims: Annotated[str, typer.Option(metavar="D,D,...", help="dimensions of the subspaces")] = "8,32,128,512",
    json: AsJson = False,
) -> None:
    """Measure the local intrinsic dimension of a block's attention and MLP; `targets: auto` then uses the result."""
    from adapt.job.checks import require_trainable
    from adapt.job.inputs import Inputs
    from adapt.job.intrinsic_dimension import parse_dims
    from adapt.job.intrinsic_figure import print_measurement
    from adapt.job.training_job import measure_intrinsic_dimension
    from adapt.planning.preset_choice import resolve_preset
    from adapt.training.distributed import own_run_dir, world
    from extract.forward.device import configure_process
    from sidecache.steps import extract_first

    configure_process()
    parsed, parsed_dims = sidecache.load_config(config, overrides or []), parse_dims(dims)
    require_trainable(parsed)
    with own_run_dir(parsed.run_dir) as run_dir:
        own_config = parsed.model_copy(update={"run_dir": run_dir})
        inputs = Inputs(own_config)
        own_config = resolve_preset(own_config, inputs, log)
        extract_first(own_config, inputs)
        measurement = measure_intrinsic_dimension(own_config, inputs, block, parsed_dims, log=log)
    if world().is_main_process:
        if json:
            print_json(measurement.document())
        else:
            print_measurement(measurement)
        log(f"curves: {parsed.run_dir / 'intrinsic.json'}, figure: {parsed.run_dir / 'intrinsic.svg'}")
