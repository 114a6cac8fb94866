"""The command `sidecache backbones`. Imports are inside the functions, so that `--help` does not wait for torch."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sidecache.job_options import AsJson
from sidecache.messages import print_json

if TYPE_CHECKING:
    from extract.backbones.listing import ListedBackbone


def backbones_command(
    pattern: Annotated[str, typer.Argument(help="a part of a name, or a pattern such as 'vit_*_dinov2'")] = "*",
    json: AsJson = False,
) -> None:
    """List the vision transformers of timm that can be backbones, with the bytes that an image takes in a store."""
    from extract.backbones.listing import list_backbones

    listed = list_backbones(pattern)
    if json:
        print_json([asdict(backbone) for backbone in listed])
    else:
        _print(listed)


def _print(listed: Sequence["ListedBackbone"]) -> None:
    from rich.filesize import decimal

    from store.console.terminal import Terminal
    from store.dtypes import bytes_per_token

    terminal = Terminal()
    for one in listed:
        height, width = one.image_size
        facts = (
            f"{one.parameters / 1e6:,.0f} M parameters",
            f"{one.depth} layers of {one.num_tokens:,} x {one.dim:,}",
            f"{height} px" if height == width else f"{height} x {width} px",
            f"{decimal(one.depth * one.num_tokens * bytes_per_token('float16', one.dim))} an image in float16",
            f"weights {', '.join(one.weights) or 'none'}",
        )
        terminal.print(one.name, style="bold", highlight=False)
        terminal.print(f"  {'; '.join(facts)}", highlight=False, soft_wrap=True)
    terminal.print(
        f"{len(listed)} models. Also: ViViT (backbone.name: vivit), hub folders (backbone.weights: hf-hub:ORG/NAME), "
        "and modules of your own (docs/python.md). `sidecache plan` tells what a job stores.",
        highlight=False,
        soft_wrap=True,
    )
