"""Lists the faults that `benchmarks.sabotage` makes; with each of them jobs run to the end, but give wrong results."""

from benchmarks.sabotages.choosing import CHOOSING
from benchmarks.sabotages.extraction import EXTRACTION
from benchmarks.sabotages.metrics import METRICS
from benchmarks.sabotages.results import RESULTS
from benchmarks.sabotages.sabotage_class import Sabotage
from benchmarks.sabotages.store import STORE
from benchmarks.sabotages.training import TRAINING

__all__ = ["SABOTAGES", "Sabotage"]

SABOTAGES = (*CHOOSING, *TRAINING, *RESULTS, *METRICS, *STORE, *EXTRACTION)
