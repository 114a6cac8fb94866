"""Compares predicting with extracting: `python -m benchmarks.predicting pipeline.yaml FOLDER --out FILE`.

In every round the same --images files below FOLDER, again from the first one where they are not enough, are

extract    extracted to a new store, as the pipeline's `store:` says.
one        classified with LoSA.
four       classified with LoSA, a linear probe, an attentive probe and a layer fusion, which share the backbone's pass.

The adaptors are untrained, which takes the same time. All run in one process, in alternating order. The figures are
the rate of `one` divided by that of `extract`, and the time of `four` divided by that of `one`, each the median of the
rounds' ratios.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from adapt.adaptors.adaptor import Adaptor
from adapt.adaptors.card import Card
from adapt.adaptors.predict import predict
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.features.specs import spec_of_backbone
from adapt.methods.registry import build_model, find_method
from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare
from extract.backbones.backbone import Backbone, digests, load_backbone
from extract.forward.device import configure_process
from extract.forward.frozen_forward import FrozenForward
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.given_paths import expand_paths
from extract.sources.open_source import ImageSource, SampleSplit
from extract.sources.samples import IMAGES, FileSlice, Sample
from store.layout import resolve_layers

METHODS = ("losa", "linear_probe", "attentive_probe", "layer_fusion")


def untrained_adaptor(method: str, backbone: Backbone, config: Config, num_classes: int) -> Adaptor:
    """An adaptor of a method with its default options, on the layers of the pipeline's store."""
    layers, tokens = resolve_layers(config.store.layers, backbone.depth), config.store.tokens
    forward = FrozenForward(backbone, layers, tokens, config.extract)
    options = find_method(method).options()
    model = build_model(method, spec_of_backbone(backbone, layers, tokens), num_classes, options)
    card = Card.model_validate(
        {
            "method": method,
            "options": options.model_dump(),
            "metrics": {},
            "backbone": config.backbone,
            "precision": forward.precision,
            "layers": layers,
            "tokens": tokens,
            "classes": [str(k) for k in range(num_classes)],
            "multi_label": False,
            "train_precision": "float32",
            **digests(backbone),
        }
    )
    return Adaptor(name=method, card=card, model=model.to(forward.device).eval(), forward=forward)


def extract(files: Sequence[Path], backbone: Backbone, config: Config, store: Path) -> None:
    """Extract files to a new store."""
    samples = [Sample(f"{number:06}", ("0",), FileSlice(str(file))) for number, file in enumerate(files)]
    split = SampleSplit(samples, np.zeros(len(samples), np.int64))
    source = ImageSource(name="files", classes=("0", "1"), multi_label=False, splits={"train": split})
    stored = config.store.model_copy(update={"path": str(store), "splits": ["train"]})
    extract_tokens(
        ExtractionJob(source=source, backbone=backbone, data=config.data, store=stored, extract=config.extract)
    )


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path, help="images, at any depth")
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="SECTION.KEY=VALUE, as of sidecache")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    torch.manual_seed(0)
    config = load_config(args.config, args.overrides)
    files = list(itertools.islice(itertools.cycle(expand_paths([args.folder], IMAGES)), args.images))
    backbone = load_backbone(config.backbone)
    adaptors = [untrained_adaptor(method, backbone, config, args.classes) for method in METHODS]
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "cache.zarr"
        contestants = {
            "extract": lambda: extract(files, backbone, config, store),
            "one": lambda: predict(adaptors[:1], files),
            "four": lambda: predict(adaptors, files),
        }
        before = {"extract": lambda: shutil.rmtree(store, ignore_errors=True)}
        seconds = compare(contestants, args.rounds, before)
    figures = {
        "images": len(files),
        "backbone": backbone.name,
        "rounds": args.rounds,
        "images_per_second": {name: len(files) / median(taken) for name, taken in seconds.items()},
        "rate of one / extract": _ratio(seconds["extract"], seconds["one"]),
        "time of four / one": _ratio(seconds["four"], seconds["one"]),
    }
    save({**machine(), **figures}, args.out)


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(one / other for one, other in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
