"""Writes a first pipeline.yaml for a folder of images or clips, or a list of them."""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adapt.job.checks import draw_source_rows
from adapt.training.row_draw import RowDraw
from extract.config import DataConfig
from extract.images.decode import EXTENSIONS as IMAGES
from extract.sources.open_source import ImageSource, open_source
from extract.video.containers import EXTENSIONS as CLIPS
from store.errors import UserError

Source = Literal["folder", "video_folder", "csv", "parquet", "tars"]

_LISTS: dict[str, Source] = {".csv": "csv", ".parquet": "parquet"}
_MOST_FILES = 10_000  # that are looked at to tell images from clips
_VAL_FRACTIONS = (0.2, 0.25, 0.3, 0.4, 0.5)
_TEST_FRACTION = "  test_fraction: 0.25  # share of all samples that is kept aside for the test\n"
_BACKBONES = {True: "vit_base_patch14_reg4_dinov2.lvd142m", False: "vit_small_patch16_224.augreg_in21k_ft_in1k"}
_TEMPLATE = """\
# {summary}
# Next: sidecache plan {file} (what it will cost), then sidecache run {file}.
# All keys: docs/configuration.md.
name: {name}
run_dir: runs/{folder}  # results, adaptors and report
data:
  source: {source}
  root: {root}
  val_fraction: {val_fraction}  # share of the training samples on which hyperparameters are chosen
{test}backbone:
  name: {backbone}  # others: sidecache backbones
  weights: pretrained  # of the model hub; or the path of a file
  image_size: 224
store:
  path: runs/{folder}/cache.zarr  # the tokens of the backbone, computed once
  preset: auto  # a pilot on a few hundred samples chooses: probe, lean, coarse, grid or full
train: {{epochs: 15, batch_size: 32, seeds: [0, 1, 2]}}
methods:
  - name: linear_probe  # solved in seconds: the method to beat
    layers: all
    sweep: {{weight_decay: [1.0, 0.1, 0.01, 0.001, 0.0001, 0.00001]}}
  - name: conv_ladder  # a side network, for classes that are a matter of structure
    sweep: {{lr: [0.001, 0.003, 0.01]}}
  - name: losa
    rank: 16
    sweep: {{lr: [0.001, 0.003, 0.01]}}
"""


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A first configuration.

    Attributes:
        text: of the file, with comments.
        summary: what was found.
    """

    text: str
    summary: str


def make_starter(root: Path, output: Path) -> Starter:
    """Look at data, and write the configuration of a first job.

    Args:
        root: a folder of class folders, of splits of them, or of WebDataset tars; or a CSV or Parquet file.
        output: where the configuration will be.

    Raises:
        UserError: there are no samples that a source lists, or too few.
    """
    kind = _source_of(root)
    source = open_source(DataConfig(source=kind, root=root.resolve()))
    summary, name = _describe(source, kind), root.resolve().stem
    text = _TEMPLATE.format(
        summary=summary,
        file=output.name,
        name=json.dumps(name, ensure_ascii=False),
        folder=re.sub(r"[^\w.-]+", "-", name),
        source=kind,
        root=json.dumps(_path_from(output.resolve().parent, root.resolve()), ensure_ascii=False),
        val_fraction=_val_fraction(source),
        test=_TEST_FRACTION if source.drawn else "",
        backbone=_BACKBONES[torch.cuda.is_available()],
    )
    return Starter(text=text, summary=summary)


def _source_of(root: Path) -> Source:
    """The kind of source that is at a path, by the endings of files."""
    if root.is_file() and root.suffix.lower() in _LISTS:
        return _LISTS[root.suffix.lower()]
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give a folder of images or clips, or a .csv or .parquet list")
    files = (Path(name).suffix.lower() for _, _, names in os.walk(root) for name in names)
    endings = Counter(itertools.islice(files, _MOST_FILES))
    numbers: dict[Source, int] = {
        "folder": sum(endings[ending] for ending in IMAGES),
        "video_folder": sum(endings[ending] for ending in CLIPS),
        "tars": endings[".tar"],
    }
    most = max(numbers, key=lambda kind: numbers[kind])
    if not numbers[most]:
        found = ", ".join(ending or "no ending" for ending, _ in endings.most_common(5)) or "no files"
        raise UserError(f"{root} holds no images, clips or tars that can be read; found: {found}")
    return most


def _describe(source: ImageSource, kind: Source) -> str:
    train, test = (len(source.splits[split]) // source.views for split in ("train", "test"))
    what = "clips" if kind.startswith("video") else "images"
    return f"{train:,} {what} to train on, {test:,} to test, {len(source.classes):,} classes."


def _path_from(folder: Path, root: Path) -> str:
    """Relative to the folder of the file if it is below; else absolute."""
    return root.relative_to(folder).as_posix() if root.is_relative_to(folder) else root.as_posix()


def _val_fraction(source: ImageSource) -> float:
    """The smallest usual share that leaves samples of every class on both sides.

    Raises:
        UserError: there is none.
    """
    for fraction in _VAL_FRACTIONS:
        try:
            draw_source_rows(source, RowDraw(val_fraction=fraction), seed=0)
        except UserError:
            if fraction == _VAL_FRACTIONS[-1]:
                raise
        else:
            return fraction
    raise AssertionError("the last share is drawn or refused")
