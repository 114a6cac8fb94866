"""Defines the arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", help="the job's configuration")]
JobPath = Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", help="the configuration of a job or a study")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", metavar="SECTION.KEY=VALUE", help="override a field; may be repeated")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
