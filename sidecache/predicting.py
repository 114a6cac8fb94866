"""Does what the command `predict` says: loads adaptors, classifies files, and prints or writes the predictions."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapt.across_runs.formats import RecordFormat, format_records
from adapt.adaptors.adaptor import Adaptor
from adapt.adaptors.card import read_card
from adapt.adaptors.files import load_adaptors
from adapt.adaptors.items import kind_of_files
from adapt.adaptors.predict import OnError, predict
from adapt.adaptors.prediction import Prediction
from adapt.job.adaptor_costs import measure_costs
from adapt.run_dir.files import write_bytes
from extract.forward.device import configure_process
from extract.sources.given_paths import expand_paths, read_path_list
from sidecache.messages import log
from store.console.visible import one_line
from store.errors import JobError, UserError

Format = RecordFormat | Literal["text"]
ADAPTOR = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The options of `sidecache predict`; see its help.

    Args:
        paths: adaptors, and files and folders to classify.
        path_list: a text file with more of the latter.
        top: how many of the most probable classes are shown; None is the best one, in JSON all of them.
        weights: of the backbone, if they were moved.
        device: auto, cpu or cuda.
        on_error: what happens with a file that cannot be read.
        form: of the output.
        output: a file for it; None is standard output.
        with_costs: whether operations and milliseconds an image are measured.
    """

    paths: tuple[Path, ...]
    path_list: Path | None
    top: int | None
    weights: Path | None
    device: str
    on_error: OnError
    form: Format
    output: Path | None
    with_costs: bool


def run_predict(options: PredictOptions) -> None:
    """Classify files and print the predictions; only these go to standard output.

    Raises:
        UserError: an adaptor, a folder or a file is not as it must be.
        JobError: no file at all could be read.
    """
    configure_process()
    adaptors, files = _open(options)
    started = time.perf_counter()
    top = options.top or (None if options.form == "json" else 1)
    predictions = predict(adaptors, files, top, options.on_error)
    seconds = time.perf_counter() - started
    _write(predictions, options)
    failed = [prediction.error for prediction in predictions[0] if prediction.error]
    for error in failed:
        log(f"skipped: {error}")
    left_out = f", {len(failed):,} skipped" if failed else ""
    unit = kind_of_files(adaptors[0].card.clips).plural
    log(f"predicted {len(files):,} {unit} in {seconds:.1f} s ({len(files) / seconds:.1f} {unit}/s){left_out}")
    if options.with_costs:
        for line in measure_costs(adaptors).lines():
            log(line)
    if len(failed) == len(files):
        raise JobError(f"none of the {len(files):,} {unit} could be read")


def _open(options: PredictOptions) -> tuple[list[Adaptor], list[Path]]:
    """The adaptors, and all files with folders expanded; everything that can be refused at once is."""
    paths = [path for path in options.paths if path.suffix == ADAPTOR]
    if not paths or options.paths[0] not in paths:
        raise UserError(
            f"there is no adaptor {options.paths[0]}; give a {ADAPTOR} file that a run wrote below its adaptors/"
        )
    if options.form == "parquet" and options.output is None:
        raise UserError("--format parquet needs a file: add --output FILE.parquet")
    given = [path for path in options.paths if path.suffix != ADAPTOR]
    if options.path_list:
        given += read_path_list(options.path_list)
    if not given:
        raise UserError("there is nothing to classify; give files or folders after the adaptors, or --list FILE")
    files = expand_paths(given, kind_of_files(read_card(paths[0]).clips))
    return load_adaptors(paths, options.device, options.weights), files


def _write(predictions: Sequence[Sequence[Prediction]], options: PredictOptions) -> None:
    """Print the predictions of every file, those of all adaptors together, or write them to a file."""
    of_files = [prediction for of_file in zip(*predictions, strict=True) for prediction in of_file]
    if options.form == "text":
        content = "".join(_text_lines(of_files, has_adaptors=len(predictions) > 1)).encode()
    elif options.form == "json":
        content = format_records([_document(prediction) for prediction in of_files], "json")
    else:
        content = format_records([row for prediction in of_files for row in _ranked(prediction)], options.form)
    if options.output:
        write_bytes(options.output, memoryview(content))
    else:
        print(content.decode(), end="")


def _text_lines(predictions: Sequence[Prediction], has_adaptors: bool) -> Iterator[str]:
    """Tab-separated: file, adaptor if there are several, class, probability. Files that were skipped are left out."""
    for row in (row for prediction in predictions for row in _ranked(prediction) if prediction.error is None):
        names = [row["file"], *([row["adaptor"]] if has_adaptors else []), row["class"]]
        yield "\t".join([*map(one_line, names), f"{row['probability']:.4f}"]) + "\n"


def _document(prediction: Prediction) -> dict[str, Any]:
    return {
        "file": prediction.name,
        "adaptor": prediction.adaptor,
        "class": prediction.label,
        "probability": prediction.probability,
        "probabilities": prediction.probabilities,
        "error": prediction.error,
    }


def _ranked(prediction: Prediction) -> Iterator[dict[str, Any]]:
    """A row for each of the most probable classes; one without a class if the file could not be read."""
    common = {"file": prediction.name, "adaptor": prediction.adaptor}
    if prediction.error:
        yield {**common, "rank": None, "class": None, "probability": None, "error": prediction.error}
    for rank, (label, probability) in enumerate(prediction.probabilities.items(), start=1):
        yield {**common, "rank": rank, "class": label, "probability": probability, "error": ""}
