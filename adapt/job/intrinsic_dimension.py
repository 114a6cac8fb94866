"""The local intrinsic dimension of the attention and of the MLP of a block (He et al., arXiv 2203.16329, Figure 3).

    d_t = min { d : score(d) >= 0.9 score(full) }

score(d) is that of the method `intrinsic`, which trains one module in a random subspace of d dimensions, score(full)
that of full fine-tuning, both on validation rows; the 0.9 is that of Li et al., arXiv 1804.08838. The paper adapts the
module with the lower d_t. Ours: where no d_t is the lower one, the module with the higher score is, and its targets
are q and v, or fc1 and fc2.

A learning rate that suits weights hardly moves theta_d (the columns of its map have length 1), and the curves are flat:
name `intrinsic` in `methods:` with a sweep of `lr` around 1, and give the head a rate of its own by `train.head_lr`.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich import box
from rich.table import Table

from adapt.config.pipeline import Config, MethodConfig, Trial
from adapt.job.feature_set import Say
from adapt.methods.in_backbone.random_subspace import Subspace, count
from adapt.methods.in_backbone.target_modules import Sublayer, Target
from adapt.run_dir.files import damaged, read_json, write_json, write_text
from adapt.run_dir.results import Row
from adapt.training.search import Material
from store.config import PositiveInt
from store.console.terminal import Terminal
from store.errors import UserError

DIMS = (8, 32, 128, 512)
SHARE = 0.9
TARGETS_OF: dict[Sublayer, tuple[Target, ...]] = {"attention": ("q", "v"), "mlp": ("fc1", "fc2")}
_COLOURS: dict[Sublayer, str] = {"attention": "#1f5fbf", "mlp": "#c2571a"}
_GREY = "#777777"

Score = Callable[[MethodConfig, Trial], float]


@dataclass(frozen=True)
class Point:
    """A subspace and its validation score in percent, the best one of all learning rates that were tried."""

    dim: int
    score: float


@dataclass(frozen=True)
class Curve:
    """One module of `size` parameters, in subspaces of ascending dimension."""

    module: Sublayer
    size: int
    points: tuple[Point, ...]

    def reach(self, goal: float) -> Point | None:
        """The smallest subspace that scores so much."""
        return next((point for point in self.points if point.score >= goal), None)


@dataclass(frozen=True)
class Measurement:
    """The curves of one block, and what full fine-tuning scores."""

    block: int
    full_score: float
    curves: tuple[Curve, ...]

    @property
    def goal(self) -> float:
        """What a subspace must score."""
        return SHARE * self.full_score

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that were measured."""
        return tuple(point.dim for point in self.curves[0].points)

    def intrinsic_dim(self, curve: Curve) -> int | None:
        """d_t, or None where no subspace reaches the goal."""
        point = curve.reach(self.goal)
        return point.dim if point else None

    @property
    def easiest(self) -> Curve:
        """The module with the lowest d_t; the higher score there (or in the largest subspace) breaks a tie."""
        return min(self.curves, key=self._rank)

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        curves = [asdict(curve) | {"intrinsic_dim": self.intrinsic_dim(curve)} for curve in self.curves]
        outcome = {"full_score": self.full_score, "goal": self.goal, "easiest": self.easiest.module}
        return {"block": self.block, "dims": list(self.dims), **outcome, "curves": curves}

    def _rank(self, curve: Curve) -> tuple[float, float]:
        point = curve.reach(self.goal)
        return (float(point.dim), -point.score) if point else (math.inf, -curve.points[-1].score)


def measure(config: Config, material: Material, score: Score, block: int, dims: Sequence[int]) -> Measurement:
    """Measure both modules of a block.

    Args:
        score: trains a trial of a method, and returns its validation score.
        dims: ascending.

    Raises:
        UserError: there is no such block, it has no such modules, or they have fewer parameters than a `dim`.
    """
    full, inside = entry_of(config, "full"), entry_of(config, "intrinsic")
    sizes = {module: _size(material, _trials(inside, module, dims[-1], block)[0]) for module in TARGETS_OF}
    full_score = max(score(full, trial) for trial in full.trials)
    curves = []
    for module, size in sizes.items():
        best = [max(score(inside, trial) for trial in _trials(inside, module, dim, block)) for dim in dims]
        curves.append(Curve(module, size, tuple(map(Point, dims, best))))
    return Measurement(block, full_score, tuple(curves))


def entry_of(config: Config, name: str) -> MethodConfig:
    """The first entry of `methods:` of that name; without one, the method as `train:` has it."""
    found = [method for method in config.parsed_methods() if method.name == name]
    return found[0] if found else config.model_copy(update={"methods": [name], "sweep": {}}).parsed_methods()[0]


def resolve_targets(method: MethodConfig, measured: Callable[[], Measurement], say: Say) -> MethodConfig:
    """Replace `targets: auto` of a method by those of the module with the lowest intrinsic dimension."""
    if not any(trial.options.needs_measurement for trial in method.trials):
        return method
    measurement = measured()
    targets = TARGETS_OF[measurement.easiest.module]
    found = "; ".join(describe(measurement, curve) for curve in measurement.curves)
    say(f"{method.name}: targets {', '.join(targets)} (block {measurement.block}: {found})")
    trials = (
        _with_options(trial, targets=targets) if trial.options.needs_measurement else trial for trial in method.trials
    )
    return method.model_copy(update={"trials": tuple(dict.fromkeys(trials))})


def _with_options(trial: Trial, **options: Any) -> Trial:
    return trial.model_copy(update={"options": trial.options.model_copy(update=options)})


