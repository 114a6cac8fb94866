"""The command `sidecache predict`. Imports are inside the function, so that `--help` does not wait for torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer()


@app.command("predict", epilog="Example: sidecache predict runs/digits/adaptors/losa-seed0-1a2b3c4d.safetensors photos")
def predict_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTOR.safetensors... PATH...", help="adaptors of one backbone; images and folders"),
    ],
    path_list: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="a text file with more paths, one a line; - is stdin")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="K", help="the K most probable classes of each")] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the backbone's weights, where those of the adaptor have moved")
    ] = None,
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option(help="if a file cannot be read: end, or go on without it")
    ] = "fail",
    form: Annotated[
        Literal["text", "json", "csv", "parquet"],
        typer.Option("--format", help="text: file, class and probability, separated by tabs"),
    ] = "text",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="write to this file, not to the terminal")] = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="measure operations and milliseconds an image, on standard error")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Classify images or videos with trained adaptors, which share one pass of their backbone."""
    from sidecache.predicting import PredictOptions, run_predict

    options = PredictOptions(
        paths=tuple(paths),
        path_list=path_list,
        top=top,
        weights=weights,
        device=device,
        on_error=on_error,
        form=form,
        output=output,
        with_costs=costs,
    )
    run_predict(options)
