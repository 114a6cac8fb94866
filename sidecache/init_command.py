"""The command `sidecache init`. Imports are inside the function, so that `--help` does not wait for torch."""

from pathlib import Path
from typing import Annotated

import typer

from sidecache.messages import log


def init_command(
    data: Annotated[Path, typer.Argument(metavar="FOLDER", help="a folder of images or clips in class folders")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="the file to write")] = Path("pipeline.yaml"),
) -> None:
    """Look at a folder of images or clips, and write a commented pipeline.yaml for a first job."""
    from adapt.planning.starter import make_starter
    from adapt.run_dir.files import write_text
    from store.errors import UserError

    if output.exists():
        raise UserError(f"{output} exists already; give another --output, or remove it")
    if not output.resolve().parent.is_dir():
        raise UserError(f"the folder of {output} does not exist; create it first")
    starter = make_starter(data, output)
    write_text(output, starter.text)
    log(f"{starter.summary} Wrote {output}; next: sidecache plan {output}, then sidecache run {output}")
