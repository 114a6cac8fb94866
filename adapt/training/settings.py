"""The hyperparameters that all candidates of a pass share."""

from dataclasses import dataclass
from typing import Literal

from adapt.training.optimizer import Optimizer


@dataclass(frozen=True)
class Settings:
    """Hyperparameters that all candidates of a pass share."""

    epochs: int
    batch_size: int  # rows that a step trains on, on average; see `adapt.training.batch_order`
    optimizer: Optimizer = "adamw"
    warmup: float = 0.1  # fraction of all steps
    balance_classes: bool = False
    precision: str = "float32"  # of autocast
    head_lr: float | None = None  # None: that of the candidate
    grad_accumulation: int | None = None  # parts of a batch; None: as few as fit into memory
    grad_checkpointing: bool = False
    mixup: float = 0.0  # alpha of the Beta distribution; 0 for none
    feature_noise: float = 0.0  # standard deviation of the noise by which channels of tokens are scaled; 0 for none
    label_smoothing: float = 0.0  # share of every label that is spread over all classes
    solve_head: float | None = None  # weight decay at which heads are solved anew at the end; None: they are not
    keep: Literal["best", "last"] = "best"  # which epoch's weights: the best on validation, or the last
    shuffle_block: int = 1  # neighboring rows that are read at once; see `adapt.training.batch_order`