def _trials(inside: MethodConfig, module: Sublayer, dim: int, block: int) -> list[Trial]:
    """The entry's trials, each of them once, in this subspace instead of their own."""
    return list(dict.fromkeys(_with_options(t, module=module, dim=dim, block=block) for t in inside.trials))


def _size(material: Material, trial: Trial) -> int:
    """Parameters of the module, counted before anything is trained: what cannot be built is refused at once."""
    model = material.new_model("intrinsic", trial, seed=0)
    (subspace,) = (module for module in model.modules() if isinstance(module, Subspace))
    return count(subspace.module)


def parse_dims(text: str) -> tuple[int, ...]:
    """`8,32,128` as numbers, ascending."""
    try:
        dims = {int(part) for part in text.split(",")}
    except ValueError:
        dims = {0}
    if min(dims) < 1:
        raise UserError(f"--dims {text!r}; legal: positive whole numbers with commas between, such as 8,32,128,512")
    return tuple(sorted(dims))


class _Score(BaseModel):
    """The score of a trial, beside what describes the trial to a reader."""

    model_config = ConfigDict(extra="allow", strict=True)

    score: Annotated[float, Field(allow_inf_nan=False)]


class _Last(BaseModel):
    """What a measurement was of, beside its outcome."""

    model_config = ConfigDict(extra="allow", strict=True)

    block: Annotated[int, Field(ge=0)]
    dims: Annotated[list[PositiveInt], Field(min_length=1)]


class _Document(BaseModel):
    """`intrinsic.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    features: str | None = None
    measurement: _Last | None = None
    scores: dict[str, _Score] = {}


class Record:
    """`intrinsic.json` of a run directory: the last measurement, and every score as it comes.

    A score that `results` of the same run tell is not computed again.

    Raises:
        JobError: the file is damaged.
    """

    def __init__(self, run_dir: Path, results: Iterable[Row]) -> None:
        self._file = run_dir / "intrinsic.json"
        self._results = {row.trial_id: row.val_score for row in results if row.val_score is not None}
        self._document = self._read() if self._file.exists() else _Document()

    def asked(self, features: str) -> tuple[int | None, tuple[int, ...]]:
        """Block and dimensions of the last measurement from these features; what is usual where there was none."""
        last = self._document.measurement
        if last is None or self._document.features != features:
            return None, DIMS
        return last.block, tuple(last.dims)

    def score(self, trial_id: str, method: MethodConfig, trial: Trial, train: Callable[[], float]) -> float:
        """The score of a trial, which is trained if it is not known."""
        if trial_id in self._results:
            return self._results[trial_id]
        scores = self._document.scores
        if trial_id not in scores:
            facts = trial.model_dump(mode="json", serialize_as_any=True)
            scores[trial_id] = _Score(score=train(), method=method.name, **facts)
            self._write()
        return scores[trial_id].score

    def keep(self, features: str, measurement: Measurement) -> None:
        """Keep a measurement from these features, and draw it in `intrinsic.svg`."""
        last = _Last.model_validate(measurement.document())
        self._document = _Document(features=features, measurement=last, scores=self._document.scores)
        self._write()
        write_text(self._file.with_suffix(".svg"), draw(measurement))

    def _read(self) -> _Document:
        try:
            return _Document.model_validate(read_json(self._file))
        except ValidationError as error:
            first = error.errors()[0]
            raise damaged(self._file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def _write(self) -> None:
        write_json(self._file, self._document.model_dump())


def print_measurement(measurement: Measurement) -> None:
    """The scores as a table, and every d_t, on standard output."""
    console = Terminal()
    table = Table(box=box.SIMPLE)
    for heading in ("d", *(curve.module for curve in measurement.curves)):
        table.add_column(heading, justify="right")
    for dim, *points in zip(measurement.dims, *(curve.points for curve in measurement.curves), strict=True):
        table.add_row(f"{dim:,}", *(f"{point.score:.2f}" for point in points))
    console.print(f"validation score in percent, block {measurement.block}", table)
    console.print(f"full fine-tuning: {measurement.full_score:.2f}, {SHARE:.0%} of it: {measurement.goal:.2f}")
    for curve in measurement.curves:
        console.print(describe(measurement, curve))


def describe(measurement: Measurement, curve: Curve) -> str:
    """A module and its d_t, in words."""
    dim = measurement.intrinsic_dim(curve)
    reached = f"not reached up to d = {measurement.dims[-1]:,}" if dim is None else f"d = {dim:,}"
    return f"{curve.module}: {reached} of {curve.size:,} parameters"


def draw(measurement: Measurement) -> str:
    """The paper's figure, as SVG: score against d; a ring is d_t, the dashed line the goal."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "intrinsic", "font.size": 9}
    with matplotlib.rc_context(style):  # the same measurement gives the same bytes
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for curve in measurement.curves:
            _draw_curve(axes, measurement, curve)
        axes.axhline(measurement.goal, color=_GREY, linestyle="--", label=f"{SHARE:.0%} of full fine-tuning")
        axes.set_xscale("log")
        axes.set_xticks(measurement.dims, [f"{dim:,}" for dim in measurement.dims])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"d, dimensions of the subspace of one module of block {measurement.block} (log)")
        axes.set_ylabel("validation score (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw_curve(axes: Axes, measurement: Measurement, curve: Curve) -> None:
    dims, scores = [point.dim for point in curve.points], [point.score for point in curve.points]
    color, reached = _COLOURS[curve.module], curve.reach(measurement.goal)
    axes.plot(dims, scores, marker="o", color=color, label=describe(measurement, curve))
    if reached:
        axes.plot([reached.dim], [reached.score], "o", color=color, markersize=13, markerfacecolor="none")
