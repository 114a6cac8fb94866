"""Measures the local intrinsic dimension of attention and MLP of a block (He et al., arXiv 2203.16329, Figure 3).

    d_t = min { d : score(d) >= 0.9 score(full) }

score(d) is the validation score of the method `intrinsic`, which trains one module in a random subspace of d
dimensions, score(full) that of full fine-tuning; the 0.9 is from Li et al., arXiv 1804.08838. The paper adapts the
module with the lower d_t. Ours: if both have the same d_t, or none, the module with the higher score is adapted, at q
and v, or at fc1 and fc2.

A learning rate that suits weights hardly moves theta_d, since the columns of its map have length 1, and the curves
become flat: list `intrinsic` in `methods:` with a sweep of `lr` around 1, and give the head its own rate with
`head_lr`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.job.feature_set import Log
from adapt.methods.in_backbone.random_subspace import Subspace, count
from adapt.methods.in_backbone.target_modules import Sublayer, Target
from adapt.training.trials import TrainingData
from store.errors import UserError

SHARE = 0.9  # of the score of full fine-tuning that a subspace must reach
TARGETS_OF: dict[Sublayer, tuple[Target, ...]] = {"attention": ("q", "v"), "mlp": ("fc1", "fc2")}

Score = Callable[[MethodConfig, Trial], float]


@dataclass(frozen=True)
class Point:
    """A subspace and its validation score in percent, the best one of all learning rates that were tried."""

    dim: int
    score: float


@dataclass(frozen=True)
class Curve:
    """The scores of one module of `size` parameters in subspaces of ascending dimension."""

    module: Sublayer
    size: int
    points: tuple[Point, ...]

    def reach(self, goal: float) -> Point | None:
        """The smallest subspace that scores at least `goal`."""
        return next((point for point in self.points if point.score >= goal), None)


@dataclass(frozen=True)
class Measurement:
    """The curves of one block, and the score of full fine-tuning."""

    block: int
    full_score: float
    curves: tuple[Curve, ...]

    @property
    def goal(self) -> float:
        """The score that a subspace must reach."""
        return SHARE * self.full_score

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that were measured."""
        return tuple(point.dim for point in self.curves[0].points)

    def intrinsic_dim(self, curve: Curve) -> int | None:
        """d_t, or None if no subspace reaches the goal."""
        point = curve.reach(self.goal)
        return point.dim if point else None

    @property
    def easiest(self) -> Curve:
        """The module with the lowest d_t; a tie is broken by the score there, or in the largest subspace."""
        return min(self.curves, key=self._rank)

    def describe(self, curve: Curve) -> str:
        """A module and its d_t, as text."""
        dim = self.intrinsic_dim(curve)
        reached = f"not reached up to d = {self.dims[-1]:,}" if dim is None else f"d = {dim:,}"
        return f"{curve.module}: {reached} of {curve.size:,} parameters"

    def document(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        curves = [asdict(curve) | {"intrinsic_dim": self.intrinsic_dim(curve)} for curve in self.curves]
        outcome = {"full_score": self.full_score, "goal": self.goal, "easiest": self.easiest.module}
        return {"block": self.block, "dims": list(self.dims), **outcome, "curves": curves}

    def _rank(self, curve: Curve) -> tuple[float, float]:
        point = curve.reach(self.goal)
        return (float(point.dim), -point.score) if point else (math.inf, -curve.points[-1].score)


def measure(config: Config, data: TrainingData, score: Score, block: int, dims: Sequence[int]) -> Measurement:
    """Measure both modules of a block.

    Args:
        config: the configuration; its entries of `full` and `intrinsic` say how both are trained.
        data: what end-to-end methods are trained from.
        score: trains a trial of a method, and returns its validation score.
        block: number of the block.
        dims: dimensions of the subspaces, ascending.

    Raises:
        UserError: the block does not exist or has no such modules, or a module has fewer parameters than a `dim`.
    """
    full, intrinsic = entry_of(config, "full"), entry_of(config, "intrinsic")
    # build every module once, so that an illegal block or dimension is refused before anything is trained
    sizes = {module: _size(data, _trials(intrinsic, module, dims[-1], block)[0]) for module in TARGETS_OF}
    full_score = max(score(full, trial) for trial in full.trials)
    curves = []
    for module, size in sizes.items():
        best = [max(score(intrinsic, trial) for trial in _trials(intrinsic, module, dim, block)) for dim in dims]
        curves.append(Curve(module, size, tuple(map(Point, dims, best))))
    return Measurement(block, full_score, tuple(curves))


def entry_of(config: Config, name: str) -> MethodConfig:
    """The first entry of a method in `methods:`; if there is none, the method with the settings of `train:`."""
    found = [method for method in config.parsed_methods() if method.name == name]
    return found[0] if found else config.model_copy(update={"methods": [name], "sweep": {}}).parsed_methods()[0]


def resolve_targets(method: MethodConfig, measure_block: Callable[[], Measurement], log: Log) -> MethodConfig:
    """Replace `targets: auto` of a method by the targets of the module with the lowest intrinsic dimension.

    Args:
        method: the method; without `targets: auto` it is returned as it is.
        measure_block: measures the intrinsic dimension.
        log: is called with the outcome.
    """
    if not any(trial.options.needs_measurement for trial in method.trials):
        return method
    measurement = measure_block()
    targets = TARGETS_OF[measurement.easiest.module]
    found = "; ".join(measurement.describe(curve) for curve in measurement.curves)
    log(f"{method.name}: targets {', '.join(targets)} (block {measurement.block}: {found})")
    trials = (
        _with_options(trial, targets=targets) if trial.options.needs_measurement else trial for trial in method.trials
    )
    space = method.space and method.space.replace_value("targets", "auto", targets)
    return method.model_copy(update={"trials": tuple(dict.fromkeys(trials)), "space": space})


def _with_options(trial: Trial, **options: Any) -> Trial:
    return trial.model_copy(update={"options": trial.options.model_copy(update=options)})


def _trials(intrinsic: MethodConfig, module: Sublayer, dim: int, block: int) -> list[Trial]:
    """The entry's trials in one subspace, each once."""
    return list(dict.fromkeys(_with_options(t, module=module, dim=dim, block=block) for t in intrinsic.trials))


def _size(data: TrainingData, trial: Trial) -> int:
    """The number of parameters of the module that a trial trains in a subspace."""
    model = data.new_model("intrinsic", trial, seed=0)
    (subspace,) = (module for module in model.modules() if isinstance(module, Subspace))
    return count(subspace.module)


def parse_dims(text: str) -> tuple[int, ...]:
    """Parse `8,32,128` into ascending numbers.

    Raises:
        UserError: it is no list of positive whole numbers.
    """
    try:
        dims = {int(part) for part in text.split(",")}
    except ValueError:
        dims = {0}
    if min(dims) < 1:
        raise UserError(f"--dims {text!r}; legal: positive whole numbers with commas between, such as 8,32,128,512")
    return tuple(sorted(dims))
